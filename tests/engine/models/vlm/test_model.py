"""SmolVLM's model beyond parity: bad input, streams that are left, caches, memory, threads, closing."""

from __future__ import annotations

import threading
import tracemalloc
import weakref
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import BundleStore
from pixano_edge.engine.errors import BundleError, CancelledError, DeviceError, ImageError, PromptError
from pixano_edge.engine.models.decoder.base import Generated, GenerationOptions, Piece
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.decoder.session import image_keys
from pixano_edge.engine.models.smolvlm.model import SmolVlmModel
from pixano_edge.engine.models.text.messages import Conversation, read_conversation
from pixano_edge.engine.models.text.sampling import Sampling
from pixano_edge.engine.models.text.template import ChatTemplate
from pixano_edge.engine.runtime.base import Binding
from tests.support.vlm import picture

from .conftest import Exported

IMAGE = picture(60, 90)


def ask(text: str = "What is it?", images: int = 1) -> Conversation:
    return read_conversation(text, [IMAGE] * images)


def at_rest(model: SmolVlmModel) -> bool:
    """Whether every conversation was given back."""
    return len(model._decoder._free) == len(model._decoder._all)


def test_pieces_join_to_the_answer(model: SmolVlmModel) -> None:
    *steps, last = model.stream(ask(), [IMAGE], GenerationOptions(30))
    assert isinstance(last, Generated)
    assert "".join(s.text for s in steps if isinstance(s, Piece)) == last.text
    assert [s.tokens for s in steps if isinstance(s, Piece)][-1] == last.usage.completion
    assert sum(s is None for s in steps) == 6  # between seven tiles
    assert last.images_encoded == 1
    assert last.finish == "length"
    assert last.usage.total == last.usage.prompt + 30


def test_stop_strings_and_seeds(model: SmolVlmModel) -> None:
    sampling = Sampling(1.5, 0.95, seed=4)
    whole = model.generate(ask(), [IMAGE], GenerationOptions(40, sampling))
    assert model.generate(ask(), [IMAGE], GenerationOptions(40, sampling)).text == whole.text
    assert model.generate(ask(), [IMAGE], GenerationOptions(40, Sampling(1.5, 0.95, seed=5))).text != whole.text
    stop = whole.text[8:12]
    cut = model.generate(ask(), [IMAGE], GenerationOptions(40, sampling, (stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop_string"
    assert cut.usage.completion < 40


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", None, True])
def test_number_of_tokens_out_of_range(count: Any) -> None:
    with pytest.raises(PromptError, match="max_new_tokens"):
        GenerationOptions(count)


def test_what_does_not_fit_is_refused_and_nothing_runs(model: SmolVlmModel) -> None:
    runs = [session.runs for session in model._sessions]
    for prompt, images, tokens, words in (
        ("short", 0, 100_000, "max_new_tokens is 100000"),
        ("word " * 2000, 0, 10, "the context is 512"),
        ("many", 20, 10, "the context is 512"),
    ):
        with pytest.raises(PromptError, match=words):
            model.generate(ask(prompt, images), [IMAGE] * images, GenerationOptions(tokens))
    with pytest.raises(PromptError, match="65 images are more than 64"):
        model.generate(ask("x", 65), [IMAGE] * 65)
    assert [session.runs for session in model._sessions] == runs
    assert at_rest(model)
    prompt = len(model.prepare(ask("short", 0), ()).ids)
    assert model.generate(ask("short", 0), (), GenerationOptions(512 - prompt)).usage.total <= 512
    with pytest.raises(PromptError, match=f"leaves {512 - prompt} of the context"):
        model.generate(ask("short", 0), (), GenerationOptions(513 - prompt))


@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), "u1"), ((3, 4, 3), "f4"), ((0, 4, 3), "u1"), ((3, 4, 4), "u1")])
def test_no_picture(model: SmolVlmModel, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ImageError, match="Image 0"):
        model.generate(ask(), [np.zeros(shape, dtype)])


