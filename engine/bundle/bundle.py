"""Opening a bundle: schema, structure and hashes are checked before anything is used."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, StrictInt, ValidationError

from ..contracts import grounding_dino, owlv2, qwen2_5_vl, sam2, sam2_video, smolvlm
from ..contracts.base import GraphSpec
from ..errors import BundleError, ContractError
from .engines import ENGINES_FOLDER, INDEX_NAME, EngineIndex, read_index
from .files import ZIP_ERRORS, check_names, hash_file, list_files, os_errors
from .manifest import SCHEMA_VERSION, FileEntry, GoldenSample, Manifest
from .names import MANIFEST_NAME, MAX_MANIFEST_BYTES, PRECISIONS

MAX_NPZ_BYTES = 1 << 30
"""Most bytes one ``.npz`` may hold once unpacked."""

_REPAIR = "Copy or download the bundle again, or export it again."
_REBUILD = f"Remove the folder '{ENGINES_FOLDER}', or build: pixano-edge build <bundle> --bundle-engines"
_NEWER = "Install a newer pixano-edge: pip install --upgrade pixano-edge"


# Family -> its graphs for the constants in a manifest. ContractError when the constants do not fit.
_FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, GraphSpec]]] = {
    sam2.FAMILY: sam2_video.family_graphs,
    **dict.fromkeys(owlv2.FAMILIES, owlv2.family_graphs),
    grounding_dino.FAMILY: grounding_dino.family_graphs,
    smolvlm.FAMILY: smolvlm.family_graphs,
    qwen2_5_vl.FAMILY: qwen2_5_vl.family_graphs,
}
# Families whose bundles may have graphs for ONNX Runtime's CPU provider alone: the same, with all there can be.
_CPU: dict[str, Callable[[dict[str, Any]], dict[str, GraphSpec]]] = {sam2.FAMILY: sam2_video.cpu_graphs}
# Families whose graphs look different from outside by precision and target: the same, with both.
_VARIED: dict[str, Callable[[dict[str, Any], str, str], dict[str, GraphSpec]]] = {
    smolvlm.FAMILY: smolvlm.family_graphs,
    qwen2_5_vl.FAMILY: qwen2_5_vl.family_graphs,
}


class Bundle:
    """A folder of graphs with its manifest, opened read-only. Make it with `Bundle.open`.

    Attributes:
        root: The folder.
        manifest: What the bundle says about itself.
        hash: SHA-256 of the manifest's bytes. The manifest holds the hash of every other file, so this changes
            when anything changes.
        specs: The contract of each graph of the family, by graph name; of its fp32 ONNX variants where they differ.
        engines: Index of the engines that travel with it, or None.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        digest: str,
        specs: dict[str, GraphSpec],
        engines: EngineIndex | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.hash = digest
        self.specs = specs
        self.engines = engines

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Opens the bundle in folder `path`.

        Args:
            path: The folder.
            verify: Also hash every file. Without it, only names and sizes are compared with the manifest.

        Raises:
            BundleError: No bundle there, half-written, damaged, truncated, files missing or not listed, made for a
                newer version, or not fitting the family's contract.
        """
        root = Path(path).expanduser()
        if root.is_file():
            raise BundleError(
                f"'{root}' is a file, not a bundle folder.", f"Unpack it with: pixano-edge bundle unpack {root}"
            )
        if not root.is_dir():
            raise BundleError(
                f"There is no bundle at '{root}'.", "Check the path, or make one with pixano-edge export."
            )
        file = root / MANIFEST_NAME
        if not file.is_file():
            raise BundleError(
                f"'{root}' has no {MANIFEST_NAME}: it is not a bundle, or its writing was interrupted.", _REPAIR
            )
        with os_errors(f"reading '{file}'"):
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"'{file}' is larger than {MAX_MANIFEST_BYTES} bytes.", _REPAIR)
            data = file.read_bytes()
        manifest = parse_manifest(data)
        specs = check_manifest(manifest)
        digest = hashlib.sha256(data).hexdigest()
        engines = None if INDEX_NAME in manifest.files else read_index(root, digest, (MANIFEST_NAME, *manifest.files))
        with os_errors(f"reading '{root}'"):
            _check_files(root, manifest, engines, verify)
        return cls(root, manifest, digest, specs, engines)

    def contents(self) -> list[str]:
        """POSIX paths of every file that belongs to the bundle: manifest, its files, engines and their index."""
        engines = [INDEX_NAME, *sorted(self.engines.engines)] if self.engines is not None else []
        return [MANIFEST_NAME, *sorted(self.manifest.files), *engines]

    def graph_path(self, graph: str, variant: str = "fp32", target: str = "onnx") -> Path:
        """File of one graph.

        Args:
            graph: Name in the family's contract.
            variant: Name of the variant in the manifest, or its precision.
            target: ``onnx`` or ``tensorrt``.

        Raises:
            BundleError: There is none; lists what exists.
        """
        found = self.manifest.graphs.get(graph)
        if found is None:
            raise BundleError(
                f"Bundle '{self.manifest.name}' has no graph '{graph}'.", f"Known: {sorted(self.manifest.graphs)}."
            )
        fitting = {k: v for k, v in found.variants.items() if v.target == target and variant in (k, v.precision)}
        if not fitting:
            known = sorted(f"{k} ({v.precision}, {v.target})" for k, v in found.variants.items())
            raise BundleError(
                f"Graph '{graph}' of bundle '{self.manifest.name}' has no variant '{variant}' for {target}.",
                f"Known: {', '.join(known)}.",
            )
        chosen = fitting.get(variant) or next(iter(fitting.values()))
        return self.root / chosen.file

    def spec(self, graph: str, precision: str = "fp32", target: str = "onnx") -> GraphSpec:
        """The contract of one graph as variants of a precision and target have it; raises KeyError for no graph.

        It is `specs` for most families. A decoder's cache has the type of the precision, and for TensorRT, where
        outputs cannot be inputs, other dimensions.
        """
        varied = _VARIED.get(self.manifest.family)
        return self.specs[graph] if varied is None else varied(self.manifest.constants, precision, target)[graph]

    def cpu_graph(self, graph: str) -> tuple[Path, GraphSpec] | None:
        """File and contract of a graph that ONNX Runtime's CPU provider runs in fp32; None where there is none."""
        found = self.manifest.cpu_graphs.get(graph)
        if found is None:
            return None
        return self.root / found.file, _CPU[self.manifest.family](self.manifest.constants)[graph]

    def weight_bytes(self, file: Path) -> int | None:
        """Bytes of the weights of a graph's file once loaded; None where the size of the file says it."""
        held = [v for graph in self.manifest.graphs.values() for v in graph.variants.values()]
        held += self.manifest.cpu_graphs.values()
        return max((v.weight_bytes for v in held if self.root / v.file == file and v.weight_bytes), default=None)

    def variants(self) -> list[str]:
        """Precisions that every graph has as plain ONNX, from full to reduced."""
        held = [
            {v.precision for v in graph.variants.values() if v.target == "onnx"}
            for graph in self.manifest.graphs.values()
        ]
        return [p for p in PRECISIONS if all(p in precisions for precisions in held)]

    def file(self, rel: str) -> Path:
        """Path of a file that the manifest lists; raises BundleError for any other name."""
        if rel not in self.manifest.files:
            raise BundleError(
                f"Bundle '{self.manifest.name}' lists no file '{rel}'.", f"Known: {sorted(self.manifest.files)}."
            )
        return self.root / rel

    def load_npz(self, rel: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays of an ``.npz`` file of the bundle, as new arrays that the caller owns. Never unpickles.

        Raises:
            BundleError: Not listed, not an ``.npz``, larger than `MAX_NPZ_BYTES` unpacked, or with pickled objects.
        """
        path = self.file(rel)
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(info.file_size for info in archive.infolist()) > MAX_NPZ_BYTES:
                    raise BundleError(
                        f"'{rel}' unpacks to more than {MAX_NPZ_BYTES} bytes.", "Export the bundle again."
                    )
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except MemoryError as error:  # a damaged header can ask for any size
            raise BundleError(f"'{rel}' is damaged, or there is not enough memory to read it.", _REPAIR) from error
        except (*ZIP_ERRORS, OSError, SyntaxError, KeyError) as error:
            raise BundleError(f"'{rel}' cannot be read as arrays: {error}", _REPAIR) from error

    def golden(self) -> list[GoldenSample]:
        """Samples with reference outputs, for checking a device without PyTorch."""
        return list(self.manifest.golden)


class _Version(BaseModel):
    """The one field read before the rest, since a newer schema need not fit this version's models."""

    schema_version: StrictInt


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        BundleError: Not JSON, of a newer or unknown schema, or with fields missing, unknown or of the wrong type.
    """
    try:
        version = _Version.model_validate_json(data).schema_version
    except ValidationError as error:
        raise BundleError(f"{MANIFEST_NAME} is not a manifest: {_problems(error)}", _REPAIR) from error
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"The bundle has schema version {version}, this pixano-edge reads up to {SCHEMA_VERSION}.", _NEWER
        )
    if version < 1:
        raise BundleError(f"The bundle has schema version {version}, which never existed.", _REPAIR)
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST_NAME} is not valid: {_problems(error)}", _REPAIR) from error


def check_manifest(manifest: Manifest) -> dict[str, GraphSpec]:
    """Checks what needs no file: names, family, constants, graphs and references. Returns the graphs' contracts.

    Raises:
        BundleError: With the first thing that does not fit.
    """
    check_names((MANIFEST_NAME, *manifest.files))
    if manifest.family not in _FAMILIES:
        raise BundleError(
            f"Bundle '{manifest.name}' is of the family '{manifest.family}'; this version knows {sorted(_FAMILIES)}.",
            _NEWER,
        )
    try:
        specs = _FAMILIES[manifest.family](manifest.constants)
    except ContractError as error:
        raise BundleError(f"Bundle '{manifest.name}': {error.message}", error.action) from error
    _check_processing(manifest)
    if missing := sorted(set(specs) - set(manifest.graphs)):
        raise BundleError(f"Bundle '{manifest.name}' lacks the graphs {missing}.", "Export it again.")
    if unknown := sorted(set(manifest.graphs) - set(specs)):
        raise BundleError(
            f"Bundle '{manifest.name}' holds the graphs {unknown}, which its constants do not describe.", _NEWER
        )
    known = _CPU[manifest.family](manifest.constants) if manifest.family in _CPU else {}
    if unknown := sorted(set(manifest.cpu_graphs) - set(known)):
        raise BundleError(f"Bundle '{manifest.name}' holds the CPU graphs {unknown}, which are not known here.", _NEWER)
    referenced: dict[str, tuple[str, ...]] = {
        f"golden sample '{s.name}'": (s.image, s.tensors)
        for s in (*manifest.golden, *([manifest.golden_clip] if manifest.golden_clip else []))
    }
    for name, graph in manifest.graphs.items():
        if not graph.variants:
            raise BundleError(f"Graph '{name}' of bundle '{manifest.name}' has no variant.", "Export it again.")
        referenced |= {f"graph '{name}' variant '{k}'": (v.file,) for k, v in graph.variants.items()}
    referenced |= {f"CPU graph '{name}'": (v.file,) for name, v in manifest.cpu_graphs.items()}
    for owner, files in referenced.items():
        for file in files:
            if file not in manifest.files:
                raise BundleError(
                    f"The {owner} of bundle '{manifest.name}' names '{file}', which the manifest does not list.",
                    "Export it again.",
                )
    _check_memory(manifest)
    _check_calibrations(manifest)
    return specs


def _check_calibrations(manifest: Manifest) -> None:
    told = [(entry.variant, entry.metric) for entry in manifest.calibrations]
    for entry in manifest.calibrations:
        lacking = [
            g for g in entry.graphs if g not in manifest.graphs or entry.variant not in manifest.graphs[g].variants
        ]
        if lacking or not entry.graphs or told.count((entry.variant, entry.metric)) > 1:
            raise BundleError(
                f"The calibration '{entry.variant}' of bundle '{manifest.name}' is listed twice, or of graphs that do "
                f"not have it: {lacking}.",
                "Calibrate it again.",
            )
        if entry.report is not None and entry.report not in manifest.files:
            raise BundleError(
                f"The calibration '{entry.variant}' of bundle '{manifest.name}' names '{entry.report}', which the "
                "manifest does not list.",
                "Calibrate it again.",
            )


def _check_memory(manifest: Manifest) -> None:
    known = {(graph, variant) for graph, entry in manifest.graphs.items() for variant in entry.variants}
    told = [(entry.graph, entry.variant) for entry in manifest.memory]
    if strange := sorted(set(told) - known) or sorted({pair for pair in told if told.count(pair) > 1}):
        raise BundleError(
            f"The memory figures of bundle '{manifest.name}' name {strange[:3]}, which it does not have or has twice.",
            "Export it again.",
        )


def _check_processing(manifest: Manifest) -> None:
    """The manifest says image size, mean and std twice: in the contract's constants and in plain words."""
    plain = {**manifest.preprocess.model_dump(), **manifest.postprocess.model_dump()}
    for key, value in manifest.constants.items():
        if key not in plain:
            continue
        said, listed = plain[key], isinstance(value, (list, tuple))
        if said != (tuple(value) if listed else value):
            raise BundleError(
                f"Bundle '{manifest.name}' contradicts itself: {key} is {value} in constants, {said} in processing.",
                "Export it again.",
            )


def _check_files(root: Path, manifest: Manifest, engines: EngineIndex | None, verify: bool) -> None:
    listed: dict[str, FileEntry] = {**manifest.files, **(engines.engines if engines is not None else {})}
    present = set(list_files(root)) - ({MANIFEST_NAME} if engines is None else {MANIFEST_NAME, INDEX_NAME})
    if missing := sorted(set(listed) - present):
        raise BundleError(f"Bundle '{manifest.name}' lacks the files {missing[:5]}.", _REPAIR)
    if extra := sorted(present - set(listed)):
        raise BundleError(
            f"The folder of bundle '{manifest.name}' holds files that its manifest does not list: {extra[:5]}.",
            "Remove them if you put them there; otherwise get the bundle again from a source you trust.",
        )
    for rel, entry in listed.items():
        repair = _REPAIR if rel in manifest.files else _REBUILD
        size = (root / rel).stat().st_size
        if size != entry.size:
            kind = "truncated" if size < entry.size else "damaged"
            raise BundleError(f"'{root / rel}' is {kind}: {size} bytes instead of {entry.size}.", repair)
        if verify and hash_file(root / rel) != entry.sha256:
            raise BundleError(f"'{root / rel}' is damaged: its SHA-256 differs from the manifest's.", repair)


def _problems(error: ValidationError) -> str:
    """The first problems on one line; pydantic's own text has links and several lines per problem."""
    found = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more + "."
