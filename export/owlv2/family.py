"""OWLv2 and OWL-ViT in the common pipeline of detectors, and what transformers' model and processor say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import Preprocess
from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.models.detection.base import Detections, check_request
from pixano_edge.engine.models.owlv2.detector import LOGITS, Owlv2Detector
from pixano_edge.engine.models.owlv2.text import Tokenizer
from pixano_edge.export.detection.family import Answer, GraphRun, open_sessions
from pixano_edge.export.differences import Arrays
from pixano_edge.export.owlv2 import graphs
from pixano_edge.export.owlv2.checkpoint import OwlCheckpoint
from pixano_edge.export.photos import Photo


class OwlFamily:
    """A `DetectorFamily`; see there.

    Args:
        loaded: The checkpoint.
    """

    def __init__(self, loaded: OwlCheckpoint) -> None:
        c = loaded.constants
        self.loaded = loaded
        self.family = c.family
        self.source, self.licence, self.notes = loaded.source, loaded.licence, loaded.notes
        self.constants = c.to_dict()
        self.preprocess = Preprocess(resize=c.resize, image_size=c.image_size, mean=c.mean, std=c.std)  # type: ignore[arg-type]
        self.files: Mapping[str, bytes] = {contract.TOKENIZER: loaded.tokenizer}
        self.specs: Mapping[str, GraphSpec] = contract.graphs(c)
        kind = type(loaded.model).__name__
        self.reference = f"transformers {transformers.__version__} {kind}, torch {torch.__version__}, fp32, cpu"

    def modules(self) -> Mapping[str, nn.Module]:
        return graphs.modules(self.loaded.model, self.loaded.constants)

    def example(self, graph: str) -> tuple[Tensor, ...]:
        return graphs.example_inputs(graph, self.loaded.constants)

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        return graphs.kept_in_fp32(graph, model)

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        return graphs.random_feeds(spec, sizes, seed, self.loaded.constants)

    def check_classes(self, classes: Sequence[str]) -> None:
        Tokenizer(self.loaded.tokenizer, self.loaded.constants).encode(check_request(classes))

    def ask(self, photo: Photo, lists: Sequence[Sequence[str]]) -> list[Answer]:
        pixels = self.loaded.images(Image.fromarray(photo.pixels), return_tensors="pt")["pixel_values"]
        image: GraphRun | None = None
        answers = []
        for classes in lists:
            raw = ask_model(self.loaded, pixels, classes)
            if image is None:  # the image side does not know the text
                outputs = {t.name: raw.tensors[t.name] for t in self.specs[contract.IMAGE_ENCODER].outputs}
                image = GraphRun(contract.IMAGE_ENCODER, {contract.PIXEL_VALUES: pixels.numpy()}, outputs)
            text = GraphRun(
                contract.TEXT_ENCODER,
                {contract.INPUT_IDS: raw.tensors[contract.INPUT_IDS]},
                {contract.TEXT_EMBEDS: raw.tensors[contract.TEXT_EMBEDS]},
            )
            trace = {
                contract.PIXEL_VALUES: pixels.numpy(),
                contract.INPUT_IDS: raw.tensors[contract.INPUT_IDS],
                contract.TEXT_EMBEDS: raw.tensors[contract.TEXT_EMBEDS],
                LOGITS: raw.tensors[LOGITS][0],
                **{name: value[0] for name, value in image.want.items()},
            }
            names = tuple(classes)

            def detect(threshold: float, raw: Raw = raw, names: tuple[str, ...] = names) -> Detections:
                return final_detections(self.loaded, raw.output, photo.size, names, threshold)

            answers.append(Answer(photo, names, [image, text], trace, detect(0.0).scores, detect))
        return answers

    def settle(self, run: GraphRun, got: Arrays) -> Arrays:
        return got

    @contextmanager
    def open(self, files: Mapping[str, Path], threads: int | None, optimise: bool) -> Iterator[Owlv2Detector]:
        with open_sessions(files, self.specs, threads, optimise) as sessions:
            yield Owlv2Detector(
                sessions[contract.IMAGE_ENCODER],
                sessions[contract.TEXT_ENCODER],
                self.loaded.constants,
                self.loaded.tokenizer,
                bundle_hash="parity",
                variant="parity",
            )


class Raw:
    """What transformers' model answered.

    Attributes:
        output: Its own output object.
        tensors: By contract name, and `LOGITS`.
    """

    def __init__(self, output: Any, tensors: Arrays) -> None:
        self.output = output
        self.tensors = tensors


def ask_model(loaded: OwlCheckpoint, pixels: Tensor, classes: Sequence[str]) -> Raw:
    """Runs the stock model once, and takes from its class head what the output does not show.

    Args:
        loaded: The checkpoint.
        pixels: (1, 3, S, S).
        classes: Asked for.
    """
    model, c = loaded.model, loaded.constants
    tokens = loaded.text(list(classes), padding="max_length", max_length=c.max_tokens, return_tensors="pt")
    inner: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: inner.__setitem__(name, output)

    head = model.class_head
    hooks = [getattr(head, name).register_forward_hook(keep(name)) for name in ("dense0", "logit_shift", "logit_scale")]
    try:
        with torch.no_grad():
            output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    finally:
        for hook in hooks:
            hook.remove()
    text = output.text_embeds[0]
    tensors = {
        contract.INPUT_IDS: tokens["input_ids"].numpy().astype(np.int32),
        # As the class head sees it.
        contract.TEXT_EMBEDS: (text / (torch.linalg.norm(text, dim=-1, keepdim=True) + 1e-6)).numpy(),
        contract.BOXES: output.pred_boxes.numpy(),
        contract.CLASS_EMBEDS: inner["dense0"].numpy(),
        contract.LOGIT_SHIFT: inner["logit_shift"].numpy(),
        contract.LOGIT_SCALE: (head.elu(inner["logit_scale"]) + 1).numpy(),
        LOGITS: output.logits.numpy(),
    }
    if c.objectness:
        tensors[contract.OBJECTNESS] = output.objectness_logits.numpy()
    return Raw(output, tensors)


def final_detections(
    loaded: OwlCheckpoint, output: Any, size: tuple[int, int], classes: tuple[str, ...], threshold: float
) -> Detections:
    """What the stock processor makes of an output, clipped to the picture, without boxes wholly outside it."""
    (found,) = loaded.images.post_process_object_detection(output, threshold=threshold, target_sizes=[size])
    return as_detections(found["boxes"], found["scores"], found["labels"], size, classes)


def as_detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int], classes: tuple[str, ...]
) -> Detections:
    """PyTorch's boxes in the form of the engine's answers, best score first."""
    height, width = size
    order = torch.argsort(scores, descending=True, stable=True)
    clipped = torch.minimum(boxes[order].clamp(min=0), torch.tensor([width, height, width, height])).float()
    kept = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    order = order[kept]
    return Detections(clipped[kept].numpy(), scores[order].numpy(), labels[order].numpy(), classes)
