"""Requests for text against a fake model: answers, pieces, turns, refusals, leaving, unloading."""

from __future__ import annotations

import asyncio
import gc
import time
from datetime import timezone
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError, DeviceMemoryError
from pixano_edge.engine.provider import (
    EdgeProvider,
    EdgeTextImageConditionalGenerationInput,
    ImageMaskGenerationInput,
    InferenceError,
    InferenceTask,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelBusyError,
    ModelConfig,
    ModelNotFoundError,
    OutOfMemoryError,
    TaskNotSupportedError,
    TextChunk,
    TextImageConditionalGenerationInput,
)
from pixano_edge.engine.provider.text_runs import Turns
from tests.support.fake_vlm import PROMPT_TOKENS, FakeVlm

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

_IMAGE = data_uri(png(161, 97))
_TASK = "text_image_conditional_generation"
_CONFIG = ModelConfig("smol", _TASK)
_LONG = "word " * 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_bundle(tmp_path, "alpha")
    add_bundle(tmp_path, "smol", family="smolvlm")
    return tmp_path


def _request(prompt: Any = "what is it", **fields: Any) -> TextImageConditionalGenerationInput:
    return TextImageConditionalGenerationInput(**{"model": "smol", "prompt": prompt, "images": [_IMAGE], **fields})


async def _ask(provider: EdgeProvider, *args: Any, **fields: Any) -> Any:
    return await provider.text_image_conditional_generation(input_data=_request(*args, **fields), timeout=20)


async def _loaded(provider: EdgeProvider, opener: FakeOpener) -> FakeVlm:
    await provider.instantiate_model("edge", _CONFIG)
    return opener.vlms[-1]


async def test_one_answer(provider: EdgeProvider, opener: FakeOpener) -> None:
    result = await _ask(provider, temperature=0)
    assert (result.status, result.metadata["model_name"], result.metadata["device"]) == ("SUCCESS", "smol", "cpu")
    assert result.metadata["model_class"] == "SmolVlmModel"
    assert result.metadata["finish_reason"] == "stop"
    assert result.timestamp.tzinfo is timezone.utc
    assert 0 < result.processing_time < 20
    assert result.data.generated_text == "1 images: what is it"
    usage = result.data.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT_TOKENS, 5, PROMPT_TOKENS + 5)
    assert result.data.generation_config == {
        "max_new_tokens": 100, "do_sample": False, "temperature": 0, "top_p": 1.0, "seed": None, "stop": [],
    }  # fmt: skip
    ((_, shapes, options),) = opener.vlms[0].asked
    assert shapes == [(97, 161, 3)]
    assert (options.max_new_tokens, options.sampling.greedy) == (100, True)


async def test_pixano_08_sends_no_number_of_tokens(provider: EdgeProvider, opener: FakeOpener) -> None:
    request = SimpleNamespace(model="smol", prompt="x", images=None, max_new_tokens=None, temperature=None)
    assert (await provider.vlm(request)).data.generated_text == "0 images: x"
    ((_, _, options),) = opener.vlms[0].asked
    assert (options.max_new_tokens, options.sampling.temperature) == (512, 1.0)


@pytest.mark.parametrize("images", [None, []])
async def test_no_images(provider: EdgeProvider, images: Any) -> None:
    assert (await _ask(provider, images=images)).data.generated_text == "0 images: what is it"


async def test_messages_name_images(provider: EdgeProvider) -> None:
    content = [{"type": "image_url", "image_url": {"url": _IMAGE}}, {"type": "text", "text": "and this"}]
    messages = [{"role": "user", "content": content}]
    assert (await _ask(provider, messages, images=None)).data.generated_text == "1 images: and this"
    assert (await _ask(provider, messages)).data.generated_text == "1 images: and this"
    plain = [{"role": "system", "content": "be short"}, {"role": "user", "content": "plain"}]
    assert (await _ask(provider, plain, images=[_IMAGE, png()])).data.generated_text == "2 images: plain"


