"""The golden clip of a bundle that tracks: format and use in `pixano_edge.engine.models.sam2_video.check`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle.manifest import GoldenSample
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.models.sam2_video.clip import Clip, moving_clip
from pixano_edge.export.differences import Arrays
from pixano_edge.export.sam2.golden import FEATURE_VALUES
from pixano_edge.export.sam2.video_cases import GraphCase, Modules
from pixano_edge.export.sam2.video_clip import find_clip
from pixano_edge.export.sam2.video_parity import answer_clip
from pixano_edge.export.sam2.video_reference import VideoReference

FRAMES = 4
NAME = "golden-clip"


def add_golden_clip(
    writer: BundleWriter,
    model: Any,
    image: str,
    picture: npt.NDArray[np.uint8],
    constants: Sam2Constants,
    video: Sam2VideoConstants,
) -> GoldenSample:
    """Writes the golden clip into the bundle and returns its manifest entry.

    Args:
        writer: The bundle.
        model: `Sam2VideoModel` in eval mode, fp32.
        image: A picture that is in the bundle already.
        picture: Its pixels, (H, W, 3) uint8 RGB.
        constants: Of the checkpoint.
        video: Of the checkpoint.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**make_clip_sample(model, picture, constants, video)}
    np.savez_compressed(buffer, **arrays)
    file = f"golden/{NAME}.npz"
    writer.add_file(file, buffer.getvalue())
    return GoldenSample(name=NAME, image=image, tensors=file)


def make_clip_sample(
    model: Any, picture: npt.NDArray[np.uint8], constants: Sam2Constants, video: Sam2VideoConstants
) -> Arrays:
    """The arrays of the golden clip."""
    size = (picture.shape[0], picture.shape[1])
    frames = moving_clip(size, FRAMES).frames(picture)
    reference = VideoReference(model, frames, constants)
    clip = find_clip(reference, size, frames)
    answers = answer_clip(reference, clip, frames[0].shape[:2], constants)
    numbers = clip.objects
    arrays: Arrays = {
        **_clip_arrays(clip),
        "objects": np.array(numbers, np.int32),
        "masks": np.stack([np.stack([np.packbits(a[n].mask, axis=1) for n in numbers]) for a in answers]),
        "undecided": np.stack([np.stack([np.packbits(a[n].undecided, axis=1) for n in numbers]) for a in answers]),
    }
    modules = Modules(model, constants, video)
    first, second = reference.features(0), reference.features(1)
    own = modules.image(first)[sam2.IMAGE_EMBED]
    # An object that is there, remembered softly, and one that is not.
    remembered, stored = modules.memory(
        first, np.concatenate([own, own * np.float32(0.5)]), [False, True], [True, False]
    )
    rows = np.array([[video.num_memories - 1, 0]], np.int32)
    attended = modules.attention(second, [stored], rows, [stored], np.array([[1, 2]], np.int32))
    none = np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.int32)
    decoded = modules.decoder(second, attended.want[sam2_video.TRACKED_EMBED], *none, [None])
    for name in (
        sam2_video.MASK_LOGITS,
        sam2.OBJECT_SCORE_LOGITS,
        sam2_video.BINARIZE,
        sam2_video.MASK_TOKEN,
        sam2_video.POINTER_SCORE_LOGITS,
    ):
        arrays[name] = remembered.feeds[name]
    for name in (sam2_video.MEMORY_TIME, sam2_video.POINTER_TIME):
        arrays[name] = attended.feeds[name]
    memory = attended.feeds[sam2_video.MEMORY]
    arrays[sam2_video.MEMORY] = (memory.view(np.uint32) >> np.uint32(16)).astype(np.uint16)  # exact: they are rounded
    arrays[sam2_video.POINTERS] = attended.feeds[sam2_video.POINTERS]
    for case in (remembered, attended, decoded):
        arrays |= _sampled(case)
    return arrays


def _sampled(case: GraphCase) -> Arrays:
    found: Arrays = {}
    for tensor, value in case.want.items():
        index = np.linspace(0, value.size - 1, min(FEATURE_VALUES, value.size)).astype(np.int64)
        found[f"{case.graph}.{tensor}_index"] = index
        found[f"{case.graph}.{tensor}_values"] = value.reshape(-1)[index]
    return found


def _clip_arrays(clip: Clip) -> Arrays:
    marked = [(index, prompt) for index, one in enumerate(clip.passes) for prompt in one.prompts]
    slots = max(len(prompt.labels) for _, prompt in marked)
    arrays: Arrays = {
        "windows": clip.windows,
        "passes": np.array([(one.start, one.end) for one in clip.passes], np.int32),
        "prompt_pass": np.array([index for index, _ in marked], np.int32),
        "prompt_object": np.array([prompt.object_id for _, prompt in marked], np.int32),
        "prompt_frame": np.array([prompt.frame for _, prompt in marked], np.int32),
        "prompt_points": np.zeros((len(marked), slots, 2), np.float32),
        "prompt_labels": np.full((len(marked), slots), -1, np.int32),
        "prompt_boxes": np.full((len(marked), 4), np.nan, np.float32),
    }
    for row, (_, prompt) in enumerate(marked):
        arrays["prompt_points"][row, : len(prompt.points)] = prompt.points
        arrays["prompt_labels"][row, : len(prompt.labels)] = prompt.labels
        if prompt.box is not None:
            arrays["prompt_boxes"][row] = prompt.box
    return arrays
