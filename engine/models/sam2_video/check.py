"""The golden clip of a bundle that tracks: each video graph, and a few tracked frames, against PyTorch's answers.

One picture of the bundle is the clip: its frames are windows of it. The memory encoder remembers stored masks on frame
0; the memory attention attends on frame 1 to what PyTorch remembered, so that its error is its own, and the decoder
reads what it gives. Then the tracker follows the whole clip.

Keys of the ``.npz`` (T frames, n prompts with S point slots, F answers, O objects, frames of h x w, m = mask_size,
B = 2 objects in the chain; all arrays little-endian, no pickles):

======================  =======================  ==============================================================
key                     shape, dtype             meaning
======================  =======================  ==============================================================
windows                 (T, 4) int32             left, top, width, height of each frame in the picture
passes                  (k, 2) int32             first and last frame of each pass
prompt_pass             (n,) int32               pass before which the prompt is given
prompt_object           (n,) int32               object
prompt_frame            (n,) int32               frame
prompt_points           (n, S, 2) float32        x, y in pixels of the frame
prompt_labels           (n, S) int32             1 inside, 0 outside, -1 slot not used
prompt_boxes            (n, 4) float32           x0, y0, x1, y1; NaN where the prompt has no box
objects                 (O,) int32               objects in the order of `masks`
masks                   (F, O, h, w / 8) uint8   PyTorch's masks, a bit per pixel (`numpy.packbits` along w)
undecided               (F, O, h, w / 8) uint8   pixels nearer to the threshold than `clip.TOLERANCE`
mask_logits             (B, 1, m, m) float32     inputs of the memory encoder on frame 0, as in its contract
object_score_logits     (B, 1) float32
binarize                (B,) float32
mask_token              (B, C) float32
pointer_score_logits    (B, 1) float32
memory                  (1, B, D, G, G) uint16   inputs of the memory attention on frame 1; maps as bfloat16's bits
memory_time             (1, B) int32
pointers                (1, B, C) float32
pointer_time            (1, B) float32
<graph>.<tensor>_index  (K,) int64               flat C-order positions in an output of a graph
<graph>.<tensor>_values (K,) float32             values there; memory maps before their rounding to bfloat16
======================  =======================  ==============================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import sam2, sam2_video
from ...contracts.sam2 import Sam2Constants
from ...contracts.sam2_video import Sam2VideoConstants
from ...errors import BundleError, ImageError, PromptError
from ...runtime.base import Device, Session
from ..images import decode_image
from ..opening import graph_file, session_options
from ..sam2.predictor import Sam2ImagePredictor
from .clip import Clip, ClipPass, ClipPrompt, bfloat16_distance, clip_iou, follow
from .frames import ImageFrames
from .steps import Stepper
from .tracker import VideoTracker

Arrays = dict[str, npt.NDArray[Any]]
AddError = Callable[[str, npt.NDArray[Any], npt.NDArray[Any]], None]
"""Takes a tensor's name, what came out and what should have."""

_DAMAGED = "Copy or download the bundle again, or export it again."


@dataclass(frozen=True)
class ClipCheck:
    """How well a tracked clip matches PyTorch's.

    Attributes:
        frames: Answers compared; a frame that is tracked again after a correction counts again.
        objects: Objects in it.
        shown: Of PyTorch's masks, how many are not empty; empty ones agree easily.
        mean_iou: Over all masks. Pixels nearer to the threshold than `clip.TOLERANCE` count as equal.
        min_iou: Of the worst mask.
    """

    frames: int
    objects: int
    shown: int
    mean_iou: float
    min_iou: float


def tensor_names(constants: Sam2Constants, video: Sam2VideoConstants) -> dict[str, str]:
    """Outputs of the video graphs as ``<graph>.<tensor>``, in the order of the chain, with their graphs."""
    graphs = sam2_video.graphs(constants, video)
    chain = (sam2_video.MEMORY_ENCODER, sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER)
    return {f"{name}.{tensor.name}": name for name in chain for tensor in graphs[name].outputs}


