"""The whole export: what is in the bundle, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import ExportError, MissingDependencyError
from pixano_edge.export.sam2 import checkpoint, export_sam2, graphs, parity
from pixano_edge.export.sam2.export import default_name
from tests.support.stored import stored_graph


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Destination alone in its folder, so that leftovers are seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def export(*arguments: object) -> Result:
    """`pixano-edge export sam2 --image-only ...`, through the frame of the command."""
    return CliRunner().invoke(app, ["export", "sam2", "--image-only", *map(str, arguments)])


def nothing_left(output: Path) -> bool:
    return list(output.parent.iterdir()) == []


@pytest.fixture
def fast_export(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    """Graphs are taken from the tiny bundle instead of torch's exporter, which takes seconds per graph."""
    from pixano_edge.export import pipeline as export

    bundle = Bundle.open(tiny_bundle)
    monkeypatch.setattr(export, "export_graph", lambda module, spec, example: stored_graph(bundle, spec))


def test_bundle_says_what_it_is(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.family == "sam2"
    assert manifest.source.architecture == "sam2.1-hiera-custom"
    assert manifest.licence.spdx == "Apache-2.0"
    assert {"torch", "transformers", "onnx", "onnxruntime", "pixano-edge"} <= set(manifest.tools)
    assert set(manifest.graphs) == {"image_encoder", "mask_decoder"}
    for graph in manifest.graphs.values():
        assert {v.precision for v in graph.variants.values()} == {"fp32", "fp16"}
        assert all(v.opset == 18 and v.nodes > 100 and v.parameters > 10_000 for v in graph.variants.values())
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert len(manifest.parity.tensors) == 30
    assert set(manifest.cpu_graphs) == {"image_prepare", "mask_prepare", "click_decoder"}
    assert all(v.onnxruntime_only and v.precision == "fp32" for v in manifest.cpu_graphs.values())
    # The fp32 files are those that TensorRT takes.
    measured = ("fp32", "fp16", "fp16-cpu", "fp16-tensorrt", "fp32-cpu")
    assert {m.variant: m.images for m in manifest.parity.masks} == dict.fromkeys(measured, 2)
    assert manifest.parity.reference.startswith("transformers ")
    assert all("/" not in name for name in manifest.parity.inputs)
    # A finding of the TensorRT 10.3 check would be a note.
    assert not any("TensorRT" in note for note in manifest.notes)


def test_bundle_names_its_pictures_and_their_licence(tiny_bundle: Path) -> None:
    pytest.importorskip("skimage", reason="the photos come with pixano-edge[export]")
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.parity is not None
    assert manifest.parity.inputs == ["skimage-coffee-599x399", "skimage-chelsea-263x299"]
    for sample, author in zip(manifest.golden, ("Rachel Michetti", "Stefan van der Walt")):
        (note,) = [n for n in manifest.notes if n.startswith(sample.image)]
        assert f"{author}, CC0-1.0" in note


@pytest.mark.usefixtures("fast_export")
def test_photos_progress_and_variants(tiny_checkpoint: Path, output: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (70, 111, 3), np.uint8)).save(tmp_path / "grey.png")
    steps: list[tuple[str, int, int]] = []
    export_sam2(
        tiny_checkpoint,
        output,
        name="my-model",
        variants=["fp32"],
        photos=[tmp_path / "grey.png"],
        progress=lambda name, done, total: steps.append((name, done, total)),
        threads=1,
        image_only=True,
    )
    manifest = Bundle.open(output).manifest
    assert manifest.name == "my-model"
    assert manifest.parity is not None
    assert manifest.parity.inputs == ["grey.png"]
    assert any("grey.png" in note and "user's own picture" in note for note in manifest.notes)
    assert {v for g in manifest.graphs.values() for v in g.variants} == {"fp32", "fp32-tensorrt"}
    assert [done for _, done, _ in steps] == list(range(steps[0][2]))
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.usefixtures("fast_export")
def test_json_has_everything_and_nothing_else_on_stdout(tiny_checkpoint: Path, output: Path) -> None:
    result = export(tiny_checkpoint, "-o", output, "--variants", "fp32", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    manifest = Bundle.open(output).manifest
    assert answer["bundle"] == str(output)
    assert answer["architecture"] == manifest.source.architecture
    assert answer["licence"] == manifest.licence.model_dump()
    assert answer["variants"] == ["fp32"]
    assert answer["parity"] == json.loads(manifest.model_dump_json())["parity"]
    assert answer["warnings"] == []
    assert answer["notes"] == manifest.notes
    again = export(tiny_checkpoint, "-o", output, "--json")
    assert again.exit_code == 1
    error = json.loads(again.stdout)["error"]
    assert error["type"] == "ExportError"
    assert error["message"]
    assert error["action"]


@pytest.mark.usefixtures("fast_export")
def test_operator_findings_are_notes_and_warnings(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.export import pipeline as module

    monkeypatch.setattr(module, "check_tensorrt_10_3", lambda model: ["Gelu 'act': not known"])
    result = export(tiny_checkpoint, "-o", output, "--variants", "fp32")
    assert result.exit_code == 0, result.output
    findings = [f"TensorRT 10.3: fp32 {graph}: Gelu 'act': not known" for graph in ("image_encoder", "mask_decoder")]
    assert [n for n in Bundle.open(output).manifest.notes if "TensorRT" in n] == findings
    for finding in findings:
        assert f"Warning: {finding}" in result.stderr
        assert finding not in result.stdout
    answer = json.loads(export(tiny_checkpoint, "-o", output, "--variants", "fp32", "--force", "--json").stdout)
    assert answer["warnings"] == findings
    assert not set(answer["notes"]) & set(findings)


@pytest.mark.usefixtures("fast_export")
def test_unknown_licence_is_a_warning(tiny_checkpoint: Path, output: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(tiny_checkpoint, tmp_path / "no-card", ignore=shutil.ignore_patterns("README.md"))
    result = export(copy, "-o", output, "--variants", "fp32")
    assert result.exit_code == 0, result.output
    assert "Warning: The licence of the weights is unknown." in result.stderr


@pytest.mark.usefixtures("fast_export")
def test_command_prints_licence_and_parity(tiny_checkpoint: Path, output: Path) -> None:
    result = export(tiny_checkpoint, "-o", output, "--variants", "fp32", "--licence", "CC-BY-4.0")
    assert result.exit_code == 0, result.output
    assert "CC-BY-4.0" in result.output
    assert "image_embed" in result.output
    assert "mean IoU" in result.output
    assert "Parity: passed" in result.output
    again = export(tiny_checkpoint, "-o", output)
    assert again.exit_code == 1
    assert "Error:" in again.output
    assert Bundle.open(output).manifest.licence.spdx == "CC-BY-4.0"


def test_failing_parity_leaves_no_bundle_and_exits_non_zero(
    tiny_checkpoint: Path, tiny_bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real export of a wrong wrapper: the no-memory embedding is not added. The decoder is the tiny bundle's."""
    import onnx

    from pixano_edge.export import pipeline as module

    real = module.export_graph
    decoder = onnx.load(Bundle.open(tiny_bundle).graph_path("mask_decoder"))
    monkeypatch.setattr(
        module, "export_graph", lambda m, spec, x: decoder if spec.name == "mask_decoder" else real(m, spec, x)
    )

    class Forgetful(graphs.ImageEncoder):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.no_memory.zero_()

    monkeypatch.setattr(graphs, "ImageEncoder", Forgetful)
    result = export(tiny_checkpoint, "-o", output, "--variants", "fp32")
    assert result.exit_code == 1
    assert "image_encoder.image_embed: relative error" in result.output
    assert "Parity: FAILED" in result.output
    assert nothing_left(output)


@pytest.mark.usefixtures("fast_export")
def test_failing_fp16_alone_suggests_fp32(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "FP16_MEAN_IOU", 1.1)
    with pytest.raises(parity.ParityError, match="fp16 masks") as error:
        export_sam2(tiny_checkpoint, output, threads=1, image_only=True)
    assert "--variants fp32" in error.value.action
    assert nothing_left(output)


@pytest.mark.usefixtures("fast_export")
def test_full_disk(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix == ".onnx":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"(?i)space|full"):
        export_sam2(tiny_checkpoint, output, image_only=True)
    assert nothing_left(output)


def test_taken_destination_is_found_before_any_work(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("loaded first"))
    with pytest.raises(ExportError):
        export_sam2(tiny_checkpoint, tiny_bundle)
    assert Bundle.open(tiny_bundle).manifest.family == "sam2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "int8"], "int8"),
        (["--variants", "fp16"], "Use fp32"),
        (["--name", "a b/c"], "not a bundle name"),
        (["--photos", "/nowhere"], "not a folder"),
    ],
)
def test_bad_options(options: list[str], message: str, tiny_checkpoint: Path, output: Path) -> None:
    result = export(tiny_checkpoint, "-o", output, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert nothing_left(output)


def test_missing_checkpoint(output: Path) -> None:
    result = export("no.pt", "-o", output)
    assert result.exit_code == 1
    assert "no checkpoint" in result.output
    assert "Traceback" not in result.output
    assert nothing_left(output)


@pytest.mark.parametrize(
    ("module", "extras"), [("transformers", "export"), ("onnxscript", "export"), ("onnxruntime", "export,cpu")]
)
def test_missing_extra_prints_its_install_line(
    module: str, extras: str, monkeypatch: pytest.MonkeyPatch, output: Path
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else real(n, *a))
    result = export("facebook/sam2.1-hiera-tiny", "-o", output)
    assert result.exit_code == 1
    assert f"'{module}'" in result.output
    assert f"pip install 'pixano-edge[{extras}]'" in result.output


def test_export_without_onnx_runtime_names_the_extra_that_brings_one(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    from pixano_edge.export.fp16 import to_fp16

    file = Bundle.open(tiny_bundle).graph_path("mask_decoder")
    for module in ("onnxruntime", "onnxruntime.transformers", "onnxruntime.transformers.float16"):
        monkeypatch.setitem(sys.modules, module, None)
    for act in (lambda: to_fp16(onnx.load(file)), lambda: parity.onnx_runner({"mask_decoder": file})):
        with pytest.raises(MissingDependencyError) as caught:
            act()
        assert caught.value.action == "Install it with: pip install 'pixano-edge[export,cpu]'"


def test_command_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from typer.testing import CliRunner\n"
        "from pixano_edge.export import cli\n"
        "result = CliRunner().invoke(cli.app, ['sam2', '--help'])\n"
        "assert result.exit_code == 0 and '--variants' in result.output, result.output\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("facebook/sam2.1-hiera-tiny", "sam2.1-hiera-tiny"),
        ("sam2.1_hiera_tiny.pt", "sam2.1_hiera_tiny"),
        ("weird name!.pth", "weird-name"),
        ("___", "sam2"),
    ],
)
def test_default_name(given: str, name: str) -> None:
    assert default_name(given) == name
