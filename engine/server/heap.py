"""The C heap of a process whose models each have a thread."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

OWN = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
"""Variables with which an administrator chooses."""

_ARENA_MAX = -8


def share_heap(environ: Mapping[str, str] | None = None) -> bool:
    """Gives all threads one heap, before there are any.

    glibc makes one for nearly every thread, and what one model's request freed would stay in its own, out of reach of
    the next model's. Threads allocate little while graphs run, so they do not wait for each other.

    Args:
        environ: The process's own when None.

    Returns:
        Whether that was done: False without glibc, and where one of `OWN` is set.
    """
    env = os.environ if environ is None else environ
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in env for name in OWN):
        return False
    return bool(mallopt(_ARENA_MAX, 1))
