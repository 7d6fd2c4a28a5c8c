"""What `EdgeProvider` has for clips: the answer as a whole, frames as they come, and jobs."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timezone
from typing import TypeVar

from .errors import InvalidRequestError, provider_errors
from .families import facts_of
from .types import VideoMaskGenerationInput, VideoMaskGenerationResult
from .video import VideoService
from .video_types import TrackedFrame, VideoMaskGenerationJobStatus
from .worker import Deadline

T = TypeVar("T")


class TrackingMethods:
    """Mixin of `EdgeProvider`, which has the service and the thread for files."""

    _video: VideoService

    async def _in_files(self, work: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Runs what touches files on a thread of its own."""
        raise NotImplementedError

    async def video_mask_generation(
        self, input_data: VideoMaskGenerationInput, timeout: float = 120.0
    ) -> VideoMaskGenerationResult:
        """Masks of the marked objects through a clip; ``data`` is an `EdgeVideoMaskGenerationOutput`.

        One row per frame and object, frames in the order of processing, objects in that of the request; an object that
        is not on a frame has an empty mask of full size. With ``propagate`` false: one row per prompt, ordered by
        frame. Frames are computed one at a time, between other requests to the model.

        Args:
            input_data: Any object with the attributes of `VideoMaskGenerationInput`; `propagate`, `interval` and
                `keyframes` are read where present (see `EdgeVideoMaskGenerationInput`).
            timeout: Seconds for waiting, loading and computing. A clip that takes longer is a case for
                `submit_video_mask_generation_job` or `stream_video_mask_generation`.

        Raises:
            InvalidRequestError: A prompt, the interval or the clip is malformed or not allowed, or a frame does not
                decode; the message names the frame.
            ModelNotFoundError: No such model, or it was unloaded, also while this ran.
            TaskNotSupportedError: The model does not track.
            ModelBusyError: The model tracks in as many clips as it may.
            InferenceTimeoutError: No answer in time; the work stops within one frame.
            InferenceError: The back end failed; the message names the frame.
        """
        started = time.perf_counter()
        with provider_errors():
            output, run = await self._video.answer(input_data, Deadline(timeout))
        assert run.model is not None
        return VideoMaskGenerationResult(
            data=output,
            status="SUCCESS",
            timestamp=datetime.now(timezone.utc),
            processing_time=time.perf_counter() - started,
            metadata={**facts_of(input_data, run.model), "frames": run.done},
            id=uuid.uuid4().hex,
        )

    async def stream_video_mask_generation(
        self, input_data: VideoMaskGenerationInput, timeout: float | None = None
    ) -> AsyncIterator[TrackedFrame]:
        """The frames of `video_mask_generation` as they come; an addition of Pixano Edge to the interface.

        Leaving the iterator (``aclose``, or the end of its task) stops the work within one frame. Raises as
        `video_mask_generation`, after the frames that were done.
        """
        with provider_errors():
            async for frame in self._video.stream(input_data, Deadline(timeout)):
                yield frame

    async def submit_video_mask_generation_job(
        self, input_data: VideoMaskGenerationInput, timeout: float = 30.0
    ) -> VideoMaskGenerationJobStatus:
        """Starts tracking and answers at once, before model and clip are loaded; takes what `video_mask_generation`
        takes.

        Raises:
            InvalidRequestError: A prompt or the interval is malformed. What only the clip tells fails the job.
            ModelNotFoundError, TaskNotSupportedError: As there.
            ModelBusyError: The model tracks in as many clips as it may, or as many jobs run as are kept.
        """
        with provider_errors():
            return await self._video.submit(input_data, Deadline(timeout))

    async def get_video_mask_generation_job(self, job_id: str, timeout: float = 30.0) -> VideoMaskGenerationJobStatus:
        """State, progress and, once complete, the answer of a job; raises `JobNotFoundError`."""
        with provider_errors():
            return await self._in_files(lambda: self._video.status(job_id), Deadline(timeout))

    async def cancel_video_mask_generation_job(
        self, job_id: str, timeout: float = 30.0
    ) -> VideoMaskGenerationJobStatus:
        """Ends a job, whose work stops within one frame. One that has ended is returned as it is. Raises
        `JobNotFoundError`."""
        with provider_errors():
            return await self._in_files(lambda: self._video.cancel(job_id), Deadline(timeout))

    async def resume_video_mask_generation_job(
        self, job_id: str, timeout: float = 30.0
    ) -> VideoMaskGenerationJobStatus:
        """Lets a failed job go on after its last frame, for example one that ran when the server stopped; an addition
        of Pixano Edge to the interface.

        The frames that are there stay, and can be read meanwhile. They are computed again without new rows, since what
        follows depends on them: the result is that of a job which was never interrupted, and the time is that of the
        whole clip. ``metadata["frames_replayed"]`` tells how far that is. Of a job that runs this is no news.

        Raises:
            JobNotFoundError: No such job.
            InvalidRequestError: It is completed or canceled, or its clip is not kept.
            ModelNotFoundError, TaskNotSupportedError, ModelBusyError, JobStoreError: As at its submission; it can be
                resumed later. When a frame comes out otherwise than before, the job fails and says so.
        """
        with provider_errors():
            return await self._video.resume(job_id, Deadline(timeout))

    async def jobs(self) -> list[VideoMaskGenerationJobStatus]:
        """Every job that is kept, oldest first, without ``data``; an addition of Pixano Edge to the interface."""
        with provider_errors():
            return await self._in_files(self._video.jobs)

    def job_state(self, job_id: str) -> str | None:
        """State of a job, None where there is none; returns at once. An addition of Pixano Edge to the interface."""
        return self._video.state(job_id)

    async def watch_job(
        self, job_id: str, from_frame: int = 0, timeout: float | None = None
    ) -> AsyncIterator[TrackedFrame]:
        """The frames of a job as they come; an addition of Pixano Edge to the interface.

        Args:
            job_id: From `submit_video_mask_generation_job`.
            from_frame: Frames to leave out: those that the caller has, in the order of processing.
            timeout: Seconds for all of it.

        Raises:
            JobNotFoundError: No such job.
            InferenceError: After its last frame, if the job failed or was canceled: why.
        """
        if not isinstance(from_frame, int) or from_frame < 0:
            raise InvalidRequestError(f"from_frame must be 0 or more, got {from_frame!r:.60}.", "Count what you have.")
        with provider_errors():
            async for frame in self._video.watch(job_id, from_frame, Deadline(timeout)):
                yield frame

    async def job_counts(self) -> dict[str, int]:
        """Tracking jobs that are kept, by state; an addition of Pixano Edge to the interface."""
        with provider_errors():
            return await self._in_files(self._video.counts)
