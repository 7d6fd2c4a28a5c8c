"""SAM 2.1 tiny's image encoder at its real size, 1024 pixels, with seeded weights: memory, file size, kernels, time.

`pytest -m slow -s` prints the figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from pixano_edge.calibration import qdq
from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.fusion import cpu_times, fusion
from pixano_edge.calibration.graph import load_graph
from pixano_edge.calibration.observe import Observations
from pixano_edge.calibration.patterns import order_gelus

pytestmark = pytest.mark.slow

SIZE = 1024
MOST_BYTES = 6_000_000_000
_OBSERVE = """
import resource, sys
from pathlib import Path
import numpy as np
from pixano_edge.calibration import qdq
from pixano_edge.calibration.graph import load_graph
from pixano_edge.calibration.observe import observe
model = load_graph(Path(sys.argv[1]))
feed = {"pixel_values": np.load(sys.argv[2])}
observe(model, [feed], qdq.tensors(model), Path(sys.argv[3]), threads=1)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")
    from transformers import Sam2VideoConfig, Sam2VideoModel

    from pixano_edge.engine.contracts import sam2 as contract
    from pixano_edge.export.onnx_graph import export_graph
    from pixano_edge.export.sam2 import checkpoint, graphs
    from tests.support.tiny import sharpen_for_tracking

    model = sharpen_for_tracking(Sam2VideoModel(Sam2VideoConfig()).eval(), seed=1)
    constants = checkpoint.read_constants(model.config)
    spec = contract.graphs(constants)["image_encoder"]
    example = graphs.example_inputs("image_encoder", constants)
    file = tmp_path_factory.mktemp("real") / "encoder.onnx"
    onnx.save(export_graph(graphs.modules(model)["image_encoder"], spec, example), file)
    return file


def test_the_encoder(encoder: Path, bedroom: Path) -> None:
    with Image.open(bedroom / "00000.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE)), np.float32) / 127.5 - 1
    feed, store, small = (encoder.with_name(name) for name in ("feed.npy", "observed.npz", "int8.onnx"))
    np.save(feed, pixels.transpose(2, 0, 1)[None])
    # In a process of its own, for what exporting took would count otherwise.
    command = [sys.executable, "-c", _OBSERVE, str(encoder), str(feed), str(store)]
    peak = int(subprocess.run(command, check=True, capture_output=True, timeout=1800).stdout)
    model = load_graph(encoder)
    quantised, report = qdq.quantize(model, Observations.load(store))
    onnx.save(quantised, small)
    found = fusion(quantised)
    ratio = os.path.getsize(small) / os.path.getsize(encoder)
    order_gelus(model)
    fp32, int8 = cpu_times([model, quantised], {}, 3)
    sys.stdout.write(
        f"\npeak memory {peak / 1e9:.2f} GB, file {ratio:.3f}, {found.integer} products of {len(blocks(model))} int8, "
        f"CPU time {fp32:.0f} ms in fp32 with fused GELUs, {int8:.0f} ms in int8\n"
    )
    assert peak < MOST_BYTES
    assert ratio < 0.35
    assert not report.kept
    assert (found.integer, found.left) == (len(blocks(model)), [])
    assert int8 < 0.75 * fp32