async def test_more_settings(provider: EdgeProvider, opener: FakeOpener) -> None:
    request = EdgeTextImageConditionalGenerationInput(
        "smol", "x", None, 7, 0.5, top_p=0.9, seed=3, stop=["\n"], system="be short"
    )
    await provider.text_image_conditional_generation(request)
    ((conversation, _, options),) = opener.vlms[0].asked
    assert (options.sampling.top_p, options.sampling.seed, options.stops) == (0.9, 3, ("\n",))
    assert conversation.messages[0].role == "system"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"max_new_tokens": -5}, "max_new_tokens"),
        ({"max_new_tokens": 100_000}, "does not fit"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"prompt": "", "images": None}, "empty"),
        ({"prompt": None}, "NoneType"),
        ({"prompt": "\ud83d"}, "half a character"),
        ({"prompt": "x" * 1_000_001}, "1000001 characters"),
        ({"images": [_IMAGE] * 65}, "65 images"),
        ({"images": _IMAGE}, "images must be a list"),
        ({"images": ["data:image/png;base64,AAAA"]}, "image"),
        ({"images": ["/does/not/exist.png"]}, "no image file"),
        ({"images": ["http://example.org/a.png"]}, "http"),
        ({"model": ""}, "model must be"),
    ],
)  # fmt: skip
async def test_malformed_requests(provider: EdgeProvider, opener: FakeOpener, fields: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        await _ask(provider, **fields)
    assert (await _ask(provider)).data.generated_text == "1 images: what is it"  # nothing stays behind
    assert all(vlm.open == 0 for vlm in opener.vlms)


async def test_other_tasks(provider: EdgeProvider) -> None:
    with pytest.raises(TaskNotSupportedError, match="image_mask_generation"):
        await _ask(provider, model="alpha")
    with pytest.raises(TaskNotSupportedError, match=_TASK):
        await provider.image_mask_generation(ImageMaskGenerationInput(_IMAGE, "smol", points=[[[1, 1]]]))
    with pytest.raises(ModelNotFoundError):
        await _ask(provider, model="nothing")
    assert [m.name for m in await provider.list_models(InferenceTask.TEXT_GENERATION)] == ["smol"]
    assert InferenceTask.TEXT_GENERATION in (await provider.get_capabilities()).tasks


async def _collect(provider: EdgeProvider, *args: Any, **fields: Any) -> list[TextChunk]:
    stream = provider.stream_text_image_conditional_generation(_request(*args, **fields), 20)
    return [chunk async for chunk in stream]


async def test_pieces(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.03  # longer than a step goes on, so that each token is a piece
    *pieces, last = await _collect(provider)
    assert [p.text for p in pieces] == ["1 images:", " what", " is", " it"]
    assert all(p.output is None for p in pieces)
    assert last.text == ""
    assert last.output is not None
    assert last.output.generated_text == "1 images: what is it"
    assert last.metadata is not None
    assert last.metadata["model_name"] == "smol"
    vlm.seconds = 0.0
    *pieces, last = await _collect(provider)  # fast tokens come in fewer pieces, all the same
    assert "".join(p.text for p in pieces) == "1 images: what is it"


async def test_pieces_come_before_the_end(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.03
    stream = provider.stream_text_image_conditional_generation(_request(_LONG))
    first = await anext(stream)
    assert first.text == "1 images:"
    assert len(vlm.steps) < 10
    await stream.aclose()


async def test_leaving_stops_within_a_token(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.02
    stream = provider.stream_text_image_conditional_generation(_request(_LONG))
    await anext(stream)
    made = len(vlm.steps)
    await stream.aclose()
    await asyncio.to_thread(until, lambda: vlm.open == 0)
    assert len(vlm.steps) <= made + 2
    assert (await _ask(provider)).data.generated_text == "1 images: what is it"


async def test_cancelled_task_and_timeout_stop_the_work(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.02
    task = asyncio.create_task(_ask(provider, _LONG))
    await asyncio.to_thread(vlm.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: vlm.open == 0)
    made = len(vlm.steps)
    assert made < 30
    with pytest.raises(InferenceTimeoutError, match="Text generation"):
        await provider.text_image_conditional_generation(_request(_LONG), timeout=0.1)
    await asyncio.to_thread(until, lambda: vlm.open == 0)
    assert len(vlm.steps) < made + 30
    with pytest.raises(InferenceTimeoutError):
        async for _ in provider.stream_text_image_conditional_generation(_request(_LONG), 0.1):
            pass


async def test_answers_take_turns_and_more_wait(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.005
    tasks = [asyncio.create_task(_ask(provider, f"{name} " * 20)) for name in "abcd"]
    results = await asyncio.gather(*tasks)
    assert [r.data.generated_text.split()[-1] for r in results] == ["a", "b", "c", "d"]
    assert vlm.most_open == 2  # it has two conversations
    order = [text[0] for text in vlm.steps]
    first = order[: order.index("c")]
    changes = sum(a != b for a, b in pairwise(first))
    assert changes > 4, f"no turns: {''.join(order)}"
    assert len(vlm.threads) == 1


async def test_a_short_answer_does_not_wait_for_a_long_one(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.02
    long = asyncio.create_task(_ask(provider, _LONG))
    await asyncio.to_thread(vlm.entered.wait, 10)
    await _ask(provider, "short")
    assert not long.done()
    assert (await long).data.generated_text.endswith("word")


async def test_waiting_answer_that_is_left_lets_the_others_through(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.gate.clear()
    running = [asyncio.create_task(_ask(provider, name)) for name in ("one", "two")]
    await asyncio.to_thread(vlm.entered.wait, 10)
    await asyncio.sleep(0.05)
    left, stays = asyncio.create_task(_ask(provider, "left")), asyncio.create_task(_ask(provider, "stays"))
    await asyncio.sleep(0.05)
    left.cancel()
    await asyncio.sleep(0.05)
    vlm.gate.set()
    assert (await stays).data.generated_text == "1 images: stays"
    await asyncio.gather(*running)
    assert "left" not in vlm.steps
    assert vlm.most_open <= 2


async def test_full_queue(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, queue_depth=3)
    vlm = await _loaded(provider, opener)
    vlm.gate.clear()
    tasks = [asyncio.create_task(_ask(provider, str(i))) for i in range(3)]
    await asyncio.sleep(0.1)
    with pytest.raises(ModelBusyError, match="3 answers"):
        await _ask(provider)
    vlm.gate.set()
    await asyncio.gather(*tasks)
    assert (await _ask(provider)).data.generated_text == "1 images: what is it"
    await provider.close()


async def test_model_unloaded_while_answers_run_and_wait(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.01
    tasks = [asyncio.create_task(_ask(provider, _LONG)) for _ in range(4)]
    await asyncio.to_thread(vlm.entered.wait, 10)
    await asyncio.sleep(0.05)
    await provider.delete_model("smol")
    assert vlm.closed
    assert vlm.open == 0
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, ModelNotFoundError)


async def test_closing_the_provider_ends_answers(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener)
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.01
    task = asyncio.create_task(_ask(provider, _LONG))
    await asyncio.to_thread(vlm.entered.wait, 10)
    await provider.close()
    assert vlm.closed
    with pytest.raises(ModelNotFoundError):
        await task
    with pytest.raises(InferenceError):
        await _ask(provider)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(DeviceError("it failed", "try"), InferenceError), (DeviceMemoryError("no room", "unload"), OutOfMemoryError)],
)
async def test_failing_back_end(
    provider: EdgeProvider, opener: FakeOpener, error: Exception, kind: type[Exception]
) -> None:
    vlm = await _loaded(provider, opener)
    vlm.error, vlm.error_at, vlm.seconds = error, 2, 0.03
    seen: list[str] = []

    async def read() -> None:
        async for chunk in provider.stream_text_image_conditional_generation(_request()):
            seen.append(chunk.text)  # noqa: PERF401

    with pytest.raises(kind):
        await read()
    assert "".join(seen) == "1 images: what"
    assert vlm.open == 0
    vlm.error = None
    assert (await _ask(provider)).data.generated_text == "1 images: what is it"


async def test_a_model_that_ends_without_an_answer_fails_the_request(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = await _loaded(provider, opener)
    with monkeypatch.context() as patched:
        patched.setattr(vlm, "stream", lambda *_: (step for step in [None]))
        with pytest.raises(InferenceError, match="did not come to its end"):
            await _ask(provider)
    assert (await _ask(provider)).data.generated_text == "1 images: what is it"


def test_turns_note_nothing_for_a_run_that_is_over_already() -> None:
    class Over:
        slot, model, over = object(), SimpleNamespace(vlm=FakeVlm()), True
        ended: list[None] = []  # noqa: RUF012

        def finish(self, error: None) -> None:
            self.ended.append(error)

    run: Any = Over()
    turns = Turns()
    turns.ask(run)
    assert run.ended == [None]
    assert (turns._active, turns._queues) == ({}, {})


async def test_nothing_of_an_answer_is_kept(provider: EdgeProvider, opener: FakeOpener) -> None:
    await _loaded(provider, opener)
    await _ask(provider)
    run_sets = [provider._text._runs, provider._text._turns._active, provider._text._turns._queues]
    until(lambda: not any(run_sets))
    table = provider._table
    await asyncio.sleep(0.05)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "TextRun" and o._table is table]


async def test_the_loop_stays_free(provider: EdgeProvider, opener: FakeOpener) -> None:
    vlm = await _loaded(provider, opener)
    vlm.seconds = 0.2
    task = asyncio.create_task(_ask(provider, "a b c d"))
    gaps, last = [], time.perf_counter()
    while not task.done():
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - last)
        last = time.perf_counter()
    assert max(gaps) < 0.2
