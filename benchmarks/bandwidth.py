"""How fast this machine reads memory: what a decoder that reads all of its weights for each token cannot go below."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PASSES = 5
LEAST_BYTES = 512 << 20
"""Read per pass; several times the largest cache of desktop and server CPUs of one socket's share."""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of a read of memory that no cache holds.

    Attributes:
        bytes_per_second: Of the fastest kernel, its best pass.
        kernel: Which one.
        threads: Reading at once.
        read_bytes: Read per pass.
        cache_bytes: Last-level cache that the system tells; 0 where it does not.
    """

    bytes_per_second: float
    kernel: str
    threads: int
    read_bytes: int
    cache_bytes: int


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache of CPU 0 (``/sys``); 0 where it cannot be told."""
    found = 0
    for size in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found = max(found, int(text.rstrip("KM")) * unit)
    return found


def measure_read(threads: int, nbytes: int | None = None, passes: int = PASSES) -> Bandwidth:
    """Reads a buffer with `threads` threads and several kernels, each over its own part; the fastest pass counts.

    Args:
        threads: As many as the decoder gets.
        nbytes: Read per pass; None: `LEAST_BYTES`, or four times the last-level cache.
        passes: Of each kernel.
    """
    cache = last_level_cache()
    size = nbytes or max(LEAST_BYTES, 4 * cache)
    part = size // threads // 4096 * 4096
    parts = [np.ones(part // 4, np.float32) for _ in range(threads)]  # each touched by writing, so that pages are there
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def search(values: np.ndarray) -> None:
        assert find(values.ctypes.data, 7, values.nbytes) is None

    kernels: dict[str, Callable[[np.ndarray], object]] = {
        "memchr": search,  # releases the interpreter's lock; 7 is no byte of 1.0
        "numpy max": np.max,
        "numpy sum": np.sum,
    }
    best, name = 0.0, ""
    with ThreadPoolExecutor(threads) as pool:
        for kernel, read in kernels.items():
            for _ in range(passes):
                start = time.perf_counter()
                list(pool.map(read, parts))
                rate = part * threads / (time.perf_counter() - start)
                if rate > best:
                    best, name = rate, kernel
    return Bandwidth(best, name, threads, part * threads, cache)
