"""A small SmolVLM exported once, and what transformers answers with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.contracts import smolvlm
from pixano_edge.engine.models.smolvlm.model import SmolVlmModel
from pixano_edge.engine.runtime import open_device, open_session


@dataclass
class Exported:
    """A checkpoint folder and its bundle."""

    checkpoint: Path
    bundle: Path

    def open(self, **options: Any) -> SmolVlmModel:
        return SmolVlmModel.open(self.bundle, device="cpu", threads=1, **options)

    def open_plain(self, **options: Any) -> SmolVlmModel:
        """With the decoder of plain operators, which ONNX Runtime runs, too."""
        bundle, device = Bundle.open(self.bundle), open_device("cpu")
        sessions = {
            name: open_session(
                bundle.graph_path(name, "fp32", target="tensorrt" if name == decoders.DECODER else "onnx"),
                bundle.spec(name, "fp32", "tensorrt"),
                device,
                threads=1,
            )
            for name in bundle.specs
        }
        constants = smolvlm.SmolVlmConstants.from_dict(bundle.manifest.constants)
        return SmolVlmModel(
            sessions,
            constants,
            bundle.file(decoders.TOKENIZER).read_bytes(),
            bundle.file(decoders.CHAT_TEMPLATE).read_bytes(),
            bundle_hash=bundle.hash,
            variant="fp32",
            **options,
        )


@dataclass
class Reference:
    """transformers' model and processor."""

    model: Any
    processor: Any

    def generate(self, messages: list[dict[str, Any]], images: list[np.ndarray], tokens: int) -> Any:
        """Prompt ids, answer ids and logits of each step, as numpy; no token ends the answer."""
        import torch
        from PIL import Image

        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [[Image.fromarray(image) for image in images]] if images else None
        inputs = self.processor(text=text, images=pictures, return_tensors="pt")
        inputs.pop("mm_token_type_ids", None)
        with torch.no_grad():
            made = self.model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        logits = torch.cat(made.logits).numpy()
        return inputs["input_ids"][0].numpy(), made.sequences[0, -tokens:].numpy(), logits


@pytest.fixture(scope="session")
def exported(tiny_vlm_checkpoint: Path, tiny_vlm_bundle: Path) -> Exported:
    return Exported(tiny_vlm_checkpoint, tiny_vlm_bundle)


@pytest.fixture(scope="session")
def reference(exported: Exported) -> Reference:
    from transformers import Idefics3Processor

    from pixano_edge.export.smolvlm.checkpoint import load

    loaded = load(exported.checkpoint)
    # The processor of SmolVLM asks for packages that only videos need; for images the two are the same.
    processor = Idefics3Processor(
        loaded.images, loaded.text, image_seq_len=loaded.constants.image_seq_len, chat_template=loaded.template
    )
    return Reference(loaded.model, processor)


@pytest.fixture
def model(exported: Exported) -> Iterator[SmolVlmModel]:
    with exported.open() as found:
        yield found
