"""Fixtures shared by all tests: real photos, a tiny seeded checkpoint and the bundle exported from it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import no_browser_reason
from tests.support.once import WORKER, once

ROOT = Path(__file__).resolve().parent.parent

if WORKER in os.environ:
    # Before torch and OpenBLAS are loaded, here and in processes that tests start: workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests where no CUDA device answers and browser tests where there is no browser, with the reason."""
    for mark, missing in (("gpu", _no_gpu_reason), ("browser", no_browser_reason)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = missing() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason() -> str | None:
    """Why no GPU test can run, None where CUDA itself (not NVML, which a Jetson may lack) sees a device."""
    from pixano_edge.engine.runtime.gpu_info import cuda_facts

    facts, reason = cuda_facts()
    return None if facts else reason or "no CUDA device on this machine"


@pytest.fixture(autouse=True)
def _own_verdicts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test verifies is remembered neither by the next test nor by the user's own store."""
    from pixano_edge.engine.models import verdicts

    root = tmp_path_factory.getbasetemp() / "verdicts" / uuid.uuid4().hex  # made when something is put there
    monkeypatch.setattr(verdicts, "verdicts_root", lambda: root)


@pytest.fixture(scope="session")
def bedroom() -> Path:
    """Folder of real 960x540 video frames ``00000.jpg``...; skips where they are not there."""
    data = Path(os.environ.get("PIXANO_EDGE_TEST_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "bedroom"
    if not (folder / "00000.jpg").is_file():
        pytest.skip(f"real photos are not here: set PIXANO_EDGE_TEST_DATA to a folder with bedroom/ ({data})")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny SAM 2 with seeded, sharpened random weights."""
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.tiny import make_tiny_checkpoint

    return once(tmp_path_factory, "checkpoints/tiny-sam2", make_tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (images alone, fp32 and fp16) of `tiny_checkpoint`; read-only, copy it before changing it."""
    from pixano_edge.export.sam2 import export_sam2

    return once(
        tmp_path_factory, "bundles/tiny-sam2", lambda folder: export_sam2(tiny_checkpoint, folder, image_only=True)
    )


@pytest.fixture(scope="session")
def tracking_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny SAM 2 whose memory matters in the masks."""
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.tiny import make_tracking_model, save_checkpoint

    return once(
        tmp_path_factory, "checkpoints/tracking-sam2", lambda folder: save_checkpoint(make_tracking_model(), folder)
    )


@pytest.fixture(scope="session")
def tracking_bundle(tracking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (images and video, fp32 and fp16) of `tracking_checkpoint`; read-only, copy it before changing it."""
    from pixano_edge.export.sam2 import export_sam2

    return once(
        tmp_path_factory, "bundles/tracking-sam2", lambda folder: export_sam2(tracking_checkpoint, folder, threads=1)
    )


@pytest.fixture(scope="session")
def tiny_vlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny SmolVLM with seeded, sharpened random weights."""
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.vlm import write_smolvlm

    return once(tmp_path_factory, "checkpoints/tiny-vlm", lambda folder: write_smolvlm(folder, "smolvlm"))


@pytest.fixture(scope="session")
def tiny_vlm_bundle(tiny_vlm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32) of `tiny_vlm_checkpoint`; read-only, copy it before changing it."""
    from pixano_edge.export.photos import Photo
    from pixano_edge.export.smolvlm import export_smolvlm
    from tests.support.vlm import picture, without_memory

    photos = [Photo(f"p{i}", picture(40 + 9 * i, 70, i)) for i in range(2)]

    def export(folder: Path) -> None:
        with without_memory():
            export_smolvlm(tiny_vlm_checkpoint, folder, variants=("fp32",), tokens=4, photos=photos, threads=1)

    return once(tmp_path_factory, "bundles/tiny-vlm", export)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny Qwen2.5-VL with seeded, sharpened random weights."""
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.vlm import write_qwen

    return once(tmp_path_factory, "checkpoints/tiny-qwen2.5-vl", write_qwen)


@pytest.fixture(scope="session")
def qwen_bundle(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32 and fp16) of `qwen_folder`; read-only. Memory is not measured: that takes a process per graph."""
    from pixano_edge.export.photos import Photo
    from pixano_edge.export.qwen2_5_vl import export_qwen_vl
    from tests.support.vlm import PICTURES, without_memory

    photos = [Photo(name, pixels) for name, pixels in PICTURES]

    def export(folder: Path) -> None:
        with without_memory():
            export_qwen_vl(qwen_folder, folder, photos=photos, questions=("What is on this image?",), threads=1)

    return once(tmp_path_factory, "bundles/qwen2.5-vl", export)


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The trained demo bundle that ships in the package."""
    folder = ROOT / "engine" / "assets" / "sam2-demo"
    if not (folder / "manifest.json").is_file():
        pytest.skip("the demo bundle is not in this tree")
    return folder


@pytest.fixture(scope="session")
def tiny_graphs(tracking_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any, Any]:
    """PyTorch model of `tracking_bundle`, folder of its fp32 graphs as ``NAME.onnx``, constants, video constants."""
    from tests.support.tracking import unpack_graphs

    return unpack_graphs(tracking_bundle, tmp_path_factory.mktemp("video-graphs"))


@pytest.fixture(scope="session")
def dino_model() -> Any:
    """A small Grounding DINO with seeded, sharpened weights, and its processor."""
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.grounding_dino import sharpened, small_config, small_processor

    return sharpened(small_config()), small_processor(shortest_edge=96, longest_edge=160)


@pytest.fixture(scope="session")
def small_dino(dino_model: Any, dino_checkpoint: Path, dino_bundle: Path) -> Any:
    """`dino_model` with its constants and the plain fp32 graphs of `dino_bundle`."""
    from pixano_edge.engine.bundle import Bundle
    from pixano_edge.export.grounding_dino.constants import read_constants
    from tests.support.grounding_dino import Exported

    model, processor = dino_model
    bundle = Bundle.open(dino_bundle)
    files = {name: bundle.graph_path(name, "fp32") for name in bundle.manifest.graphs}
    return Exported(model, processor, read_constants(model, dino_checkpoint), files)


def _owl_checkpoint(family: str, factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from tests.support.tiny_owl import make_model, save_checkpoint

    return once(factory, f"checkpoints/tiny-{family}", lambda folder: save_checkpoint(make_model(family), folder))


@pytest.fixture(scope="session")
def owl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny OWLv2 with seeded, sharpened random weights."""
    return _owl_checkpoint("owlv2", tmp_path_factory)


@pytest.fixture(scope="session")
def owlvit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a tiny OWL-ViT."""
    return _owl_checkpoint("owlvit", tmp_path_factory)


@pytest.fixture(scope="session")
def owl_bundle(owl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32 and fp16) of `owl_checkpoint`; read-only, copy it before changing it."""
    from pixano_edge.export.owlv2 import export_owl

    return once(tmp_path_factory, "bundles/tiny-owlv2", lambda folder: export_owl(owl_checkpoint, folder, threads=1))


@pytest.fixture(scope="session")
def owlvit_bundle(owlvit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32) of `owlvit_checkpoint`; read-only."""
    from pixano_edge.export.owlv2 import export_owl

    return once(
        tmp_path_factory,
        "bundles/tiny-owlvit",
        lambda folder: export_owl(owlvit_checkpoint, folder, "owlvit", variants=["fp32"], threads=1),
    )


@pytest.fixture(scope="session")
def dino_checkpoint(dino_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers folder of a small Grounding DINO."""

    def save(folder: Path) -> None:
        for part in dino_model:
            part.save_pretrained(folder)

    return once(tmp_path_factory, "checkpoints/small-dino", save)


@pytest.fixture(scope="session")
def dino_bundle(dino_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32) of `dino_checkpoint`; read-only."""
    from pixano_edge.export.grounding_dino import export_grounding_dino

    lists = [["a cat"], ["coffee cup", "spoon", "table"]]
    return once(
        tmp_path_factory,
        "bundles/small-dino",
        lambda folder: export_grounding_dino(dino_checkpoint, folder, variants=("fp32",), classes=lists, threads=1),
    )
