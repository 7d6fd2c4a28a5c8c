"""Data of tracking requests beyond the seed interface: newer fields, frames one by one, and jobs.

Two generations of Pixano read tracking answers differently: flat lists with one row per (frame, object), or frames
that hold objects. `EdgeVideoMaskGenerationOutput` is both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .types import CompressedRLEData, VideoMaskGenerationInput, VideoMaskGenerationOutput

RUNNING = "running"
COMPLETED = "completed"
FAILED = "failed"
CANCELED = "canceled"
"""States of a job: running, then one of the other three. Pixano's clients refuse any other word."""


@dataclass
class EdgeVideoMaskGenerationInput(VideoMaskGenerationInput):
    """`VideoMaskGenerationInput` with the fields of Pixano 0.8.

    Prompts come as `points`, `labels` and `boxes` (xyxy), one entry per object, on the frames `frame_indexes`; or as
    `keyframes`, which win when both are there. Entry i belongs to ``objects_ids[i]``; ids and frames without a prompt
    are left out. An id may come several times, on different frames. All indexes count the frames of `video` from 0.

    Attributes:
        propagate: True or None: follow the objects from frame to frame. False: answer the prompted frames only, with
            one row per prompt.
        interval: ``{"start_frame": a, "end_frame": b}``, both included; backwards when a is above b. None: from the
            earliest prompted frame to the end of the clip.
        keyframes: ``{"frame_index": i, "points": [{"x", "y", "label"}], "box": {"x", "y", "width", "height"},
            "mask": {"size", "counts"}}``. Points and box combine, a mask stands alone; empty or None is absent.
    """

    propagate: bool | None = True
    interval: dict[str, Any] | None = None
    keyframes: list[dict[str, Any]] | None = None


@dataclass
class TrackedObject:
    """One object on one frame, as Pixano after 0.8 reads it.

    Attributes:
        track_id: The request's object id.
        mask: At the frame's size; empty where the object is absent.
        score: Probability that the object is on the frame.
        box: Smallest box around the mask, ``[x1, y1, x2, y2]``; None for an empty mask.
        class_name: Not told by SAM 2.
    """

    track_id: int
    mask: CompressedRLEData
    score: float | None = None
    box: list[float] | None = None
    class_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            "track_id": self.track_id,
            "box": self.box,
            "score": self.score,
            "class_name": self.class_name,
            "mask": self.mask.to_dict(),
        }


@dataclass
class TrackedFrame:
    """All objects of one frame, in the order of the request."""

    frame_index: int
    objects: list[TrackedObject] = field(default_factory=list)


@dataclass
class EdgeVideoMaskGenerationOutput(VideoMaskGenerationOutput):
    """The three parallel lists, and the same rows as `frames`, in the order in which frames were processed."""

    frames: list[TrackedFrame] = field(default_factory=list)

    @classmethod
    def of(cls, frames: list[TrackedFrame]) -> EdgeVideoMaskGenerationOutput:
        """Both forms of the same rows."""
        rows = [(frame.frame_index, tracked) for frame in frames for tracked in frame.objects]
        return cls(
            objects_ids=[tracked.track_id for _, tracked in rows],
            frame_indexes=[index for index, _ in rows],
            masks=[tracked.mask for _, tracked in rows],
            frames=frames,
        )


@dataclass
class VideoMaskGenerationJobStatus:
    """State of a tracking job.

    Attributes:
        job_id: ``job-`` and hexadecimal digits.
        status: `RUNNING`, `COMPLETED`, `FAILED` or `CANCELED`.
        detail: Why it failed, or that it was canceled.
        data: The answer of a completed job, else None.
        metadata: ``model_name``, ``model_class``, ``device``, ``frames_done``, ``frames_total`` and ``progress``.
        timestamp: When it was submitted, in UTC.
        processing_time: Seconds from then to its end, or to now.
    """

    job_id: str
    status: str
    detail: str | None = None
    data: EdgeVideoMaskGenerationOutput | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    timestamp: datetime | None = None
    processing_time: float = 0.0
