"""Verdicts: which combination of bundle, precision, back end and device was checked here, and whether it passed.

One JSON file per combination below the bundle store's home, written by whoever runs the golden samples (the first
load on a new device, `pixano-edge verify`) and read at every load. A verdict counts for exactly what it was taken on:
another driver, back end version, engine file or bundle is another combination.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from ..bundle.store import default_root
from ..runtime.base import DeviceInfo

MAX_FILE_BYTES = 1 << 20
"""A larger file is no verdict."""


class _Report(Protocol):
    """The part of `VerifyReport` that a verdict keeps."""

    samples: int
    mean_iou: float
    min_iou: float
    seconds: float
    problems: list[str]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VerdictKey(_Model):
    """What a verdict was taken on.

    Attributes:
        bundle: `Bundle.hash`.
        precision: Variant that ran.
        backend: Name of the back end.
        version: Its version.
        device: Name of the product, or ``cpu``.
        compute_capability: Of the device; empty where there is none.
        driver: Its driver's version; empty where there is none.
        engine: Files built on this machine that ran instead of the bundle's own; empty where there are none.
    """

    bundle: str
    precision: str
    backend: str
    version: str
    device: str
    compute_capability: str = ""
    driver: str = ""
    engine: str = ""

    @classmethod
    def of(
        cls, bundle_hash: str, precision: str, backend: str, version: str, info: DeviceInfo, engine: str = ""
    ) -> VerdictKey:
        """The key for a device as `Device.info` describes it."""
        return cls(
            bundle=bundle_hash,
            precision=precision,
            backend=backend,
            version=version,
            device=info.name if info.kind != "cpu" else f"cpu {info.extra.get('architecture', '')}".strip(),
            compute_capability=info.compute_capability or "",
            driver=info.driver or "",
            engine=engine,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, hexadecimal; the file's name."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class Verdict(_Model):
    """What the golden samples said.

    Attributes:
        key: What they ran on.
        passed: Whether every figure met its bar.
        forced: Whether it may be used although it failed (``pixano-edge verify --force``).
        problems: The figures that did not, in words.
        samples: Golden samples that ran.
        mean_iou: Over all masks, against PyTorch's.
        min_iou: Of the worst mask.
        seconds: What the check took.
        checked: When, in UTC.
    """

    key: VerdictKey
    passed: bool
    forced: bool = False
    problems: tuple[str, ...] = ()
    samples: int
    mean_iou: float
    min_iou: float
    seconds: float
    checked: datetime

    @classmethod
    def of(cls, key: VerdictKey, report: _Report, forced: bool = False) -> Verdict:
        """The verdict of a `VerifyReport`; `forced` counts only for one that failed."""
        return cls(
            key=key,
            passed=not report.problems,
            forced=forced and bool(report.problems),
            problems=tuple(report.problems),
            samples=report.samples,
            mean_iou=report.mean_iou,
            min_iou=report.min_iou,
            seconds=report.seconds,
            checked=datetime.now(timezone.utc).replace(microsecond=0),
        )

    def text(self) -> str:
        """One line for reasons and warnings."""
        figures = f"{self.samples} golden sample(s), mean mask IoU {self.mean_iou:.4f}, {self.checked:%Y-%m-%d}"
        return f"passed ({figures})" if self.passed else f"failed ({figures}): {'; '.join(self.problems)}"


def verdicts_root() -> Path:
    """Beside the folder of the bundles: ``$PIXANO_EDGE_HOME/verdicts`` or ``~/.local/share/pixano-edge/verdicts``."""
    return default_root().parent / "verdicts"


class VerdictStore:
    """Verdicts on disk. Any number of processes may use one folder: files are whole or absent.

    Args:
        root: Folder; `verdicts_root` if not given. Made when the first verdict is put.

    Attributes:
        warnings: Files that could not be read or written. A verdict that cannot be read counts as none.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else verdicts_root()
        self.warnings: list[str] = []

    def path(self, key: VerdictKey) -> Path:
        """File of the verdict on `key`."""
        return self.root / f"{key.digest}.json"

    def get(self, key: VerdictKey) -> Verdict | None:
        """The verdict on `key`, or None; a damaged file is a warning and None, so that the check runs again."""
        path = self.path(key)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
            verdict = Verdict.model_validate_json(path.read_bytes())
            if verdict.key != key:
                raise ValueError("it belongs to another combination")
        except FileNotFoundError:
            return None
        except ValidationError as error:  # a ValueError too, but its own text has many lines
            self._warn(f"The stored verdict '{path}' is damaged ({error.error_count()} error(s)); it is taken again.")
            return None
        except (OSError, ValueError) as error:
            self._warn(f"The stored verdict '{path}' cannot be used: {error}; it is taken again.")
            return None
        return verdict

    def put(self, verdict: Verdict) -> None:
        """Writes a verdict in one step, over an older one. A full or read-only disk is a warning only."""
        path = self.path(verdict.key)
        temporary: str | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".verdict-", dir=self.root)
            with os.fdopen(handle, "wb") as file:
                file.write((verdict.model_dump_json(indent=2) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            self._warn(f"The verdict could not be saved to '{path}': {error}; the next load takes it again.")
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
