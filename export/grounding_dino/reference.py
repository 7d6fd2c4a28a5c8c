"""What transformers' model and processor say of a photo, for parity and golden samples.

Boxes and probabilities are the stock model's, its processor prepares image and text, and its processor turns boxes into
pixels. Which class a box belongs to is read off the probabilities of each class's own tokens (see
`pixano_edge.engine.models.grounding_dino.postprocess`), found here from the processor's token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.models.grounding_dino.modeling_grounding_dino import (
    SPECIAL_TOKENS,
    generate_masks_with_special_tokens_and_transfer_map,
)

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.export.differences import Arrays
from pixano_edge.export.photos import Photo


@dataclass(frozen=True, eq=False)
class Stock:
    """One photo and one list of classes.

    Attributes:
        size: (height, width) of the photo.
        classes: Asked for.
        inputs: Inputs of both graphs by name, as the stock model made them.
        outputs: Outputs of both graphs by name.
        boxes: (Q, 4) x1, y1, x2, y2 in pixels.
        scores: (Q,) of the best class.
        labels: (Q,) the best class.
    """

    size: tuple[int, int]
    classes: tuple[str, ...]
    inputs: Arrays
    outputs: Arrays
    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def detect(self, threshold: float) -> Detections:
        """Detections above a box threshold, best first, clipped to the photo."""
        kept = np.flatnonzero(self.scores > threshold)
        kept = kept[np.argsort(-self.scores[kept], kind="stable")]
        limit = np.array([self.size[1], self.size[0]] * 2, np.float32)
        return Detections(np.clip(self.boxes[kept], 0.0, limit), self.scores[kept], self.labels[kept], self.classes)


def check_names(classes: Sequence[str]) -> None:
    """Raises ExportError where the stock processor could not tell the classes apart: a dot or a question mark ends a
    phrase, and equal phrases are one."""
    names = [name.strip().lower() for name in classes]
    if any(c in name for name in names for c in ".?") or len(set(names)) < len(names):
        raise ExportError(
            "Classes to measure parity on must differ and hold no dot or question mark.", "Give other --classes."
        )


def ask(model: Any, processor: Any, photo: Photo, classes: Sequence[str]) -> Stock:
    """Runs the stock model and processor.

    Raises:
        ExportError: The classes do not fit one caption, which the stock model would cut off, or one has a dot or a
            question mark, or two are equal: there the stock processor has no answer to compare with.
    """
    check_names(classes)
    names = [name.strip().lower() for name in classes]
    inputs = processor(images=Image.fromarray(photo.pixels), text=list(classes), return_tensors="pt")
    tokens: Any = inputs["input_ids"]
    ids: list[int] = tokens[0].tolist()
    if len(ids) > model.config.max_text_len:
        raise ExportError(f"The classes have {len(ids)} tokens, too many for one caption.", "Give fewer --classes.")
    features: list[torch.Tensor] = []
    hook = model.model.text_projection.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    finally:
        hook.remove()
    (found,) = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=-1.0, text_threshold=1.0, target_sizes=[photo.size]
    )
    logits = outputs.logits[:, :, : len(ids)]
    # The number of the phrase that each token belongs to; -1 for what separates them.
    special = torch.isin(inputs["input_ids"][0], torch.tensor(SPECIAL_TOKENS))
    owner = torch.where(special, -1, special.cumsum(0) - 1).numpy()
    probabilities = logits[0].sigmoid().numpy()
    per_class = np.stack([probabilities[:, owner == k].max(axis=1) for k in range(len(names))], axis=1)
    labels = per_class.argmax(axis=1)
    special_tokens: Any = torch.tensor(SPECIAL_TOKENS)
    mask, positions = generate_masks_with_special_tokens_and_transfer_map(tokens, special_tokens)
    selection = outputs.enc_outputs_class[:, :, : len(ids)].amax(-1).topk(model.config.num_queries, dim=1)[0]
    return Stock(
        size=photo.size,
        classes=tuple(classes),
        inputs={
            contract.PIXEL_VALUES: inputs["pixel_values"].numpy(),
            contract.INPUT_IDS: inputs["input_ids"].numpy().astype(np.int32),
            contract.POSITION_IDS: positions.numpy().astype(np.int32),
            contract.TEXT_SELF_ATTENTION_MASK: mask.numpy().astype(np.float32),
        },
        outputs={
            contract.TEXT_FEATURES: features[0].numpy(),
            contract.LOGITS: logits.numpy(),
            contract.BOXES: outputs.pred_boxes.numpy(),
            contract.SELECTION_SCORES: selection.numpy(),
        },
        boxes=found["boxes"].numpy().astype(np.float32),
        scores=per_class.max(axis=1).astype(np.float32),
        labels=labels.astype(np.int64),
    )
