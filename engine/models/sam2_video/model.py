"""SAM 2 on videos: one bundle opened once, for any number of clips, and for clicks on single images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...contracts import sam2, sam2_video
from ...contracts.sam2 import Sam2Constants
from ...contracts.sam2_video import Sam2VideoConstants
from ...errors import BundleError
from ...runtime.base import Session
from ...runtime.memory import MemoryUse, model_memory
from ..opening import Asked, open_family, open_graphs
from ..sam2.cache import EmbeddingCache
from ..sam2.opening import build_predictor
from ..sam2.predictor import Sam2ImagePredictor
from ..verdicts import VerdictStore
from .frames import Frames, Image, open_frames
from .steps import Stepper
from .tracker import Corrections, VideoTracker

VIDEO_GRAPHS = (sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER, sam2_video.MEMORY_ENCODER)

Source = Path | str | Sequence[Path | bytes | Image] | Frames


class Sam2VideoModel:
    """The five graphs of a bundle on one device. Thread-safe: trackers and image prompts take turns.

    Make it with `open`; the constructor takes sessions that are open already and leaves closing them to its caller.

    Args:
        predictor: Encodes frames and answers image prompts.
        sessions: Open sessions by the names of `sam2_video.graphs`, on the predictor's device.
        video: Constants of tracking.

    Attributes:
        predictor: For prompts on single images: it shares the encoder, the cache and the stream with the trackers.
        video: Constants of tracking.
    """

    def __init__(self, predictor: Sam2ImagePredictor, sessions: dict[str, Session], video: Sam2VideoConstants) -> None:
        self.predictor = predictor
        self.video = video
        self._sessions = {name: sessions[name] for name in VIDEO_GRAPHS}
        self._stepper = Stepper(predictor, self._sessions, video)

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        *,
        threads: int | None = None,
        cache: EmbeddingCache | None = None,
        force: bool = False,
        prove: bool = True,
        check: Callable[[], None] | None = None,
        verdicts: VerdictStore | None = None,
    ) -> Sam2VideoModel:
        """Opens all graphs of a bundle that tracks, in the asked combination or the fastest one that is proven here.

        Args:
            bundle: An open bundle or its folder.
            device: ``auto``, ``cpu`` or ``cuda:N``.
            backend: ``auto`` or a back end's name.
            precision: ``auto`` or a variant's name.
            threads: Threads of one call; None leaves it to the back end.
            cache: Embedding cache to share; None makes an own one.
            force: Take the asked back end and precision although their check on this device failed.
            prove: False opens without a verdict, for the check itself.
            check: Called between the steps; what it raises ends the opening and closes what is open.
            verdicts: Where verdicts are kept; None for the user's own store.

        Raises:
            BundleError: The bundle does not track; or as `Sam2ImagePredictor.open`.
            DeviceError, ContractError: As `Sam2ImagePredictor.open`.
        """
        bundle = open_family(bundle, sam2.FAMILY)
        video = sam2_video.constants_of(bundle.manifest.constants)
        if video is None:
            raise BundleError(
                f"Bundle '{bundle.manifest.name}' holds no graphs for video, so it cannot track.",
                "Export the checkpoint again with this version: pixano-edge export sam2 CHECKPOINT -o FOLDER",
            )
        constants = Sam2Constants.from_dict(bundle.manifest.constants)
        specs = sam2.graphs(constants) | sam2_video.graphs(constants, video)
        asked = Asked(device, backend, precision, threads, force, prove)
        graphs = open_graphs(bundle, asked, specs, check=check, verdicts=verdicts)
        predictor = build_predictor(Sam2ImagePredictor, bundle, graphs, cache=cache, threads=threads)
        with contextlib.ExitStack() as failed:
            failed.callback(predictor.close)
            model = cls(predictor, graphs.sessions, video)
            if graphs.sessions[sam2.IMAGE_ENCODER].device.stream:
                if check is not None:
                    check()
                predictor.warm_up()
                model.warm_up()
            failed.pop_all()
        return model

    @property
    def constants(self) -> Sam2Constants:
        """Constants of the image graphs."""
        return self.predictor.constants

    @property
    def runs(self) -> dict[str, int]:
        """Launches of each graph so far."""
        encoder, decoder = self.predictor.runs
        return {sam2.IMAGE_ENCODER: encoder, sam2.MASK_DECODER: decoder, **self._stepper.runs}

    def track(
        self,
        source: Source,
        *,
        corrections: Corrections = "conditioning",
        history: bool = True,
        streaming: bool = False,
        max_cond_frames: int | None = None,
    ) -> VideoTracker:
        """A tracker on one clip; close it to free its memories. Several may run at once and take turns frame by frame.

        Args:
            source: A video file, a folder of pictures, a list of files, encoded bytes or arrays, or open frames.
            corrections: What a prompt on a tracked frame does; see `VideoTracker`.
            history: Keep memories that are far away on disk, for corrections after propagation.
            streaming: Track as if the clip's length were not known.
            max_cond_frames: Most frames with prompts that a frame attends to, the closest ones; -1 for all, None for
                what the checkpoint says.

        Raises:
            ImageError: There is no clip, or its first frame does not decode.
            PromptError: `max_cond_frames` is 0 or below -1.
        """
        return VideoTracker(
            self._stepper,
            open_frames(source),
            corrections=corrections,
            history=history,
            streaming=streaming,
            max_cond_frames=max_cond_frames,
        )

    def warm_up(self) -> None:
        """Tracks a blank object over two blank frames, past the cache; see `Sam2ImagePredictor.warm_up` for images."""
        self._stepper.warm_up()

    def info(self) -> dict[str, Any]:
        """As `Sam2ImagePredictor.info`, with the three graphs of tracking; JSON-ready."""
        facts = self.predictor.info()
        graphs = {name: session.info() for name, session in self._sessions.items()}
        more = [w for one in graphs.values() for w in one.get("warnings", ())]
        if self._stepper.halved:
            more.append(f"The device was short of memory: objects per call halved {self._stepper.halved} time(s).")
        warnings = list(dict.fromkeys([*facts["warnings"], *more]))
        return {**facts, **graphs, "warnings": warnings, "tracks": True}

    def memory(self) -> MemoryUse:
        """Bytes that the model takes now, without the memories of open trackers."""
        return self.predictor.memory() + model_memory(self._sessions.values())

    def close(self) -> None:
        """Waits for calls under way, then frees what `open` opened; later calls raise DeviceError."""
        with self._stepper.lock:
            self.predictor.close()

    def __enter__(self) -> Sam2VideoModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
