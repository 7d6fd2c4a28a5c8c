"""One C heap for all threads of a server."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from pixano_edge.engine.server.heap import share_heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a heap per thread")

CODE = """
import ctypes, threading
from pixano_edge.engine.server.heap import share_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
assert share_heap({})
found, held = [], threading.Barrier(3)

def work():
    found.append(libc.malloc(1000) >> 26)  # heaps beyond the first begin at multiples of 64 MiB
    held.wait()

threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(set(found)))
"""


def test_threads_share_one_heap() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_an_administrators_choice_stands(name: str) -> None:
    assert not share_heap({name: "4"})
