"""Who detects in `bench detect`: the engine, and transformers' model with its processor, from picture to boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import grounding_dino, owlv2
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.opening import open_detector

Rgb = npt.NDArray[np.uint8]
Call = Callable[[], object]


class EngineDetections:
    """The engine's detector of a bundle.

    Attributes:
        first: A call with everything that was kept dropped before.
        cached: A call for another picture: features of text are kept, those of images are dropped before.
        same: A call for the same picture again; None for a family that keeps no features of images.
    """

    def __init__(self, bundle: Bundle, picture: Rgb, classes: Sequence[str], threads: int, precision: str) -> None:
        self.detector: Any = open_detector(bundle, device="cpu", precision=precision, threads=threads)
        self.precision = str(self.detector.info()["precision"])
        self._picture = picture
        self._classes = tuple(classes)
        self._images = getattr(self.detector, "image_cache", None)
        self.same: Call | None = None if self._images is None else self._call

    def first(self) -> Detections:
        self.detector.shrink()
        return self._call()

    def cached(self) -> Detections:
        if self._images is not None:
            self._images.clear()
        return self._call()

    def _call(self) -> Detections:
        return self.answer()

    def answer(self, threshold: float = 0.5) -> Detections:
        """Boxes that score above a threshold."""
        found: Detections = self.detector.detect(
            self._picture, self._classes, box_threshold=threshold, text_threshold=min(threshold, 0.5)
        )
        return found

    @property
    def texts(self) -> int:
        """Lists of classes whose features were computed so far."""
        return int(self.detector.text_cache.stats().misses)

    def close(self) -> None:
        """Frees the sessions."""
        self.detector.close()


class TorchDetections:
    """transformers' detector and processor; they keep nothing, so every call is the same.

    Attributes:
        first, cached, same: The call.
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Path,
        picture: Rgb,
        classes: Sequence[str],
        threads: int,
        dtype: str,
        compiled: bool = False,
    ) -> None:
        import torch
        import transformers
        from PIL import Image

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        self._kind = getattr(torch, dtype)
        self._picture = Image.fromarray(picture)
        self._size = (picture.shape[0], picture.shape[1])
        self._classes = tuple(classes)
        family = bundle.manifest.family
        load, self._process, self._answer = {
            owlv2.OWLV2: ("Owlv2", self._owl_inputs, self._owl_answer),
            owlv2.OWLVIT: ("OwlViT", self._owl_inputs, self._owl_answer),
            grounding_dino.FAMILY: ("GroundingDino", self._dino_inputs, self._dino_answer),
        }[family]
        model = getattr(transformers, f"{load}ForObjectDetection")
        self._model = model.from_pretrained(checkpoint, dtype=self._kind, local_files_only=True).eval()
        if compiled:
            self._model.compile()
        # Not AutoProcessor, which takes the image processors that need torchvision.
        self._images = getattr(transformers, f"{load}ImageProcessorPil").from_pretrained(checkpoint)
        if family == grounding_dino.FAMILY:
            from pixano_edge.engine.models.grounding_dino.text import Captioner

            tokenizer = transformers.BertTokenizer.from_pretrained(checkpoint)
            self._processor = transformers.GroundingDinoProcessor(self._images, tokenizer)
            constants = grounding_dino.GroundingDinoConstants.from_dict(bundle.manifest.constants)
            captioner = Captioner(bundle.file(grounding_dino.TOKENIZER).read_bytes(), constants)
            captions = captioner.captions(self._classes)
            if len(captions) > 1:
                raise PromptError(
                    f"{len(self._classes)} classes do not fit one caption, and transformers would cut it off.",
                    "Give fewer --classes, or time the engine alone: --bundle without --checkpoint.",
                )
            self._caption = captions[0]
        else:
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint)
            self._max_tokens = owlv2.OwlConstants.from_dict(bundle.manifest.constants).max_tokens
        self.first = self.cached = self.same = self._call

    def _owl_inputs(self) -> dict[str, Any]:
        tokens = self._tokenizer(
            list(self._classes), padding="max_length", max_length=self._max_tokens, return_tensors="pt"
        )
        return {**tokens, **self._images(self._picture, return_tensors="pt")}

    def _dino_inputs(self) -> dict[str, Any]:
        return dict(self._processor(images=self._picture, text=[list(self._classes)], return_tensors="pt"))

    def _run(self) -> tuple[dict[str, Any], Any]:
        inputs = self._process()
        inputs["pixel_values"] = inputs["pixel_values"].to(self._kind)
        with self._torch.inference_mode():
            output = self._model(**inputs)
        output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
        return inputs, output

    def _call(self) -> object:
        inputs, output = self._run()
        if hasattr(self, "_processor"):
            return self._processor.post_process_grounded_object_detection(
                output, inputs["input_ids"], threshold=0.5, text_threshold=0.5, target_sizes=[self._size]
            )
        return self._images.post_process_object_detection(output, threshold=0.5, target_sizes=[self._size])

    def answer(self, threshold: float = 0.5) -> Detections:
        """Boxes that score above a threshold, with a class of the list for each."""
        return self._answer(self._run()[1], threshold)

    def _owl_answer(self, output: Any, threshold: float) -> Detections:
        (found,) = self._images.post_process_object_detection(output, threshold=threshold, target_sizes=[self._size])
        return self._sorted(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy())

    def _dino_answer(self, output: Any, threshold: float) -> Detections:
        from pixano_edge.engine.models.grounding_dino.postprocess import find

        # transformers names what it found by fragments of the text; the engine's rule tells which class they mean.
        logits = output.logits[0, :, : len(self._caption)].numpy()
        found = find(
            logits, output.pred_boxes[0].numpy(), self._caption.labels, self._caption.edges, self._size, threshold, 0.0
        )
        return self._sorted(found.boxes, found.scores, found.labels)

    def _sorted(self, boxes: Any, scores: Any, labels: Any) -> Detections:
        """Clipped, without boxes outside the picture, best first."""
        height, width = self._size
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        order = order[(boxes[order, 2:] > boxes[order, :2]).all(axis=1)]
        return Detections(boxes[order], scores[order], labels[order].astype(np.int64), self._classes)
