"""What tracking takes beside its graphs' weights and tensors: memories of the tracked objects, attention weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..contracts import sam2_video
from ..contracts.base import GraphSpec
from ..contracts.sam2 import Sam2Constants
from ..contracts.sam2_video import Sam2VideoConstants
from ..runtime.memory import MemoryUse
from .families import VIDEOS, tracks

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest

TRACKED_OBJECTS = 8
"""Objects, with one prompt each, whose memories are declared for a model that tracks; what more of them take shows in
use. An estimate: the clips of annotators have a handful."""

VIDEO_GRAPHS = (sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER, sam2_video.MEMORY_ENCODER)


def graphs_for(task: str, specs: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The graphs that are loaded for a task, of all that a bundle has."""
    return specs if task == VIDEOS else {name: spec for name, spec in specs.items() if name not in VIDEO_GRAPHS}


def with_tracking(needs: MemoryUse, manifest: Manifest, task: str, estimated: bool = True) -> MemoryUse:
    """The figures of the graphs with what tracking `TRACKED_OBJECTS` objects takes beside them.

    Args:
        needs: Weights, activations, bindings and caches of the graphs.
        manifest: Of the bundle.
        task: What it is loaded for; nothing is added for another one, or where the bundle does not track.
        estimated: Whether the activations are an estimate, which knows nothing of attention weights.

    Raises:
        ContractError: The constants of tracking do not fit.
    """
    video = sam2_video.constants_of(manifest.constants) if tracks(manifest.family, manifest.constants) else None
    if task != VIDEOS or video is None:
        return needs
    from ..models.sam2_video.steps import ATTENTION_BYTES

    image = Sam2Constants.from_dict(manifest.constants)
    area = image.embed_size**2
    # What one object keeps: as far as one attends on either side of a frame with a prompt and behind the frame at hand
    # (`ObjectBank.out_of_reach`), that prompted frame, and two for what is being written.
    reach = max(video.num_memories, video.max_pointers) - 1
    maps = TRACKED_OBJECTS * 3 * (reach + 1) * map_bytes(image, video)
    # Attention weights, once as scores and once as probabilities; calls are split so that they stay below a limit.
    keys = video.num_memories * area + video.max_pointers * (image.hidden_dim // video.memory_dim)
    weights = max(4 * area * keys, min(ATTENTION_BYTES, TRACKED_OBJECTS * 4 * area * keys))
    activations = max(needs.activations or 0, 2 * weights) if estimated else needs.activations
    return replace(needs, activations=activations, caches=(needs.caches or 0) + maps)


def map_bytes(image: Sam2Constants, video: Sam2VideoConstants) -> int:
    """What a tracker keeps of one frame for one object: memory map, pointer and mask logits."""
    return 4 * (video.memory_dim * image.embed_size**2 + image.hidden_dim + image.mask_size**2)
