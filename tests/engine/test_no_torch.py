"""The engine imports, segments and detects where torch, transformers and the export tools cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.make_preprocess_reference import procedural_image

ROOT = Path(__file__).resolve().parent.parent.parent

BLOCKER = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    names = set(sys.argv[1].split(","))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)
        return None

sys.meta_path.insert(0, Blocked())
"""

TRAINING_STACK = "torch,torchvision,transformers,optimum,onnx,onnxscript,onnxslim,safetensors,skimage,scipy"

IMPORT_ALL = """
import importlib, pkgutil
import pixano_edge.engine as engine

names = [m.name for m in pkgutil.walk_packages(engine.__path__, "pixano_edge.engine.")]
assert len(names) > 20, names
hosted = ("pixano_edge.engine.plugins.", "pixano_edge.engine.provider.pixano")  # parts of another program
served = ("pixano_edge.engine.server", "pixano_edge.engine.cli.serve") if "fastapi" in Blocked.names else ()
for name in names:
    try:
        importlib.import_module(name)
    except ImportError:
        if not name.startswith((*hosted, *served)):
            raise
for name in ("onnxruntime", "torch", "transformers", "optimum"):
    assert name not in sys.modules, name
"""

SEGMENT = """
import numpy as np
from pathlib import Path
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2.verify import verify_bundle

with Sam2ImagePredictor.open(Path(sys.argv[2]), threads=1) as predictor:
    answer = predictor.predict(decode_image(Path(sys.argv[3])), [Prompt(points=[[40, 60]])])
np.save(sys.argv[4], answer.masks)
assert verify_bundle(Path(sys.argv[2]), threads=1).passed
assert not {n.partition(".")[0] for n in sys.modules} & Blocked.names
"""

DETECT = """
import numpy as np
from pathlib import Path
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.verify import verify_bundle

with open_detector(Path(sys.argv[2]), threads=1) as detector:
    image = decode_image(Path(sys.argv[3]))
    found = detector.detect(image, ["cat", "coffee cup"], box_threshold=0.0, text_threshold=0.0)
    answers = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    if hasattr(detector, "detect_like"):
        answers["like"] = detector.detect_like(image, image).boxes
np.savez(sys.argv[4], **answers)
assert verify_bundle(Path(sys.argv[2]), threads=1).passed
assert not {n.partition(".")[0] for n in sys.modules} & Blocked.names
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + script, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_without_the_training_stack_and_loads_no_back_end() -> None:
    result = run(IMPORT_ALL, TRAINING_STACK)
    assert result.returncode == 0, result.stderr


def test_imports_without_onnxruntime_and_tokenizers() -> None:
    result = run(IMPORT_ALL, TRAINING_STACK + ",onnxruntime,tokenizers")
    assert result.returncode == 0, result.stderr


def test_imports_without_the_server_extra() -> None:
    blocked = ",fastapi,starlette,uvicorn,multipart,python_multipart,prometheus_client,orjson,pybase64,httpx"
    result = run(IMPORT_ALL, TRAINING_STACK + blocked)
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks() -> None:
    result = run("import torch", TRAINING_STACK)
    assert result.returncode != 0
    assert "blocked by the test" in result.stderr


def test_segments_without_the_training_stack(tiny_bundle: Path, tmp_path: Path) -> None:
    image = procedural_image(161, 97)
    Image.fromarray(image).save(tmp_path / "image.png")
    masks = tmp_path / "masks.npy"
    result = run(SEGMENT, TRAINING_STACK, str(tiny_bundle), str(tmp_path / "image.png"), str(masks))
    assert result.returncode == 0, result.stderr

    from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
    from pixano_edge.engine.models.sam2.prompts import Prompt

    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as predictor:
        expected = predictor.predict(image, [Prompt(points=[[40, 60]])]).masks
    assert np.array_equal(np.load(masks), expected)


@pytest.mark.parametrize("name", ["owl_bundle", "owlvit_bundle", "dino_bundle"])
def test_detects_without_the_training_stack(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle: Path = request.getfixturevalue(name)
    image = procedural_image(161, 97)
    Image.fromarray(image).save(tmp_path / "image.png")
    answers = tmp_path / "answers.npz"
    result = run(DETECT, TRAINING_STACK, str(bundle), str(tmp_path / "image.png"), str(answers))
    assert result.returncode == 0, result.stderr

    from pixano_edge.engine.models.detection.opening import open_detector

    detector: Any = open_detector(bundle, threads=1)
    with detector, np.load(answers) as stored:
        found = detector.detect(image, ["cat", "coffee cup"], box_threshold=0.0, text_threshold=0.0)
        assert len(found) > 0
        for key in ("boxes", "scores", "labels"):
            assert np.array_equal(stored[key], getattr(found, key)), key
        assert ("like" in stored) == hasattr(detector, "detect_like")
        if "like" in stored:
            assert np.array_equal(stored["like"], detector.detect_like(image, image).boxes)
