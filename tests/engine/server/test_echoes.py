"""Features that come back to the server: known again before they are decoded, and handles that stand for them."""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pixano_edge.engine.models.sam2.cache import EmbeddingKey
from pixano_edge.engine.provider.seen import handle_of
from pixano_edge.engine.provider.types import ArrayData
from pixano_edge.engine.server import ServerSettings, create_app
from pixano_edge.engine.server.arrays import WireArray
from pixano_edge.engine.server.echoes import Echoes, read_handle, write_handle
from pixano_edge.engine.server.schemas import WireNDArray

URL = "/v1/inference/segmentation"


@pytest.fixture(scope="module")
def photo(bedroom: Path) -> str:
    return _uri((bedroom / "00000.jpg").read_bytes())


@pytest.fixture(scope="module")
def other(bedroom: Path) -> str:
    return _uri((bedroom / "00001.jpg").read_bytes())


def _uri(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


class Box:
    """A server over ASGI, and what its engine did."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")

    @property
    def echoes(self) -> Echoes:
        return self.app.state.server.echoes

    @property
    def encoded(self) -> int:
        return self.predictor.runs[0]

    @property
    def predictor(self) -> Any:
        return self.app.state.server.provider._table.get("sam2-demo").model.predictor

    async def ask(self, image: str, status: int = 200, **fields: Any) -> Any:
        body = {"model": "sam2-demo", "image": image, "multimaskOutput": False, "returnLogits": True, **fields}
        answer = await self.client.post(URL, json=body)
        assert answer.status_code == status, answer.text[:500]
        return answer.json()["data" if status == 200 else "error"]


@pytest.fixture
async def box(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Box]:
    settings = {"demo": True, "store": tmp_path, "threads": 1, "device": "cpu", **getattr(request, "param", {})}
    box = Box(create_app(ServerSettings(**settings)))
    yield box
    await box.client.aclose()
    await box.app.state.server.close()


CLICK = {"points": [[[480, 270]]], "labels": [[1]]}


def _features(data: Any) -> dict[str, Any]:
    return {key: data[key] for key in ("imageEmbedding", "highResolutionFeatures")}


def _forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes which arrays of requests are decoded."""
    from pixano_edge.engine.server import inputs

    decoded: list[str] = []
    real = inputs.read_array

    def noted(shape: Any, data: Any, what: str) -> Any:
        decoded.append(what)
        return real(shape, data, what)

    monkeypatch.setattr(inputs, "read_array", noted)
    return decoded


async def test_an_echo_is_known_before_it_is_decoded(box: Box, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = _forbid_decoding(monkeypatch)
    warm = await box.ask(photo, returnImageEmbedding=True)
    plain = await box.ask(photo, **CLICK)
    echoed = await box.ask(photo, **CLICK, **_features(warm))
    assert echoed["masks"] == plain["masks"]
    assert echoed["maskLogits"] == plain["maskLogits"]
    assert decoded == []
    assert (box.echoes.hits, box.echoes.misses, box.encoded) == (1, 0, 1)
    with_logits = await box.ask(photo, **CLICK, **_features(warm), maskInput=plain["maskLogits"])
    assert decoded == ["maskInput"]
    assert with_logits["masks"] != plain["masks"]


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_changed_number_makes_it_the_clients_own(box: Box, photo: str, place: int) -> None:
    """Control: what is recognised is the whole text, not its beginning or a sample of it."""
    warm = await box.ask(photo, returnImageEmbedding=True)
    sent = _features(copy.deepcopy(warm))
    array = [sent["imageEmbedding"], *sent["highResolutionFeatures"]][place]
    values = np.frombuffer(base64.b64decode(array["data"]), "<f4").copy()
    values[len(values) // 4] += 40.0
    array["data"] = base64.b64encode(values.tobytes()).decode()
    own = await box.ask(photo, **CLICK, **sent)
    assert (box.echoes.hits, box.echoes.misses) == (0, 1)
    assert own["maskLogits"] != (await box.ask(photo, **CLICK))["maskLogits"]  # it is used, too
    assert box.encoded == 1


async def test_an_echo_for_another_image_is_used_as_it_was_sent(box: Box, photo: str, other: str) -> None:
    """As without the table: the features say what is seen, the image only how large the mask is."""
    warm = await box.ask(photo, returnImageEmbedding=True)
    mixed = await box.ask(other, **CLICK, **_features(warm))
    assert mixed["maskLogits"] == (await box.ask(photo, **CLICK))["maskLogits"]
    assert mixed["maskLogits"] != (await box.ask(other, **CLICK))["maskLogits"]


async def test_an_echo_outlives_the_features_and_the_image_is_encoded_again(box: Box, photo: str) -> None:
    warm = await box.ask(photo, returnImageEmbedding=True)
    box.predictor.cache.clear()
    echoed = await box.ask(photo, **CLICK, **_features(warm))
    assert box.encoded == 2
    assert echoed["maskLogits"] == (await box.ask(photo, **CLICK))["maskLogits"]


@pytest.mark.parametrize("box", [{"echo_mb": 0}], indirect=True)
async def test_without_room_for_texts_a_digest_does(box: Box, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = _forbid_decoding(monkeypatch)
    warm = await box.ask(photo, returnImageEmbedding=True)
    assert all(one.texts is None for one in box.echoes._sent.values())
    await box.ask(photo, **CLICK, **_features(warm))
    assert (box.echoes.hits, decoded) == (1, [])
    again = await box.ask(photo, returnImageEmbedding=True)
    assert _features(again) == _features(warm)


async def test_the_same_image_for_another_user_is_encoded_once_and_written_once(
    box: Box, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.engine.server import echoes

    written: list[int] = []
    real = echoes._text
    monkeypatch.setattr(echoes, "_text", lambda value: (written.append(1), real(value))[1])
    first = await asyncio.gather(
        *(box.ask(photo, returnImageEmbedding=True, points=[[[x, 200]]]) for x in range(100, 500, 100))
    )
    assert box.encoded == 1
    again = await box.ask(photo, returnImageEmbedding=True)
    assert _features(again) == _features(first[0]) == _features(first[3])
    assert len(written) <= 3 * 4
    before = len(written)
    await box.ask(photo, returnImageEmbedding=True)
    assert len(written) == before


async def test_features_of_a_client_never_enter_the_cache(box: Box, photo: str) -> None:
    warm = await box.ask(photo, returnImageEmbedding=True)
    sent = _features(copy.deepcopy(warm))
    for array in (sent["imageEmbedding"], *sent["highResolutionFeatures"]):
        size = int(np.prod(array["shape"]))
        array["data"] = base64.b64encode(np.full(size, 3.0, "<f4").tobytes()).decode()
    box.predictor.cache.clear()
    poisoned = await box.ask(photo, **CLICK, **sent, returnImageEmbedding=True)
    assert poisoned["imageEmbedding"] == sent["imageEmbedding"]
    clean = await box.ask(photo, **CLICK)
    assert clean["maskLogits"] != poisoned["maskLogits"]
    assert box.encoded == 2
    assert _features(await box.ask(photo, returnImageEmbedding=True)) == _features(warm)


# --- handles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [{"embedding_handles": True}], indirect=True)
async def test_handles_stand_for_features(box: Box, photo: str, other: str, tmp_path: Path) -> None:
    warm = await box.ask(photo, returnImageEmbedding=True)
    assert warm["imageEmbedding"]["shape"] == [1, 1, 10]
    assert len(warm["highResolutionFeatures"]) == 1  # an empty list would make the page ask for ever
    clicked = await box.ask(photo, **CLICK, **_features(warm))
    assert clicked["maskLogits"] == (await box.ask(photo, **CLICK))["maskLogits"]
    assert box.encoded == 1
    wrong = await box.ask(other, 400, **CLICK, **_features(warm))
    assert "another image" in wrong["message"]
    assert "return_image_embedding true" in wrong["message"]
    # As Pixano passes it on: numbers in a list, and base64 again.
    values = np.frombuffer(base64.b64decode(warm["imageEmbedding"]["data"]), "<f4").tolist()
    data = base64.b64encode(np.array(values, "<f4").tobytes()).decode()
    assert data == warm["imageEmbedding"]["data"]
    # After a restart, also of a server that answers with features.
    app = create_app(ServerSettings(demo=True, store=tmp_path, threads=1, device="cpu"))
    again = Box(app)
    assert (await again.ask(photo, **CLICK, **_features(warm)))["maskLogits"] == clicked["maskLogits"]
    await again.client.aclose()
    await app.state.server.close()


async def test_handles_are_off_by_default(box: Box, photo: str) -> None:
    assert ServerSettings().embedding_handles is False
    assert (await box.ask(photo, returnImageEmbedding=True))["imageEmbedding"]["shape"] != [1, 1, 10]


def test_every_bit_of_a_handle_survives() -> None:
    rng = np.random.default_rng(3)
    for token in (b"\0" * 16, b"\xff" * 16, *(rng.bytes(16) for _ in range(200))):
        array = write_handle(token)
        assert array.dtype == np.float32
        listed = [float(v) for v in array.reshape(-1)]
        assert read_handle(ArrayData(np.array(listed, np.float32), list(array.shape))) == token
    values = write_handle(b"x" * 16).reshape(-1)
    for place, value in ((0, 1.0), (1, 0.0), (4, 0.5), (5, -1.0), (6, 65536.0), (7, float("nan"))):
        changed = values.copy()
        changed[place] = value
        assert read_handle(ArrayData(changed, [1, 1, 10])) is None
    assert read_handle(ArrayData(values, [10])) is None
    assert read_handle(None) is None


def test_a_handle_depends_on_pixels_and_bundle_alone() -> None:
    key = EmbeddingKey("bundle", "fp32", "onnxruntime@cpu", b"d" * 32)
    assert handle_of(key) == handle_of(key._replace(variant="fp16", backend="tensorrt@cuda:0"))
    assert handle_of(key) != handle_of(key._replace(digest=b"e" * 32))
    assert handle_of(key) != handle_of(key._replace(bundle_hash="bundlf"))


# --- the table -------------------------------------------------------------------------------------------------------


def _arrays(seed: int) -> list[WireArray]:
    rng = np.random.default_rng(seed)
    return [WireArray(rng.standard_normal(shape).astype(np.float32)) for shape in ((8, 16, 16), (2, 32, 32))]


def _wire(shapes: Any, texts: Any) -> list[WireNDArray]:
    return [WireNDArray(shape=list(shape), data=text) for shape, text in zip(shapes, texts)]


def test_the_table_is_bounded() -> None:
    one = sum(len(base64.b64encode(a.array.tobytes())) for a in _arrays(0))
    echoes = Echoes(max_text_bytes=3 * one, most=10)
    sent = []
    for i in range(20):
        key = EmbeddingKey("b", "fp32", "x", bytes([i]))
        shapes, texts = echoes.note(key, _arrays(i))
        sent.append((key, _wire(shapes, texts)))
    assert len(echoes._sent) == len(echoes._probes) == 10
    assert sum(s.texts is not None for s in echoes._sent.values()) == 3
    assert [echoes.recognise(w[0], w[1:]) for _, w in sent] == [None] * 10 + [key for key, _ in sent[10:]]
    key, (first, second) = sent[15]
    assert echoes.recognise(first, [second]) == key  # by its digest
    for changed in ("", first.data[:-4] + "AAAA", first.data[:100] + "B" + first.data[101:]):
        assert echoes.recognise(first.model_copy(update={"data": changed}), [second]) is None
    assert echoes.recognise(first.model_copy(update={"shape": [16, 8, 16]}), [second]) is None
    assert echoes.recognise(first, None) is None
    assert echoes.recognise(None, [second]) is None
    echoes.note(key, _arrays(15))  # again, with its text
    assert echoes.find(key) is not None