def test_number_of_images_must_fit(model: SmolVlmModel) -> None:
    with pytest.raises(PromptError, match="0 images for 1 places"):
        model.generate(ask(), [])


def test_no_image_is_fine(model: SmolVlmModel) -> None:
    assert model.generate(ask(images=0), (), GenerationOptions(5)).images_encoded == 0


def test_template_that_fails(model: SmolVlmModel) -> None:
    model.template = ChatTemplate("{{ messages[7].content }}")
    with pytest.raises(BundleError, match="chat template fails"):
        model.generate(ask(), [IMAGE])
    assert at_rest(model)


def test_leaving_a_stream_gives_everything_back(model: SmolVlmModel) -> None:
    whole = model.generate(ask(), [IMAGE], GenerationOptions(20)).text
    model.shrink()
    for stop_at in (1, 5, 10, 12, 15):  # within the tiles, the prompt, the answer
        with closing(model.stream(ask(), [IMAGE], GenerationOptions(20))) as steps:
            for _ in range(stop_at):
                next(steps)
            runs = model._sessions[-1].runs
        assert at_rest(model)
        assert model._sessions[-1].runs == runs
        assert model.generate(ask(), [IMAGE], GenerationOptions(20)).text == whole
        model.shrink()


def test_check_ends_a_call_within_a_step(model: SmolVlmModel) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise CancelledError("left", "")

    with pytest.raises(CancelledError):
        model.generate(ask(), [IMAGE], GenerationOptions(200), check=check)
    assert model._sessions[-1].runs <= 13 - 6
    assert at_rest(model)


@pytest.mark.parametrize("failing_run", [1, 2, 5])
def test_failing_back_end_leaves_a_working_model(
    model: SmolVlmModel, monkeypatch: pytest.MonkeyPatch, failing_run: int
) -> None:
    whole = model.generate(ask(), [IMAGE], GenerationOptions(12)).text
    decoder, real, count = model._sessions[-1], Binding.run, 0

    def run(self: Binding) -> None:
        nonlocal count
        if self.session is decoder:
            count += 1
            if count == failing_run:
                # What the cache holds is unknown from here on.
                for name, buffer in self.inputs.items():
                    if name.startswith("past_"):
                        buffer.host()[:, :, model._decoder._all[0].length :] = np.nan
                raise DeviceError("it failed", "")
        real(self)

    monkeypatch.setattr(Binding, "run", run)
    with pytest.raises(DeviceError, match="it failed"):
        model.generate(ask("What else?"), [IMAGE], GenerationOptions(12))
    assert at_rest(model)
    assert model.generate(ask(), [IMAGE], GenerationOptions(12)).text == whole


def test_image_features_are_kept_within_their_budget(exported: Exported, model: SmolVlmModel) -> None:
    model.generate(ask(), [IMAGE], GenerationOptions(2))
    model._decoder.forget()
    assert model.generate(ask(), [IMAGE.copy()], GenerationOptions(2)).images_encoded == 0
    other = IMAGE.copy()
    other[0, 0] ^= 1
    assert model.generate(ask(), [other], GenerationOptions(2)).images_encoded == 1
    with exported.open(cache_bytes=0) as none:
        none.generate(ask(), [IMAGE], GenerationOptions(2))
        none._decoder.forget()
        assert none.generate(ask(), [IMAGE], GenerationOptions(2)).images_encoded == 1
        assert none.memory().caches == none._decoder.nbytes


