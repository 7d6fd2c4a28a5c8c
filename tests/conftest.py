"""Fixtures shared by all tests: real photos, a tiny seeded checkpoint and the bundle exported from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests with the reason where no CUDA device answers."""
    reason = _no_gpu_reason() if any("gpu" in item.keywords for item in items) else None
    if reason:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return None if pynvml.nvmlDeviceGetCount() else "no CUDA device on this machine"
    except ImportError:
        return "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    except pynvml.NVMLError as error:
        return f"no CUDA device on this machine ({error})"


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

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-sam2"
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle (fp32 and fp16) exported from `tiny_checkpoint`; read-only, copy it before changing it."""
    from pixano_edge.export.sam2 import export_sam2

    return export_sam2(tiny_checkpoint, tmp_path_factory.mktemp("bundle") / "tiny-sam2")


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The trained demo bundle that ships in the package."""
    folder = ROOT / "engine" / "assets" / "sam2-demo"
    if not (folder / "manifest.json").is_file():
        pytest.skip("the demo bundle is not in this tree")
    return folder
