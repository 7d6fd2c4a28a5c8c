"""The video graphs as files: operators of TensorRT 10.3, real builds, and every size that tracking asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.runtime import open_device, open_session

GRAPHS = (sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER, sam2_video.MEMORY_ENCODER)


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_of_tensorrt_10_3(tiny_graphs: tuple[Any, Path, Any, Any], graph: str) -> None:
    import onnx

    from pixano_edge.export.operators import check_tensorrt_10_3

    assert check_tensorrt_10_3(onnx.load(tiny_graphs[1] / f"{graph}.onnx")) == []


@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_rtx_builds_it_for_two_gpus(tiny_graphs: tuple[Any, Path, Any, Any], graph: str) -> None:
    from pixano_edge.export import tensorrt_rtx

    if absent := tensorrt_rtx.missing_module():
        pytest.skip(f"{absent} is not installed: pip install 'pixano-edge[tensorrt-rtx]'")
    _, folder, constants, video = tiny_graphs
    built = tensorrt_rtx.check_build(folder / f"{graph}.onnx", sam2_video.graphs(constants, video)[graph])
    assert built.engine_bytes > 10_000


@pytest.mark.parametrize(("memories", "pointers", "objects"), [(1, 0, 1), (1, 1, 3), (7, 16, 2), (9, 20, 1)])
def test_memory_attention_at_other_sizes(
    tiny_graphs: tuple[Any, Path, Any, Any], memories: int, pointers: int, objects: int
) -> None:
    import torch

    from pixano_edge.export.sam2 import video_graphs

    model, folder, constants, video = tiny_graphs
    spec = sam2_video.memory_attention(constants, video)
    rng = np.random.default_rng(memories)
    sizes = {"B": objects, "M": memories, "K": pointers}
    feeds = {t.name: rng.standard_normal(t.shape(sizes)).astype(np.float32) for t in spec.inputs}
    feeds[sam2_video.MEMORY_TIME] = rng.integers(0, 7, (objects, memories)).astype(np.int32)
    with torch.no_grad():
        want = video_graphs.MemoryAttention(model).eval()(*(torch.from_numpy(feeds[t.name]) for t in spec.inputs))
    session = open_session(folder / f"{spec.name}.onnx", spec, open_device("cpu"), threads=1)
    binding = session.prepare(sizes)
    for name, value in feeds.items():
        binding.write(name, value)
    binding.run()
    got = binding.read(sam2_video.TRACKED_EMBED)
    assert np.abs(got - want.numpy()).max() < 1e-4 * np.abs(want.numpy()).max()
    session.close()


def test_constants_survive_the_manifest(tiny_graphs: tuple[Any, Path, Any, Any]) -> None:
    video = tiny_graphs[3]
    assert sam2_video.Sam2VideoConstants.from_dict(video.to_dict()) == video
    for broken in ({"num_memories": "7"}, {"max_pointers": True}, {"extra": 1}):
        with pytest.raises(Exception, match="video constants"):
            sam2_video.Sam2VideoConstants.from_dict({**video.to_dict(), **broken})
