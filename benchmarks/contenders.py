"""The three who race: the engine, plain ONNX Runtime on the same graphs, and PyTorch with transformers' ``Sam2Model``.

Each decodes its own features, so the accuracy of a decoder row is what a user of that contender gets end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime import open_device, open_session

from .torch_options import compile_modules

if TYPE_CHECKING:
    from .segment import Inputs

Outputs = dict[str, npt.NDArray[np.float32]]

ENCODER_CASE = "encoder"
MASK_CASE = "decoder, one click + mask"
CLICK_CASE = "whole click to 960x540"
FEATURES = (sam2.IMAGE_EMBED, sam2.HIGH_RES_0, sam2.HIGH_RES_1)


def prompt_arrays(inputs: Inputs, use_mask: bool) -> dict[str, npt.NDArray[Any]]:
    """Decoder inputs of one click: the point and the padding point, and the mask input with its switch."""
    return {
        sam2.POINT_COORDS: np.array([[inputs.point, (0.0, 0.0)]], np.float32),
        sam2.POINT_LABELS: np.array([[sam2.LABEL_FOREGROUND, sam2.LABEL_PAD]], np.int32),
        sam2.MASK_INPUT: (inputs.mask if use_mask else np.zeros_like(inputs.mask))[None, None],
        sam2.HAS_MASK_INPUT: np.array([float(use_mask)], np.float32),
    }


def click_prompt(inputs: Inputs, c: Sam2Constants) -> Prompt:
    """The click of `prompt_arrays` as a user sends it, in pixels of the picture."""
    height, width = inputs.picture.shape[:2]
    x, y = inputs.point
    return Prompt(points=[(x * width / c.image_size, y * height / c.image_size)], labels=[1])


def signs(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Masks as tensors that `compare` takes: 1 inside, -1 outside."""
    return np.where(masks, np.float32(1), np.float32(-1))


class EngineContender:
    """The engine's own sessions with bound buffers, and its predictor for the whole click."""

    def __init__(self, bundle: Bundle, constants: Sam2Constants, inputs: Inputs, threads: int | None) -> None:
        device = open_device("cpu")
        specs = sam2.graphs(constants)
        self._encoder, self._decoder = (
            open_session(bundle.graph_path(name), specs[name], device, threads=threads)
            for name in (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)
        )
        self._inputs = inputs
        self._prompts = {use: prompt_arrays(inputs, use) for use in (False, True)}
        self._encoding = self._encoder.prepare()
        self._decoding = self._decoder.prepare({"P": 1, "N": 2})
        for name in FEATURES:  # the encoder writes where the decoder reads, as in the predictor
            self._decoding.bind(name, self._encoding.outputs[name])
        self._predictor = Sam2ImagePredictor.open(bundle, device="cpu", precision="fp32", threads=threads)
        self._embedding = self._predictor.encode(inputs.picture)
        self._click = click_prompt(inputs, constants)

    def close(self) -> None:
        """Frees the sessions."""
        self._predictor.close()
        self._decoder.close()
        self._encoder.close()

    def encode(self) -> None:
        self._encoding.write(sam2.PIXEL_VALUES, self._inputs.pixels)
        self._encoding.run()

    def _decode(self, use_mask: bool) -> None:
        for name, array in self._prompts[use_mask].items():
            self._decoding.write(name, array)
        self._decoding.run()

    def decode(self) -> None:
        self._decode(False)

    def decode_with_mask(self) -> None:
        self._decode(True)

    def click(self) -> Any:
        return self._predictor.predict(self._embedding, [self._click], multimask=True)

    def outputs(self, case: str) -> Outputs:
        """What the case computes: features; the three multimask logits and their scores; or masks, -1 and 1."""
        if case == CLICK_CASE:
            return {sam2.MASKS: signs(self.click().masks)}
        self.encode()
        if case == ENCODER_CASE:
            return {name: self._encoding.read(name).copy() for name in FEATURES}
        self._decode(case == MASK_CASE)
        return {name: self._decoding.read(name)[:, 1:].copy() for name in (sam2.MASKS, sam2.IOU_SCORES)}


