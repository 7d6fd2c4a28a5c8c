"""Text requests against a real bundle: loading, books of memory, an answer with a picture, its prefix kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.provider import (
    EdgeProvider,
    InvalidRequestError,
    ModelConfig,
    TextImageConditionalGenerationInput,
)
from pixano_edge.engine.provider.needs import declared
from pixano_edge.engine.provider.settings import LoadOptions

from .fakes import data_uri, png

_TASK = "text_image_conditional_generation"


@pytest.fixture
def bundle(tiny_vlm_bundle: Path) -> Path:
    return tiny_vlm_bundle


async def test_answers_of_a_real_bundle(bundle: Path) -> None:
    provider = EdgeProvider(autoload=False, threads=1)
    config = ModelConfig("smol", _TASK, path=bundle, config={"context": 256, "device": "cpu"})
    await provider.instantiate_model("edge", config, timeout=60)
    image = data_uri(png(60, 90))
    request = TextImageConditionalGenerationInput("smol", "What is it?", [image], 20, 0)
    first = await provider.text_image_conditional_generation(request)
    assert first.metadata["images_encoded"] == 1
    assert first.metadata["precision"] == "fp32"
    usage = first.data.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    again = await provider.text_image_conditional_generation(request)
    assert again.data == first.data
    assert again.metadata["reused_tokens"] == usage.prompt_tokens - 1
    pieces = [chunk async for chunk in provider.stream_text_image_conditional_generation(request)]
    assert "".join(chunk.text for chunk in pieces) == first.data.generated_text
    assert pieces[-1].output == first.data
    request.max_new_tokens = 300
    with pytest.raises(InvalidRequestError, match="context of 256"):
        await provider.text_image_conditional_generation(request)
    assert (await provider.get_server_info()).models_to_task["smol"] == _TASK
    await provider.close()


def test_declared_memory_counts_conversations_and_no_cache_tensors(bundle: Path) -> None:
    from pixano_edge.engine.bundle import Bundle

    constants = DecoderConstants.from_dict(Bundle.open(bundle).manifest.constants["decoder"])
    small = declared(bundle, LoadOptions(device="cpu", cache_mb=0, context=64), _TASK).use
    large = declared(bundle, LoadOptions(device="cpu", cache_mb=0, context=256), _TASK).use
    assert small.caches == 2 * constants.cache_bytes(64)
    assert large.caches == 2 * constants.cache_bytes(256)
    assert small.bindings == large.bindings
    assert small.bindings is not None
    assert small.bindings < 4_000_000
