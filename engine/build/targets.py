"""GPUs to build for: ``sm_86`` and the like, and what can be built ahead of time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import DeviceError

# GPUs that TensorRT for RTX leaves out, for the message.
_PRODUCTS = {
    "7.0": "Volta",
    "7.2": "Jetson Xavier",
    "8.7": "Jetson Orin",
    "9.0": "Hopper: H100, H200, GH200",
    "10.0": "Blackwell for data centres: B200",
    "10.1": "Jetson Thor before CUDA 13",
    "10.3": "Blackwell for data centres: B300",
    "11.0": "Jetson Thor",
}


def parse_target(text: str) -> str:
    """``sm_86``, ``SM86`` or ``8.6`` as compute capability ``8.6``.

    Raises:
        DeviceError: Something else.
    """
    cleaned = text.strip().lower()
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})(\d)a?", cleaned) or re.fullmatch(r"(\d{1,2})\.(\d)", cleaned)
    if match is None:
        raise DeviceError(f"'{text}' is not a GPU target.", "Name compute capabilities, for example sm_86 or sm_120.")
    return f"{int(match[1])}.{match[2]}"


def target_name(capability: str) -> str:
    """``8.6`` as ``sm_86``."""
    return f"sm_{capability.replace('.', '')}"


def member_name(capability: str) -> str:
    """``8.6`` as ``SM86``, the name in TensorRT's ``ComputeCapability``."""
    return f"SM{capability.replace('.', '')}"


def capabilities_of(members: Iterable[str]) -> list[str]:
    """The compute capabilities among the names of ``ComputeCapability``, ascending."""
    found = [re.fullmatch(r"SM(\d{1,2})(\d)", name) for name in members]
    return sorted((f"{m[1]}.{m[2]}" for m in found if m), key=lambda c: tuple(map(int, c.split("."))))


def parse_targets(texts: Sequence[str]) -> list[str]:
    """Targets as compute capabilities, each once, ascending; commas separate as well as repeated options do."""
    found = {parse_target(part) for text in texts for part in text.split(",") if part.strip()}
    return sorted(found, key=lambda c: tuple(map(int, c.split("."))))


def check_targets(capabilities: Sequence[str], known: Sequence[str], version: str) -> None:
    """Refuses what TensorRT for RTX does not build for.

    Args:
        capabilities: Wanted.
        known: Of the installed release.
        version: Of the installed release, for the message.

    Raises:
        DeviceError: Names the GPUs and how they get their engines.
    """
    foreign = [c for c in capabilities if c not in known]
    if not foreign:
        return
    named = ", ".join(f"{target_name(c)} ({_PRODUCTS[c]})" if c in _PRODUCTS else target_name(c) for c in foreign)
    raise DeviceError(
        f"TensorRT for RTX {version} does not build for {named}; it knows {', '.join(map(target_name, known))}.",
        "Such GPUs get their engines on the machine itself, with the full TensorRT (JetPack brings it; elsewhere pip "
        "install 'pixano-edge[tensorrt]'): run 'pixano-edge build <bundle>' there, without --target.",
    )