class GraphRunner(Protocol):
    """One ONNX file in some runtime, with arrays in and out."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Outputs:
        """Outputs by name; the next call may overwrite them."""
        ...


class OrtGraph:
    """``InferenceSession.run`` with numpy in and out, as most projects call ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Outputs:
        """See `GraphRunner.run`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds))))


class FileContender:
    """Encoder and decoder files of a bundle in a runtime of their own; who only runs graphs has no whole click.

    Args:
        bundle: Whose fp32 files.
        inputs: Of the race.
        open_graph: Opens a file.
    """

    click: Callable[[], object] | None = None

    def __init__(self, bundle: Bundle, inputs: Inputs, open_graph: Callable[[Path], GraphRunner]) -> None:
        self._encoder, self._decoder = (
            open_graph(bundle.graph_path(name)) for name in (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)
        )
        self._inputs = inputs
        self._prompts = {use: prompt_arrays(inputs, use) for use in (False, True)}
        self._features: Outputs = {}
        self.encode()

    def encode(self) -> None:
        self._features = self._encoder.run({sam2.PIXEL_VALUES: self._inputs.pixels})

    def _decode(self, use_mask: bool) -> Outputs:
        return self._decoder.run({**{name: self._features[name] for name in FEATURES}, **self._prompts[use_mask]})

    def decode(self) -> Outputs:
        return self._decode(False)

    def decode_with_mask(self) -> Outputs:
        return self._decode(True)

    def outputs(self, case: str) -> Outputs:
        """As `EngineContender.outputs`."""
        if case == ENCODER_CASE:
            return {name: self._features[name].copy() for name in FEATURES}
        found = self._decode(case == MASK_CASE)
        return {name: found[name][:, 1:].copy() for name in (sam2.MASKS, sam2.IOU_SCORES)}


class TorchContender:
    """transformers' ``Sam2Model`` with scaled dot product attention under ``inference_mode``; with `compiled`, encoder
    and decoder go through ``torch.compile``."""

    def __init__(self, checkpoint: Path, inputs: Inputs, threads: int, dtype: str, compiled: bool = False) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        kind = getattr(torch, dtype)
        model = transformers.Sam2Model.from_pretrained(checkpoint, dtype=kind, attn_implementation="sdpa")
        self._model = model.eval()
        self._pixels = torch.from_numpy(inputs.pixels).to(kind)
        self._point = torch.tensor(inputs.point, dtype=kind).reshape(1, 1, 1, 2)
        self._label = torch.ones(1, 1, 1, dtype=torch.int32)
        self._mask = torch.from_numpy(inputs.mask).to(kind)[None, None]
        self._size = inputs.picture.shape[:2]
        self._features: list[Any] = []
        if compiled:
            compile_modules(self._model, ("vision_encoder", "mask_decoder"))
        self.encode()

    def encode(self) -> None:
        with self._torch.inference_mode():
            self._features = self._model.get_image_embeddings(self._pixels)

    def _decode(self, mask: Any = None) -> Any:
        with self._torch.inference_mode():
            return self._model(
                image_embeddings=list(self._features),
                input_points=self._point,
                input_labels=self._label,
                input_masks=mask,
                multimask_output=True,
            )

    def decode(self) -> Any:
        return self._decode()

    def decode_with_mask(self) -> Any:
        return self._decode(self._mask)

    def click(self) -> Any:
        """Decoder, bilinear resize to the picture and threshold, as the processor's ``post_process_masks``."""
        with self._torch.inference_mode():
            logits = self._decode().pred_masks[0].float()
            resize = self._torch.nn.functional.interpolate
            return (resize(logits, self._size, mode="bilinear", align_corners=False) > 0).numpy()

    def outputs(self, case: str) -> Outputs:
        """As `EngineContender.outputs`, in float32."""
        if case == CLICK_CASE:
            return {sam2.MASKS: signs(self.click())}
        if case == ENCODER_CASE:
            high_0, high_1, embed = (f.float().numpy() for f in self._features)
            return {sam2.IMAGE_EMBED: embed, sam2.HIGH_RES_0: high_0, sam2.HIGH_RES_1: high_1}
        answer = self._decode(self._mask if case == MASK_CASE else None)
        return {sam2.MASKS: answer.pred_masks[0].float().numpy(), sam2.IOU_SCORES: answer.iou_scores[0].float().numpy()}
