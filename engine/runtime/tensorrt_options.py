"""What `open_session(options=...)` may set for TensorRT."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DeviceError

_SPECIALIZATIONS = ("lazy", "eager", "none")


@dataclass(frozen=True)
class TrtOptions:
    """Options of a TensorRT session.

    Attributes:
        graphs: Capture steady bindings in CUDA graphs: None where device and engine can, True fails where they
            cannot, False never.
        specialization: TensorRT for RTX only, when kernels are made for the shapes that come up: ``lazy`` in the
            background while general ones run (no pauses, but such an engine cannot be captured if its shapes are
            dynamic), ``eager`` before the first run of each shape, ``none`` never.
        runtime_cache: TensorRT for RTX only, file that keeps compiled kernels for the next process; None keeps them
            in memory. TensorRT refuses one from another GPU, driver or release, then it is written anew.
    """

    graphs: bool | None = None
    specialization: str = "lazy"
    runtime_cache: str | os.PathLike[str] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> TrtOptions:
        """Checks names and values; raises DeviceError on unknown ones."""
        values = dict(values or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise DeviceError(f"TensorRT sessions have no options {unknown}.", f"Known: {known}.")
        options = cls(**values)
        if options.specialization not in _SPECIALIZATIONS:
            raise DeviceError(
                f"Unknown specialization '{options.specialization}'.", f"Known: {', '.join(_SPECIALIZATIONS)}."
            )
        return options

    def read_cache(self) -> bytes | None:
        """Kernels stored by an earlier process, or None."""
        if self.runtime_cache is None:
            return None
        try:
            return Path(self.runtime_cache).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DeviceError(
                f"The kernel cache '{self.runtime_cache}' cannot be read: {error.strerror or error}.", "Delete it."
            ) from error

    def write_cache(self, kernels: bytes | None) -> None:
        """Stores kernels if there are others than before; the file appears complete or not at all.

        Raises:
            DeviceError: The file cannot be written.
        """
        if self.runtime_cache is None or kernels is None or kernels == self.read_cache():
            return
        path = Path(self.runtime_cache)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(kernels)
            os.replace(temporary, path)
        except OSError as error:
            raise DeviceError(
                f"The kernel cache '{path}' cannot be written: {error.strerror or error}.", "Check rights and space."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
