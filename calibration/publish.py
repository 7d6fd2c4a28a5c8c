"""Adding a calibrated variant to a bundle: everything is written beside it and takes its place in one rename.

A graph that the variant does not change runs the fp32 file under the variant's name, so that every graph has the
variant and nothing is stored twice. What a changed graph kept in float it takes from the fp32 file (`share_weights`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from pixano_edge.engine.bundle import Bundle, BundleWriter
from pixano_edge.engine.bundle.manifest import CalibrationEntry, GraphMemory, GraphVariant
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.graph_sizes import count_parameters, weight_bytes
from pixano_edge.export.shared_weights import share_weights

from .work import NewGraph

FULL, SUFFIX = "fp32", "-tensorrt"


def check_scales(graph: str, model: onnx.ModelProto) -> list[str]:
    """What is wrong with the scales of a quantised graph, in words: zero, negative or not finite."""
    constants = {t.name: t for t in model.graph.initializer}
    problems = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            continue
        tensor = constants.get(node.input[1])
        if tensor is None:
            problems.append(f"{graph}: the scale '{node.input[1]}' is not a constant")
            continue
        scale = numpy_helper.to_array(tensor).astype(np.float64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            wrong = scale.reshape(-1)[~(np.isfinite(scale) & (scale > 0)).reshape(-1)][0]
            problems.append(f"{graph}: the scale '{node.input[1]}' is {wrong}")
    return problems


def publish(
    bundle: Bundle,
    destination: Path,
    variant: str,
    precision: str,
    graphs: Mapping[str, NewGraph],
    entry: CalibrationEntry,
    reports: Mapping[str, bytes],
    *,
    considered: Collection[str] = (),
    memory: Sequence[GraphMemory] = (),
    replace: bool = False,
) -> Bundle:
    """Writes the bundle with a variant more, or with another one of that name.

    Engines that travelled with the bundle are left out: they were built from the old one.

    Args:
        bundle: Where the graphs come from; left as it is unless it lies at `destination`.
        destination: Folder of the result; the bundle's own replaces it in one step.
        variant: Key in the manifest.
        precision: Of the variant.
        graphs: The graphs that change.
        entry: What the manifest says of the calibration.
        reports: Files to add, by their path in the bundle; older ones of the same path are replaced.
        considered: Graphs that might have changed; those that did not run fp32, whatever an earlier calibration said.
        memory: Of the graphs that change; graphs that run fp32's file have its figures.
        replace: Also replace a variant that was exported; its files, where no other graph needs them, and its parity
            figures go with it.

    Returns:
        The bundle at `destination`, opened and checked.

    Raises:
        CalibrationError: A scale is broken; or the variant is one that was exported, without `replace`.
        BundleError: The disk is full, or `destination` is taken by something else. The old bundle is whole then.
    """
    models = {name: _read(graph) for name, graph in graphs.items()}
    forms = {name: onnx.load(str(graph.tensorrt)) for name, graph in graphs.items() if graph.tensorrt is not None}
    if problems := [p for name, model in (*models.items(), *forms.items()) for p in check_scales(name, model)]:
        raise CalibrationError(f"The variant is broken: {'; '.join(problems[:3])}.", "Calibrate on real data.")
    manifest = bundle.manifest
    if taken := name_taken(bundle, variant, replace):
        raise CalibrationError(taken, "Give --replace to put the new one in its place, or another --name.")
    exported = was_exported(bundle, variant)
    held = {name: dict(graph.variants) for name, graph in manifest.graphs.items()}
    changed = {*graphs, *considered}
    old = [held[name].pop(v) for name in changed for v in (variant, variant + SUFFIX) if v in held[name]]
    staying = {v.file for variants in held.values() for v in variants.values()}
    staying |= {graph.file for graph in manifest.cpu_graphs.values()}
    needed = staying | _weights_of(bundle, staying)
    free = {v.file for v in old} | _weights_of(bundle, (v.file for v in old))
    free -= needed
    files = {name: _file(name, variant, graph, set(manifest.files) - free) for name, graph in graphs.items()}
    for_tensorrt = {name: _for_tensorrt(files[name]) for name in forms}
    beside = {f"graphs/{path.name}": path for graph in graphs.values() for path in graph.beside}
    if clash := sorted(needed.intersection(beside)):
        raise CalibrationError(f"Another variant of '{manifest.name}' needs '{clash[0]}'.", "Give another --name.")
    kept = [known for known in manifest.calibrations if not _outdated(known, entry, changed)]
    dropped = {known.report for known in manifest.calibrations if known not in kept} - {None}
    gone = {*files.values(), *for_tensorrt.values(), *beside, *reports, *dropped, *free}
    destination = destination.expanduser().resolve()
    with BundleWriter(destination, overwrite=destination == bundle.root.resolve()) as writer:
        for file in manifest.files:
            if file not in gone:
                writer.add_file(file, bundle.file(file))
        for file, source in beside.items():
            writer.add_file(file, source)
        for name, graph in graphs.items():
            if graph.entry is not None:
                writer.add_file(files[name], graph.path)
                held[name][variant] = graph.entry.model_copy(update={"file": files[name]})
            else:
                holders = dict.fromkeys(held[name][v].file for v in ("fp32", "fp16") if v in held[name])
                shared = share_weights(models[name], *(writer.root / file for file in holders if file not in gone))
                writer.add_file(files[name], shared.model.SerializeToString(deterministic=True))
                held[name][variant] = _entry(models[name], files[name], precision)
        for name, form in forms.items():
            # Its int8 weights are those of the file above, byte by byte.
            holders = dict.fromkeys((files[name], *(held[name][v].file for v in ("fp32", "fp16") if v in held[name])))
            shared = share_weights(form, *(writer.root / file for file in holders if file not in gone - {files[name]}))
            writer.add_file(for_tensorrt[name], shared.model.SerializeToString(deterministic=True))
            entry_of = _entry(form, for_tensorrt[name], precision)
            held[name][variant + SUFFIX] = entry_of.model_copy(update={"target": "tensorrt"})
        foreign = any(_lacks_form(variants, variant) for variants in held.values())
        for variants in held.values():
            _fall_back(variants, variant, precision, foreign)
        if not foreign and any(variant in v and v[variant].onnxruntime_only for v in held.values()):
            # A graph of it has a form of its own for TensorRT; the others must say what they have for it, too.
            for variants in held.values():
                _serve_tensorrt(variants, variant)
        for path, content in reports.items():
            writer.add_file(path, content)
        fields = manifest.model_dump(exclude={"schema_version", "files"})
        fields["graphs"] = {name: {"variants": variants} for name, variants in held.items()}
        fields["calibrations"] = [known.model_dump() for known in (*kept, entry)]
        # Figures of older files say nothing of the new ones.
        figures = [m for m in manifest.memory if m.variant != variant or m.graph not in changed]
        fields["memory"] = [m.model_dump() for m in (*figures, *memory, *_as_fp32(figures, held, variant))]
        if exported and fields["parity"] is not None:
            for key in ("tensors", "masks", "clips", "detections", "generations"):
                fields["parity"][key] = [figure for figure in fields["parity"][key] if figure["variant"] != variant]
        writer.finish(fields)
    return Bundle.open(destination)


def name_taken(bundle: Bundle, variant: str, replace: bool) -> str:
    """Why no calibrated variant of this name may be written, in words; empty where one may."""
    if variant == FULL or variant.endswith(SUFFIX):
        return f"A calibrated variant cannot be named '{variant}'."
    if was_exported(bundle, variant) and not replace:
        return f"Bundle '{bundle.manifest.name}' has a variant '{variant}' that was exported, not calibrated."
    return ""


def was_exported(bundle: Bundle, variant: str) -> bool:
    """Whether the bundle has a variant of this name that no calibration made."""
    if any(known.variant == variant for known in bundle.manifest.calibrations):
        return False
    return any(variant in held.variants for held in bundle.manifest.graphs.values())


def _file(graph: str, variant: str, new: NewGraph, taken: Collection[str]) -> str:
    """Where a graph goes: never over a file whose weights others use."""
    name, number = f"graphs/{graph}.{variant}.onnx", 1
    while (name in taken or (new.tensorrt is not None and _for_tensorrt(name) in taken)) and not new.beside:
        end = f"-{number}" if number > 1 else ""
        name, number = f"graphs/{graph}.{variant}.calibrated{end}.onnx", number + 1
    return name


def _for_tensorrt(file: str) -> str:
    """Where the form of a graph for TensorRT goes."""
    return f"{file.removesuffix('.onnx')}.tensorrt.onnx"


def _weights_of(bundle: Bundle, files: Iterable[str]) -> set[str]:
    """Other files of a bundle that hold weights of some graphs, by their path in it."""
    found = set()
    for file in files:
        for tensor in onnx.load(str(bundle.file(file)), load_external_data=False).graph.initializer:
            places = {e.value for e in tensor.external_data if e.key == "location"}
            found |= {Path(file).with_name(place).as_posix() for place in places}
    return found


def _as_fp32(
    figures: Iterable[GraphMemory], held: Mapping[str, Mapping[str, GraphVariant]], variant: str
) -> list[GraphMemory]:
    """Figures of the graphs that run fp32's file under the variant's name."""
    known = {m.graph for m in figures if m.variant == variant}
    return [
        m.model_copy(update={"variant": variant})
        for m in figures
        if m.variant == FULL and m.graph not in known and held[m.graph][variant].file == held[m.graph][FULL].file
    ]


def _read(graph: NewGraph) -> onnx.ModelProto:
    """The graph; with its weights unless they lie in files of their own."""
    return onnx.load(str(graph.path), load_external_data=not graph.beside)


def _outdated(known: CalibrationEntry, entry: CalibrationEntry, changed: set[str]) -> bool:
    """Whether an earlier calibration of the variant was judged with graphs that are others now, or by this metric."""
    if known.variant != entry.variant:
        return False
    return known.metric == entry.metric or not changed.isdisjoint(known.graphs)


def _entry(model: onnx.ModelProto, file: str, precision: str) -> GraphVariant:
    opset = next(o.version for o in model.opset_import if not o.domain)
    foreign = any(node.domain not in ("", "ai.onnx") for node in model.graph.node)
    return GraphVariant(
        file=file,
        precision=precision,  # type: ignore[arg-type]  # checked when it is made
        opset=opset,
        nodes=len(model.graph.node),
        parameters=count_parameters(model),
        weight_bytes=weight_bytes(model),
        onnxruntime_only=foreign,
    )


def _lacks_form(variants: Mapping[str, GraphVariant], variant: str) -> bool:
    """Whether a changed graph has operators of ONNX Runtime's own and no other form: nothing of its variant is built
    then, for its graphs run together."""
    held = variants.get(variant)
    if held is None or (FULL in variants and held.file == variants[FULL].file):
        return False
    return held.onnxruntime_only and variant + SUFFIX not in variants


def _fall_back(variants: dict[str, GraphVariant], variant: str, precision: str, foreign: bool) -> None:
    """Gives a graph that has no file of the variant the fp32 one, and for TensorRT the one that was changed for it.

    One that runs fp32's since an earlier calibration is told anew whether it can be built.
    """
    if variant in variants and (FULL not in variants or variants[variant].file != variants[FULL].file):
        return
    variants.pop(variant + SUFFIX, None)
    for source, name in ((FULL, variant), (FULL + SUFFIX, variant + SUFFIX)):
        if source in variants and not (foreign and name != variant):
            told = {"precision": precision, "onnxruntime_only": foreign or variants[source].onnxruntime_only}
            variants[name] = variants[source].model_copy(update=told)


def _serve_tensorrt(variants: dict[str, GraphVariant], variant: str) -> None:
    """Marks a changed graph as made for TensorRT where fp32's plain file serves there as it is."""
    full, prepared, changed = variants.get(FULL), variants.get(FULL + SUFFIX), variants.get(variant)
    if full is None or prepared is None or changed is None or variant + SUFFIX in variants:
        return
    if prepared.file == full.file and not changed.onnxruntime_only:
        variants[variant + SUFFIX] = changed.model_copy(update={"target": "tensorrt"})
