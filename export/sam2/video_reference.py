"""What PyTorch answers for a clip: the stock `Sam2VideoModel` with its own inference sessions.

Nothing here uses the export wrappers or the engine. Each object has a session of its own: in a common one transformers
binarises the memories of all objects on a frame as soon as one of them is prompted there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Sam2VideoInferenceSession

from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.sam2_video.clip import Clip
from pixano_edge.export.sam2.reference import LOGIT_LIMIT, preprocess

FloatArray = npt.NDArray[np.float32]
Answer = tuple[FloatArray, float]
"""(m, m) float32 logits of the mask, and the object score logit."""


class VideoReference:
    """The stock predictor on one clip.

    Args:
        model: `Sam2VideoModel` in eval mode, fp32.
        frames: (H, W, 3) uint8 RGB each.
        constants: Of the checkpoint.
    """

    def __init__(self, model: Any, frames: Sequence[npt.NDArray[np.uint8]], constants: Sam2Constants) -> None:
        self._model = model
        self._constants = constants
        self._size = frames[0].shape[:2]
        self._video = torch.cat([preprocess(frame, constants) for frame in frames])
        self._sessions: dict[int, Any] = {}
        self._features: dict[int, Any] = {}

    def prompt(
        self,
        object_id: int,
        frame: int,
        points: FloatArray | None = None,
        labels: npt.NDArray[np.int32] | None = None,
        box: FloatArray | None = None,
    ) -> Answer:
        """Adds a prompt in original pixels and runs the model on its frame, as the stock processor does."""
        session = self._session(object_id)
        session.add_point_inputs(0, frame, self._points(points, labels, box))
        session.remove_mask_inputs(0, frame)
        session.obj_with_new_inputs = [object_id]
        return self._answer(self._run(session, frame, False))

    def mask(self, object_id: int, frame: int, mask: npt.NDArray[np.bool_]) -> Answer:
        """Adds a mask of the frame's size, resized as the stock processor does."""
        session = self._session(object_id)
        side = self._constants.image_size
        square = torch.nn.functional.interpolate(
            torch.from_numpy(mask)[None, None].float(), size=(side, side), mode="bilinear", antialias=True
        )
        session.add_mask_inputs(0, frame, (square >= 0.5).float())
        session.remove_point_inputs(0, frame)
        session.obj_with_new_inputs = [object_id]
        return self._answer(self._run(session, frame, False))

    @torch.inference_mode()
    def correct(
        self,
        object_id: int,
        frame: int,
        points: FloatArray | None = None,
        labels: npt.NDArray[np.int32] | None = None,
        box: FloatArray | None = None,
    ) -> Answer:
        """A prompt on a tracked frame as upstream's SAM 2.1 video predictor takes it.

        transformers has no such option, so its own steps are called as upstream orders them
        (``sam2_video_predictor.py``, ``add_new_points_or_box`` with ``add_all_frames_to_correct_as_cond``): memory
        attention, earlier logits as the mask prompt, result stored as a conditioning frame.
        """
        session = self._session(object_id)
        outputs = session.output_dict_per_obj[0]
        before = (outputs["cond_frame_outputs"].get(frame) or outputs["non_cond_frame_outputs"][frame])["pred_masks"]
        answer = self._model._run_single_frame_inference(
            inference_session=session,
            frame_idx=frame,
            obj_idx=0,
            batch_size=1,
            is_init_cond_frame=False,
            point_inputs=self._points(points, labels, box),
            mask_inputs=None,
            reverse=False,
            prev_sam_mask_logits=before.clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
        )
        session.store_output(0, frame, output_value=answer, is_conditioning_frame=True)
        outputs["non_cond_frame_outputs"].pop(frame, None)
        self._model._batch_encode_memories(
            session, frame, [0], [answer["high_res_masks"]], [answer["object_score_logits"]], [True]
        )
        return answer["pred_masks"][0, 0].numpy().copy(), float(answer["object_score_logits"].squeeze())

    def follow(self, clip: Clip) -> list[dict[int, Answer]]:
        """Does what a clip says, whose frames these are: the answers by object, in `Clip.order`."""
        found = []
        seen: set[tuple[int, int]] = set()
        for one in clip.passes:
            for p in one.prompts:
                mark = self.correct if (p.object_id, p.frame) in seen else self.prompt
                mark(p.object_id, p.frame, p.points, p.labels, p.box)
            for frame, answers in self.propagate(one.start, one.end):
                seen |= {(number, frame) for number in answers}
                found.append(answers)
        return found

    def forget(self, object_id: int) -> None:
        """Drops an object with all it remembers; features of frames stay."""
        del self._sessions[object_id]

    def stored(self, object_id: int) -> list[dict[str, Any]]:
        """What each frame left behind for an object, as transformers stores it, in the order of the frames."""
        outputs = self._sessions[object_id].output_dict_per_obj[0]
        return [v for _, v in sorted({**outputs["non_cond_frame_outputs"], **outputs["cond_frame_outputs"]}.items())]

    def features(self, frame: int) -> dict[str, Any]:
        """Vision features of a frame that was seen, as transformers caches them."""
        kept: dict[str, Any] = self._features[frame]
        return kept

    def propagate(self, start: int, end: int) -> Iterator[tuple[int, dict[int, Answer]]]:
        """Tracks all objects from `start` to `end`, included; backwards where `end` is smaller."""
        step = -1 if end < start else 1
        for frame in range(start, end + step, step):
            yield frame, {i: self._answer(self._run(s, frame, step < 0)) for i, s in self._sessions.items()}

    @torch.inference_mode()
    def _run(self, session: Any, frame: int, reverse: bool) -> Any:
        if frame in self._features:  # the image encoder once per frame, for all objects and passes
            session.cache.cache_vision_features(frame, self._features[frame])
        output = self._model(session, frame_idx=frame, reverse=reverse)
        kept = session.cache.get_vision_features(frame)
        if kept is not None:
            self._features[frame] = kept
        return output

    def _session(self, object_id: int) -> Any:
        if object_id not in self._sessions:
            session = Sam2VideoInferenceSession(
                video=self._video, video_height=self._size[0], video_width=self._size[1], dtype=torch.float32
            )
            session.obj_id_to_idx(object_id)
            self._sessions[object_id] = session
        return self._sessions[object_id]

    def _points(
        self, points: FloatArray | None, labels: npt.NDArray[np.int32] | None, box: FloatArray | None
    ) -> dict[str, Tensor]:
        scale = np.array([self._constants.image_size / self._size[1], self._constants.image_size / self._size[0]])
        coords = np.zeros((0, 2)) if points is None else points * scale
        codes = [] if labels is None else [int(v) for v in labels]
        if box is not None:
            coords, codes = np.concatenate([box.reshape(2, 2) * scale, coords]), [2, 3, *codes]
        return {
            "point_coords": torch.tensor(coords, dtype=torch.float32)[None, None],
            "point_labels": torch.tensor(codes, dtype=torch.int32)[None, None],
        }

    @staticmethod
    def _answer(output: Any) -> Answer:
        return output.pred_masks[0, 0].numpy().copy(), float(output.object_score_logits.squeeze())
