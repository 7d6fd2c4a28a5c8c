"""Who races on a GPU: the engine on each back end, launch by launch and as a recorded graph, and PyTorch.

Every contender has a stream of its own and the same input. Two clocks run: the GPU's own, by events around the upload
and the launches of a call, and the wall clock around the whole call with its wait at the end. What the host prepares
before the first event (prompts copied into page-locked memory) is in the second only. Pixels lie ready in page-locked
memory for everyone. The whole click is mostly the host's work (prompt arrays, the wait, choosing masks, scaling them to
the photo), so it has the wall clock alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.chain import Chain
from pixano_edge.engine.models.opening import locate
from pixano_edge.engine.models.sam2.opening import IMAGE_GRAPHS
from pixano_edge.engine.models.sam2.predictor import Embedding, Sam2ImagePredictor
from pixano_edge.engine.runtime import open_device, open_session
from pixano_edge.engine.runtime.base import Binding, Session

from .contenders import CLICK_CASE, ENCODER_CASE, FEATURES, MASK_CASE, Outputs, click_prompt, prompt_arrays, signs
from .segment import Inputs

DECODER_CASE = "decoder, one click"
CASES = (ENCODER_CASE, DECODER_CASE, MASK_CASE, CLICK_CASE)
ORT_TENSORRT = "onnxruntime-tensorrt"
_LABELS = {"onnxruntime": "ONNX Runtime CUDA", ORT_TENSORRT: "ONNX Runtime TensorRT", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class Way:
    """One way to run the graphs."""

    backend: str
    precision: str
    capture: bool

    def __str__(self) -> str:
        return f"{_LABELS.get(self.backend, self.backend)} {self.precision}, {'graph' if self.capture else 'eager'}"

    def options(self) -> dict[str, Any] | None:
        """Options of the back end."""
        if self.backend == "tensorrt" and not self.capture:
            return {"graphs": False}
        if self.backend == ORT_TENSORRT and self.precision == "fp16":
            # The provider builds weakly typed networks, which refuse fp16 tensors unless fp16 is allowed.
            return {"provider_options": {"trt_fp16_enable": "1"}}
        return None


@dataclass(frozen=True)
class Start:
    """What a user waits for once.

    Attributes:
        load: Seconds to open the device and both graphs.
        first: Seconds of the first encoder and decoder run together: lazy initialisation, first allocations.
        settle: Seconds of the runs after them until nothing changes any more, recording of graphs included.
        recorded: Whether launches are replayed from then on.
        memory: Bytes of device memory that became used meanwhile, by this and by whatever else ran on the GPU; None
            where the device does not tell.
    """

    load: float
    first: float
    settle: float
    recorded: bool
    memory: int | None


class GpuContender:
    """The engine's sessions on a GPU, chained on the device; the predictor uses them in the same way.

    Raises:
        EdgeError: The device, the files or the back end are not there; or, for ``way.capture``, launches of neither
            graph can be recorded (another name for the eager one would be no figure of its own).
    """

    def __init__(self, bundle: Bundle, constants: Sam2Constants, inputs: Inputs, way: Way, device: str) -> None:
        self.way = way
        self.milliseconds: dict[str, list[float]] = {case: [] for case in CASES}
        self._inputs = inputs
        self._constants = constants
        self._filled = False
        self._prompts = {use: prompt_arrays(inputs, use) for use in (False, True)}
        self._click = click_prompt(inputs, constants)
        self._predictor: Sam2ImagePredictor | None = None
        self._embedding: Embedding | None = None
        with contextlib.ExitStack() as opened:
            begin = time.perf_counter()
            self.device = open_device(device)
            opened.callback(self.device.close)
            info = self.device.info()
            files = locate(bundle, way.backend, way.precision, info, IMAGE_GRAPHS).files
            sessions: dict[str, Session] = {}
            for name, spec in sam2.graphs(constants).items():
                sessions[name] = open_session(
                    files[name], spec, self.device, backend=way.backend, options=way.options()
                )
                opened.callback(sessions[name].close)
            self._chain = Chain(self.device, capture=way.capture)
            opened.callback(self._chain.close)
            self._encoder, self._decoder = sessions[sam2.IMAGE_ENCODER], sessions[sam2.MASK_DECODER]
            if way.capture:
                self._check_recordable()
            self._encoding = self._encoder.prepare()
            self._decoding = self._decoder.prepare({"P": 1, "N": 2})
            self._features = {name: self._encoding.outputs[name] for name in FEATURES}
            load = time.perf_counter() - begin
            self.start = self._settle(load, info.memory_free)
            self._opened = opened.pop_all()

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """What is timed, by case; each call ends when the GPU is done."""
        return {
            ENCODER_CASE: self.encode,
            DECODER_CASE: self.decode,
            MASK_CASE: self.decode_with_mask,
            CLICK_CASE: self.click,
        }

    def enter(self, case: str) -> None:
        """Brings a case to its steady state; the predictor and the cases before it bind other buffers.

        Raises:
            EdgeError: The case does not run here; or, for ``way.capture``, the launches of its graph cannot be
                recorded: ONNX Runtime computes the sizes of open dimensions on the CPU.
        """
        session = self._encoder if case == ENCODER_CASE else self._decoder
        if self.way.capture and not self._chain.captures(session):
            raise self._not_recordable(session)
        for _ in range(self._chain.warm_runs(session)):
            self.calls()[case]()
        if case == CLICK_CASE and self._predictor is not None and self._chain.captures(session):
            facts = self._predictor.info()
            if not session.self_recording and not facts["stream"]["replays"]:
                raise DeviceError(
                    f"{self.way}: recording did not work in the predictor. {' '.join(facts['warnings'])}".strip(),
                    "The eager figures stand for it.",
                )
        for times in self.milliseconds.values():
            times.clear()

    def encode(self) -> None:
        self._timed(ENCODER_CASE, self._encoding, {sam2.PIXEL_VALUES: self._inputs.pixels})

    def decode(self) -> None:
        self._timed(DECODER_CASE, self._decoding, self._prompts[False])

    def decode_with_mask(self) -> None:
        self._timed(MASK_CASE, self._decoding, self._prompts[True])

    def click(self) -> Any:
        """What a user of the engine waits for after a click on a photo that is encoded already."""
        if self._predictor is None:
            self._predictor = Sam2ImagePredictor(
                self._encoder,
                self._decoder,
                self._constants,
                bundle_hash="benchmark",
                variant=self.way.precision,
                capture=self.way.capture,
            )
            self._opened.callback(self._predictor.close)
        if self._embedding is None:
            self._embedding = self._predictor.encode(self._inputs.picture)
        return self._predictor.predict(self._embedding, [self._click], multimask=True)

    def outputs(self, case: str) -> Outputs:
        """What the case computes: features; the three multimask logits and their scores; or masks, -1 and 1."""
        if case == CLICK_CASE:
            return {sam2.MASKS: signs(self.click().masks)}
        self.encode()
        if case == ENCODER_CASE:
            return {name: a.copy() for name, a in self._chain.fetch(self._encoding, FEATURES).items()}
        self.calls()[case]()
        names = (sam2.MASKS, sam2.IOU_SCORES)
        return {name: a[:, 1:].copy() for name, a in self._chain.fetch(self._decoding, names).items()}

    def warnings(self) -> list[str]:
        """What the sessions and the recording said."""
        sessions = (self._encoder, self._decoder)
        found = [f"{s.spec.name}: {text}" for s in sessions for text in s.info()["warnings"]]
        found += self._chain.warnings.values()
        if self._predictor is not None:
            known = [text for s in sessions for text in s.info()["warnings"]]
            found += [f"{CLICK_CASE}: {text}" for text in self._predictor.info()["warnings"] if text not in known]
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Frees predictor, sessions, recordings and the device."""
        self._embedding = None
        self._opened.close()

    def _timed(self, case: str, binding: Binding, values: Mapping[str, npt.NDArray[Any]]) -> None:
        # The encoder writes where the decoder reads; the predictor binds its own buffers to the same bindings.
        for name, buffer in self._features.items():
            binding.bind(name, buffer)
        for name, value in values.items():
            target = self._chain.stage(binding, name)
            # The predictor resizes pictures right into this memory, so a copy of pixels would be work nobody has.
            if name != sam2.PIXEL_VALUES or not self._filled:
                np.copyto(target, value, casting="no")
        self._filled = True
        begin = self.device.record(timed=True)
        for name in values:
            self._chain.send(binding, name)
        self._chain.launch(binding)
        end = self.device.record(timed=True)
        self.device.synchronize()
        self.milliseconds[case].append(self.device.elapsed(begin, end))

    def _settle(self, load: float, free_before: int | None) -> Start:
        begin = time.perf_counter()
        self.encode()
        self.decode()
        first = time.perf_counter() - begin
        for session, run in ((self._encoder, self.encode), (self._decoder, self.decode)):
            for _ in range(self._chain.warm_runs(session)):
                run()
        settle = time.perf_counter() - begin - first
        recorded = self.way.capture and self._replays()
        if self.way.capture and not recorded:
            words = " ".join(self._chain.warnings.values()) or "No launch was replayed."
            raise DeviceError(f"{self.way}: recording did not work. {words}", "The eager figures stand for it.")
        for times in self.milliseconds.values():
            times.clear()
        free = self.device.info().memory_free
        used = None if free is None or free_before is None else free_before - free
        return Start(load, first, settle, recorded, used)

    def _replays(self) -> bool:
        own = [s for s in (self._encoder, self._decoder) if s.self_recording]
        if own:
            return all(isinstance(n := s.info().get("graphs"), int) and n > 0 for s in own)
        return bool(self._chain.info()["replays"])

    def _check_recordable(self) -> None:
        """Raises the reason where neither graph's launches can be recorded."""
        if not any(self._chain.captures(session) for session in (self._encoder, self._decoder)):
            raise self._not_recordable(self._encoder)

    def _not_recordable(self, session: Session) -> DeviceError:
        said = " ".join(session.info()["warnings"])
        return DeviceError(
            f"{self.way}: launches of '{session.spec.name}' cannot be recorded. {said}".strip(),
            "The eager figures stand for it.",
        )


