"""Power of a GPU while something runs, where NVML or the board tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pixano_edge.engine.provider.hardware import read_hardware

INTERVAL_SECONDS = 0.1
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Power:
    """Power of the whole board or GPU during back-to-back calls.

    Attributes:
        watts: Mean of the later half of the readings, in which NVML's own averaging window holds this work alone.
        joules: Energy per call; `watts` times the mean time of one.
        calls: Calls made.
    """

    watts: float
    joules: float
    calls: int


def device_power(index: int) -> float | None:
    """Watts that ``cuda:index`` draws now; None where nothing tells."""
    gpus = read_hardware().gpus
    return gpus[index].power if index < len(gpus) else None


def measure_power(
    call: Callable[[], object],
    read: Callable[[], float | None],
    seconds: float = 2.0,
    interval: float = INTERVAL_SECONDS,
) -> Power | None:
    """Calls back to back for a while and reads the power beside.

    Args:
        call: The work; returns when it is done.
        read: Watts now, or None.
        seconds: How long.
        interval: Between readings.

    Returns:
        None where power is not told, or too few readings fitted in.
    """
    if read() is None:
        return None
    samples: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            watts = read()
            if watts is not None:
                samples.append(watts)

    watcher = threading.Thread(target=watch, name="power", daemon=True)
    begin = time.perf_counter()
    watcher.start()
    calls = 0
    try:
        end = begin
        while not calls or end - begin < seconds:
            call()
            calls += 1
            end = time.perf_counter()
    finally:
        stop.set()
        watcher.join()
    late = samples[len(samples) // 2 :]
    if len(late) < MIN_SAMPLES:
        return None
    watts = sum(late) / len(late)
    return Power(watts, watts * (end - begin) / calls, calls)
