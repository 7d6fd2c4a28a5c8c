"""Opening on a "GPU" whose graphs are real ones on the CPU: check, verdict, next combination, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine import runtime
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.verdicts import VerdictStore
from pixano_edge.engine.runtime import StubSession
from tests.engine.models.sam2.test_opening import Gpu
from tests.support.make_preprocess_reference import procedural_image


def test_the_whole_way_with_real_graphs(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First load on a "GPU": golden samples run through staging, stream and recordings; the answer is the CPU's."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def session(path: Path, spec: GraphSpec, device: Any, **kwargs: Any) -> StubSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [s.name for s in spec.outputs]
        noise = 40.0 if "fp16" in str(path) and spec.name == sam2.MASK_DECODER else 0.0

        def run(inputs: dict[str, Any]) -> dict[str, Any]:
            found = dict(zip(names, graph.run(names, inputs)))
            if noise:
                found[sam2.MASKS] = found[sam2.MASKS] + np.float32(noise)
            return found

        opened = StubSession(spec, device, run, capturable=True)
        opened.backend = "onnxruntime"
        return opened

    click = [Prompt(points=[[30, 30]])]
    with Sam2ImagePredictor.open(tiny_bundle, device="cpu", threads=1) as reference:
        expected = reference.predict(procedural_image(60, 90), click)
    monkeypatch.setattr(runtime, "open_device", Gpu)
    monkeypatch.setattr(runtime, "open_session", session)
    store = VerdictStore(tmp_path)
    with Sam2ImagePredictor.open(tiny_bundle, device="cuda:0", verdicts=store) as predictor:
        info = predictor.info()
        for _ in range(3):
            answer = predictor.predict(procedural_image(60, 90), click)
            assert np.array_equal(answer.masks, expected.masks)
    assert info["precision"] == "fp32"
    assert info["stream"]["recorded"] > 0
    assert [w for w in info["warnings"] if "onnxruntime fp16 is not used" in w and "IoU" in w]
    assert len(list(tmp_path.iterdir())) == 2