@contextlib.contextmanager
def open_video_sessions(
    bundle: Bundle, device: Device, backend: str, precision: str, threads: int | None = None
) -> Iterator[dict[str, Session]]:
    """The video graphs of a bundle on a device, in one combination.

    Raises:
        BundleError, DeviceError: There is no such variant; for TensorRT, no engine was built for this device.
    """
    from ...runtime import open_session

    constants = Sam2Constants.from_dict(bundle.manifest.constants)
    video = sam2_video.constants_of(bundle.manifest.constants)
    assert video is not None  # the caller's bundle tracks
    sessions: dict[str, Session] = {}
    with contextlib.ExitStack() as opened:
        for name, spec in sam2_video.graphs(constants, video).items():
            if backend == "tensorrt":
                from ...build.locate import find_engine

                file = Path(find_engine(bundle, name, precision, device.info()))
            else:
                file = graph_file(bundle, name, backend, precision, device.kind)
            options = session_options(bundle, backend, precision)
            sessions[name] = open_session(file, spec, device, backend=backend, threads=threads, options=options)
            opened.callback(sessions[name].close)
        yield sessions


def check_tracking(
    bundle: Bundle, predictor: Sam2ImagePredictor, sessions: dict[str, Session], add: AddError
) -> ClipCheck:
    """Runs the golden clip.

    Args:
        bundle: It tracks and has a golden clip.
        predictor: Open on it.
        sessions: Of `open_video_sessions`, on the predictor's device.
        add: Gets every output of the chain.

    Raises:
        BundleError: The clip is damaged.
    """
    sample = bundle.manifest.golden_clip
    video = sam2_video.constants_of(bundle.manifest.constants)
    assert sample is not None
    assert video is not None
    stored = bundle.load_npz(sample.tensors)
    picture = decode_image(bundle.file(sample.image))
    try:
        clip = read_clip(stored)
        frames = clip.frames(picture)
        _run_chain(predictor, sessions, frames, stored, add)
        tracker = VideoTracker(Stepper(predictor, sessions, video), ImageFrames(frames))
        with tracker:
            return _run_clip(tracker, clip, stored)
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(f"The golden clip '{sample.name}' is malformed: {error}.", _DAMAGED) from error
    except (ImageError, PromptError) as error:
        raise BundleError(f"The golden clip '{sample.name}' cannot run: {error.message}", error.action) from error


def read_clip(stored: Arrays) -> Clip:
    """The clip of a golden sample; raises KeyError or ValueError when it is malformed."""
    passes = []
    for index, (start, end) in enumerate(stored["passes"].tolist()):
        prompts = []
        for row in np.flatnonzero(stored["prompt_pass"] == index):
            used, box = stored["prompt_labels"][row] >= 0, stored["prompt_boxes"][row]
            prompts.append(
                ClipPrompt(
                    int(stored["prompt_object"][row]),
                    int(stored["prompt_frame"][row]),
                    stored["prompt_points"][row][used],
                    stored["prompt_labels"][row][used],
                    None if np.isnan(box).any() else box,
                )
            )
        passes.append(ClipPass(tuple(prompts), start, end))
    return Clip(stored["windows"], tuple(passes))