class TorchGpuContender:
    """transformers' ``Sam2Model`` on the GPU with scaled dot product attention under ``inference_mode``."""

    def __init__(self, checkpoint: Path, inputs: Inputs, dtype: str, device: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.milliseconds: dict[str, list[float]] = {case: [] for case in CASES}
        self._torch = torch
        begin = time.perf_counter()
        self._device = torch.device(device)
        free = torch.cuda.mem_get_info(self._device)[0]
        self._stream = torch.cuda.Stream(self._device)
        kind = getattr(torch, dtype)
        model = transformers.Sam2Model.from_pretrained(checkpoint, dtype=kind, attn_implementation="sdpa")
        self._model = model.eval().to(self._device)
        # Page-locked, as the engine's inputs are, so that uploads do not wait.
        self._pixels = torch.from_numpy(inputs.pixels).to(kind).pin_memory()
        self._point = torch.tensor(inputs.point, dtype=kind).reshape(1, 1, 1, 2).pin_memory()
        self._label = torch.ones(1, 1, 1, dtype=torch.int32).pin_memory()
        self._mask = torch.from_numpy(inputs.mask).to(kind)[None, None].pin_memory()
        self._size = inputs.picture.shape[:2]
        self._features: list[Any] = []
        self._answer: Any = None
        load = time.perf_counter() - begin
        begin = time.perf_counter()
        self.encode()
        self.decode()
        first = time.perf_counter() - begin
        for run in (self.encode, self.decode):
            run()
        settle = time.perf_counter() - begin - first
        for times in self.milliseconds.values():
            times.clear()
        used = free - torch.cuda.mem_get_info(self._device)[0]
        self.start = Start(load, first, settle, False, used)

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """As `GpuContender.calls`."""
        return {
            ENCODER_CASE: self.encode,
            DECODER_CASE: self.decode,
            MASK_CASE: self.decode_with_mask,
            CLICK_CASE: self.click,
        }

    def enter(self, case: str) -> None:
        """As `GpuContender.enter`."""
        self.calls()[case]()
        for times in self.milliseconds.values():
            times.clear()

    def encode(self) -> None:
        self._timed(ENCODER_CASE, self._encode)

    def decode(self) -> None:
        self._timed(DECODER_CASE, self._decode)

    def decode_with_mask(self) -> None:
        self._timed(MASK_CASE, lambda: self._decode(self._mask))

    def click(self) -> npt.NDArray[np.bool_]:
        """Decoder, bilinear resize to the picture and threshold on the GPU, as the processor's
        ``post_process_masks``, and the masks brought to the host."""
        torch = self._torch
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._decode()
            logits = self._answer.pred_masks[0].float()
            resize = torch.nn.functional.interpolate
            masks = resize(logits, self._size, mode="bilinear", align_corners=False) > 0
            answer: npt.NDArray[np.bool_] = masks.cpu().numpy()  # waits
        return answer

    def outputs(self, case: str) -> Outputs:
        """As `GpuContender.outputs`, in float32."""
        if case == CLICK_CASE:
            return {sam2.MASKS: signs(self.click())}
        self.encode()
        if case == ENCODER_CASE:
            high_0, high_1, embed = (f.float().cpu().numpy() for f in self._features)
            return {sam2.IMAGE_EMBED: embed, sam2.HIGH_RES_0: high_0, sam2.HIGH_RES_1: high_1}
        self.calls()[case]()
        answer = self._answer
        return {
            sam2.MASKS: answer.pred_masks[0].float().cpu().numpy(),
            sam2.IOU_SCORES: answer.iou_scores[0].float().cpu().numpy(),
        }

    def warnings(self) -> list[str]:
        return []

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = self._answer = None
        self._features = []
        self._torch.cuda.empty_cache()

    def _encode(self) -> None:
        self._features = self._model.get_image_embeddings(self._pixels.to(self._device, non_blocking=True))

    def _decode(self, mask: Any = None) -> None:
        self._answer = self._model(
            image_embeddings=list(self._features),
            input_points=self._point.to(self._device, non_blocking=True),
            input_labels=self._label.to(self._device, non_blocking=True),
            input_masks=None if mask is None else mask.to(self._device, non_blocking=True),
            multimask_output=True,
        )

    def _timed(self, case: str, work: Callable[[], None]) -> None:
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            begin.record(self._stream)
            work()
            end.record(self._stream)
        self._stream.synchronize()
        self.milliseconds[case].append(begin.elapsed_time(end))