def test_conversations_keep_prefixes_of_their_own(exported: Exported) -> None:
    other = picture(60, 90, 5)
    with exported.open(conversations=2) as model:
        for image in (IMAGE, other, IMAGE, other):
            answer = model.generate(ask(), [image], GenerationOptions(3))
        assert answer.usage.reused == answer.usage.prompt - 1
        assert len(model.info()["kv_cache"]["caches"]) == 2
        assert model.memory().caches is not None
        assert model._decoder.nbytes == model._decoder.most_bytes
        gone = weakref.ref(model._decoder._free[1].cache)
        model.shrink()
        assert len(model.info()["kv_cache"]["caches"]) == 1
        assert gone() is None, "its bindings hold it no more"
    with exported.open(conversations=1) as model:
        for image in (IMAGE, other, IMAGE):
            answer = model.generate(ask(), [image], GenerationOptions(3))
        assert answer.usage.reused < 10
        assert len(model.info()["kv_cache"]["caches"]) == 1


def test_steps_allocate_nothing_that_grows(model: SmolVlmModel) -> None:
    model._ends = frozenset()  # or the answer would end too soon
    with closing(model.stream(ask("Hello", 0), (), GenerationOptions(400))) as steps:
        for _ in range(60):
            next(steps)
        tracemalloc.start()
        sizes = []
        for _ in range(5):
            for _ in range(50):
                next(steps)
            sizes.append(tracemalloc.get_traced_memory()[0])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert sizes[-1] - sizes[0] < 8_000, sizes  # the answer's own pieces
    assert peak - sizes[-1] < 100_000
    lane = model._decoder._all[0]
    assert len(model._sessions[-1]._bindings) <= 3
    assert lane.length == 310 + len(model.prepare(ask("Hello", 0), ()).ids) - 1


def test_the_cache_never_moves(model: SmolVlmModel) -> None:
    lane = model._decoder._all[0]
    pointers = [buffer.pointer for buffer in lane.cache._buffers]  # type: ignore[attr-defined]
    for text in ("one", "another question", "one"):
        model.generate(ask(text), [IMAGE], GenerationOptions(10))
    step = lane.cache.binding(0, 1)
    for (past, present), pointer in zip(model.constants.decoder.cache_names, pointers):
        assert step.inputs[past].pointer == step.outputs[present].pointer == pointer


def test_threads_wait_for_a_conversation(exported: Exported) -> None:
    with exported.open(conversations=2) as model:
        prompts = ["one", "two", "three", "four", "five"]
        want = {p: model.generate(ask(p), [IMAGE], GenerationOptions(12)).text for p in prompts}
        got: dict[str, str] = {}
        threads = [
            threading.Thread(
                target=lambda p=p: got.update({p: model.generate(ask(p), [IMAGE], GenerationOptions(12)).text})
            )
            for p in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got == want
        assert at_rest(model)


def test_closing(exported: Exported) -> None:
    model = exported.open()
    stream = model.stream(ask(), [IMAGE], GenerationOptions(50))
    for _ in range(12):
        next(stream)
    model.close()
    model.close()
    with pytest.raises(DeviceError, match="closed"):
        list(stream)
    assert model._decoder._free == [], "the conversation that was under way frees its cache"
    with pytest.raises(DeviceError, match="closed"):
        model.generate(ask(), [IMAGE])


def test_opening(exported: Exported) -> None:
    with pytest.raises(PromptError, match="2 to 512"):
        exported.open(context=100_000)
    with pytest.raises(PromptError, match="none"):
        exported.open(conversations=0)
    with open_vlm(exported.bundle, device="cpu", threads=1, context=128, warm_up=True) as model:
        info = model.info()
        assert (info["kv_cache"]["context"], info["precision"], info["device"]) == (128, "fp32", "cpu")
        assert info["warm_up"]["seconds"] > 0
        assert model.memory().weights
    with pytest.raises(BundleError, match="does not answer in text"):
        open_vlm(BundleStore().path("sam2-demo"))


def test_keys_of_images_differ() -> None:
    a, b = image_keys(b"a", 1000), image_keys(b"b", 1000)
    assert (a < 0).all()
    assert len(set(a.tolist()) | set(b.tolist())) == 2000
    np.testing.assert_array_equal(a[:10], image_keys(b"a", 10))