def _run_chain(
    predictor: Sam2ImagePredictor,
    sessions: dict[str, Session],
    frames: list[npt.NDArray[np.uint8]],
    stored: Arrays,
    add: AddError,
) -> None:
    """The three graphs one after the other."""
    first, second = (predictor.encode(frame) for frame in frames[:2])
    count, side = len(stored["binarize"]), predictor.constants.mask_size
    remembered = run_graph(
        sessions[sam2_video.MEMORY_ENCODER],
        {"B": count, "H": side, "W": side},
        {
            sam2.IMAGE_EMBED: first.image_embed,
            sam2_video.MASK_LOGITS: stored[sam2_video.MASK_LOGITS],
            sam2.OBJECT_SCORE_LOGITS: stored[sam2.OBJECT_SCORE_LOGITS],
            sam2_video.BINARIZE: stored[sam2_video.BINARIZE],
            sam2_video.MASK_TOKEN: stored[sam2_video.MASK_TOKEN],
            sam2_video.POINTER_SCORE_LOGITS: stored[sam2_video.POINTER_SCORE_LOGITS],
        },
    )
    attended = run_graph(
        sessions[sam2_video.MEMORY_ATTENTION],
        {"B": 1, "M": count, "K": count},
        {
            sam2.IMAGE_EMBED: second.image_embed,
            sam2_video.MEMORY: from_bfloat16(stored[sam2_video.MEMORY]),
            sam2_video.MEMORY_TIME: stored[sam2_video.MEMORY_TIME],
            sam2_video.POINTERS: stored[sam2_video.POINTERS],
            sam2_video.POINTER_TIME: stored[sam2_video.POINTER_TIME],
        },
    )
    decoded = run_graph(
        sessions[sam2_video.TRACK_DECODER],
        {"P": 1, "N": 2},
        {
            sam2_video.TRACKED_EMBED: attended[sam2_video.TRACKED_EMBED],
            sam2.HIGH_RES_0: second.high_res[0],
            sam2.HIGH_RES_1: second.high_res[1],
            sam2.POINT_COORDS: np.zeros((1, 2, 2), np.float32),
            sam2.POINT_LABELS: np.full((1, 2), sam2.LABEL_PAD, np.int32),
            sam2.MASK_INPUT: np.zeros((1, 1, side, side), np.float32),
            sam2.HAS_MASK_INPUT: np.zeros(1, np.float32),
            sam2_video.SKIP_NO_MEMORY: np.zeros(1, np.float32),
        },
    )
    for graph, outputs in (
        (sam2_video.MEMORY_ENCODER, remembered),
        (sam2_video.MEMORY_ATTENTION, attended),
        (sam2_video.TRACK_DECODER, decoded),
    ):
        for tensor, value in outputs.items():
            name = f"{graph}.{tensor}"
            got, want = value.reshape(-1)[stored[f"{name}_index"]], stored[f"{name}_values"]
            if tensor == sam2_video.MEMORY_FEATURES:
                got = want + bfloat16_distance(got, want)
            add(name, got, want)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """float32 values of bfloat16 numbers given by their bits."""
    values: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def run_graph(session: Session, sizes: dict[str, int], feeds: Arrays) -> Arrays:
    """One call with arrays on the host: outputs by name, copied."""
    with session.lock:
        binding = session.prepare(sizes)
        for name, value in feeds.items():
            if binding.shapes[name] != value.shape:
                raise ValueError(f"'{name}' is {list(value.shape)}, the graph takes {list(binding.shapes[name])}")
            if value.size:
                binding.write(name, np.ascontiguousarray(value))
        binding.run()
        return {spec.name: np.array(binding.read(spec.name)) for spec in session.spec.outputs}


def _run_clip(tracker: VideoTracker, clip: Clip, stored: Arrays) -> ClipCheck:
    width = int(clip.windows[0, 2])

    def bits(name: str, answer: int, index: int) -> npt.NDArray[np.bool_]:
        return np.unpackbits(stored[name][answer, index], axis=1, count=width).astype(np.bool_)

    numbers = stored["objects"].tolist()
    ious, answers, shown = [], 0, 0
    for answer, result in enumerate(follow(tracker, clip)):
        masks = {o.object_id: o.mask for o in result.objects}
        for index, number in enumerate(numbers):
            wanted, undecided = bits("masks", answer, index), bits("undecided", answer, index)
            ious.append(clip_iou(masks[number], wanted, undecided))
            shown += bool(wanted.any())
        answers += 1
    if not ious or answers != len(stored["masks"]):
        raise ValueError(f"it has masks for {len(stored['masks'])} answers, its passes give {answers}")
    return ClipCheck(answers, len(numbers), shown, float(np.mean(ious)), float(np.min(ious)))
