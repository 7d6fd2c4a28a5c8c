"""SmolVLM at the shape of 256M, seeded weights: the same tokens as transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.smolvlm.model import SmolVlmModel
from pixano_edge.engine.models.text.messages import read_conversation
from tests.support.vlm import picture, without_memory, write_smolvlm

from .conftest import Reference

TOKENS = 64
BAR = 1e-3


@pytest.mark.slow  # 1 GB of weights to make and export, and 64 tokens of transformers for each case
@pytest.mark.parametrize(
    ("question", "sizes"), [("What is on this image?", [(301, 517)]), ("Compare.", [(64, 64)] * 2)]
)
def test_tokens_and_logits_are_those_of_transformers(real: Any, question: str, sizes: list[tuple[int, int]]) -> None:
    bundle, reference = real
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    ids, tokens, logits = reference.generate([{"role": "user", "content": content}], images, TOKENS)
    assert len(set(tokens.tolist())) > 10
    conversation = read_conversation(question, images)
    with SmolVlmModel.open(bundle, device="cpu", threads=2) as model:
        np.testing.assert_array_equal(model.prepare(conversation, images).ids, ids)
        got = list(model.logits(conversation, images, tokens[:-1].tolist()))
        assert [int(step.argmax()) for step in got] == tokens.tolist()
        assert max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, logits)) < BAR
        options = GenerationOptions(TOKENS, go_on=True)
        first = model.generate(conversation, images, options)
        again = model.generate(conversation, images, options)
    assert first.text == again.text == model.tokenizer.decode(tokens.tolist())
    assert again.usage.reused == len(ids) - 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    from transformers import Idefics3Processor

    from pixano_edge.export.photos import Photo
    from pixano_edge.export.smolvlm import export_smolvlm
    from pixano_edge.export.smolvlm.checkpoint import load

    folder = tmp_path_factory.mktemp("smolvlm-256m")
    # Two tiles a side, so that it ends within minutes.
    checkpoint = write_smolvlm(folder / "checkpoint", "smolvlm", real=True, longest_edge=1024)
    photo = Photo("small", picture(40, 40))
    with without_memory():
        bundle = export_smolvlm(
            checkpoint, folder / "bundle", variants=("fp32",), tokens=2, photos=[photo], questions=("What?",)
        )
    loaded = load(checkpoint)
    processor = Idefics3Processor(
        loaded.images, loaded.text, image_seq_len=loaded.constants.image_seq_len, chat_template=loaded.template
    )
    return bundle, Reference(loaded.model, processor)
