"""What must be equal for an engine to be used: `EngineKey` of the engine, `Box` of where it would run.

TensorRT promises nothing about a plan on another release, GPU or CUDA major (NVIDIA's developer guide, "Version
Compatibility" and "Hardware Compatibility"), so all of them are in the key:

* the graph: name, hash of its file (a graph with external weights has their hash inside), variant, precision;
* what was asked of the builder: optimisation profiles and flags;
* who built it: flavour (``tensorrt`` or ``tensorrt_rtx``), full version, CUDA major;
* for which GPU: compute capabilities; for full TensorRT also the product's name and its number of multiprocessors,
  since tactics are timed on it. TensorRT for RTX compiles the kernels on the user's machine, so there both are None.

The driver is not in the key: a plan holds finished kernels, which a driver of the same or a newer CUDA major runs.

Version compatible engines (flag ``version_compatible``) also run on a newer full TensorRT, from 10.x also on 11.x,
never on an older one. Hardware compatible engines are for full TensorRT: ``ampere_plus`` runs on compute capability
8.0 and above, ``same_compute_capability`` on every product of the capability; neither has the product in its key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import BundleError, DeviceError
from ..runtime.base import DeviceInfo

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
FLAVOURS = (TENSORRT, TENSORRT_RTX)
"""In the order in which a box with both takes them."""

VERSION_COMPATIBLE = "version_compatible"
AMPERE_PLUS = "hardware_compatible=ampere_plus"
SAME_CAPABILITY = "hardware_compatible=same_compute_capability"
HARDWARE_LEVELS = ("ampere_plus", "same_compute_capability")

SM_COUNT = "multiprocessors"
"""Key in `DeviceInfo.extra` of the number of streaming multiprocessors."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, typical and largest shape of one input."""
Profile = tuple[tuple[str, Shapes], ...]
"""One optimisation profile: the inputs with open dimensions, in graph order."""


@dataclass(frozen=True)
class Box:
    """A GPU with one TensorRT: where an engine is built or would run.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: Full version of the library.
        cuda_major: CUDA that the library was made for; None where nothing tells.
        compute_capability: For example ``8.6``.
        device_name: The product.
        sm_count: Its multiprocessors; None where nothing tells.
    """

    flavour: str
    version: str
    cuda_major: int | None
    compute_capability: str
    device_name: str
    sm_count: int | None

    @classmethod
    def of(cls, info: DeviceInfo, flavour: str, version: str, cuda_major: int | None) -> Box:
        """The box of a device as `Device.info` describes it.

        Raises:
            DeviceError: Not a CUDA device, or its compute capability is not known.
        """
        if info.kind != "cuda" or not info.compute_capability:
            raise DeviceError(
                f"TensorRT needs a CUDA device, and '{info.name}' is none, or hides its compute capability.",
                "Run 'pixano-edge doctor', or use --backend onnxruntime.",
            )
        count = str(info.extra.get(SM_COUNT, ""))
        return cls(
            flavour, version, cuda_major, info.compute_capability, info.name, int(count) if count.isdigit() else None
        )


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on; equal keys mean an equal engine. See the module for the fields' meaning."""

    graph: str
    graph_sha256: str
    variant: str
    precision: str
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    flavour: str
    version: str
    cuda_major: int | None
    compute_capabilities: tuple[str, ...]
    device_name: str | None = None
    sm_count: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; shapes become lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, hexadecimal."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineKey:
        """Reads what `to_dict` wrote.

        Raises:
            BundleError: Fields are missing, unknown or of another kind: written by another version.
        """
        names = [f.name for f in fields(cls)]
        try:
            if sorted(values) != sorted(names):
                raise ValueError(f"it has {sorted(values)}")
            profiles = tuple(
                tuple((str(name), _shapes(shapes)) for name, shapes in profile) for profile in values["profiles"]
            )
            texts = ("graph", "graph_sha256", "variant", "precision", "flavour", "version")
            return cls(
                **{name: str(values[name]) for name in texts},
                profiles=profiles,
                flags=tuple(str(flag) for flag in values["flags"]),
                cuda_major=_number(values["cuda_major"]),
                compute_capabilities=tuple(str(c) for c in values["compute_capabilities"]),
                device_name=None if values["device_name"] is None else str(values["device_name"]),
                sm_count=_number(values["sm_count"]),
            )
        except (ValueError, TypeError) as error:
            raise BundleError(
                f"The key of an engine cannot be read: {error}.", "Build the engine again: pixano-edge build <bundle>"
            ) from error

    def misfits(self, box: Box) -> list[str]:
        """Why the engine must not be used on a box, in words; empty when it fits."""
        reasons = []
        if self.flavour != box.flavour:
            return [f"built by {self.flavour}, this box has {box.flavour}"]
        if not self._version_fits(box.version):
            reasons.append(f"built by {self.flavour} {self.version}, this box has {box.version}")
        if self.cuda_major != box.cuda_major:
            reasons.append(f"built for CUDA {_or_unknown(self.cuda_major)}, this box has {_or_unknown(box.cuda_major)}")
        if not self._capability_fits(box.compute_capability):
            built = " and ".join(self.compute_capabilities)
            reasons.append(f"built for compute capability {built}, this GPU has {box.compute_capability}")
        elif self.device_name is not None and self.device_name != box.device_name:
            reasons.append(f"built on '{self.device_name}', this GPU is '{box.device_name}'")
        elif self.sm_count is not None and self.sm_count != box.sm_count:
            reasons.append(f"built for {self.sm_count} multiprocessors, this GPU has {_or_unknown(box.sm_count)}")
        return reasons

    def _version_fits(self, version: str) -> bool:
        if self.version == version:
            return True
        if VERSION_COMPATIBLE not in self.flags:
            return False
        built, here = _release(self.version), _release(version)
        # NVIDIA's guide: forward within a major, and from 10 to 11; never back.
        return built < here and (here[:1] == built[:1] or (built[:1], here[:1]) == ((10,), (11,)))

    def _capability_fits(self, capability: str) -> bool:
        if AMPERE_PLUS in self.flags:
            return _release(capability) >= (8, 0)
        return capability in self.compute_capabilities


def _release(text: str) -> tuple[int, ...]:
    """Leading numbers of a dotted version: ``10.3.0.post1`` gives (10, 3, 0)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _shapes(values: Any) -> Shapes:
    low, typical, high = (tuple(int(size) for size in shape) for shape in values)
    return low, typical, high


def _number(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{value!r} is no number")


def _or_unknown(value: object) -> str:
    return "an unknown number" if value is None else str(value)
