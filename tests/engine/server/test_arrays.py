"""Arrays on the wire: exact both ways, with and without the fast library, whatever the size."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("orjson", reason="needs pixano-edge[server]")

from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.provider.types import NDArrayData
from pixano_edge.engine.server import arrays
from pixano_edge.engine.server.answers import PiecesResponse, pieces
from pixano_edge.engine.server.arrays import STEP, WireArray, read_array, wire_array

SHAPES = [(1,), (2, 1), (3,), (STEP // 4,), (STEP // 4 - 1,), (STEP // 4 + 1,), (5, 7, 11), (2, STEP // 4)]


@pytest.fixture(params=["fast", "standard library"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fast":
        pytest.importorskip("pybase64", reason="needs pixano-edge[server]")
    else:
        monkeypatch.setattr(arrays, "_fast", None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    text = json.loads(b"".join(WireArray(array).json()))
    assert (text["shape"], text["dtype"]) == (list(shape), "float32")
    assert base64.b64decode(text["data"]) == array.tobytes()
    back = read_array(text["shape"], text["data"], "x")
    assert np.array_equal(back.to_array(), array)
    assert back.values.flags.writeable


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("change", ["space", "letter", "early padding", "short", "long", "é", "newline"])
def test_what_is_not_base64_of_the_shape_is_refused(change: str) -> None:
    text = base64.b64encode(np.zeros(STEP // 2, np.float32).tobytes()).decode()
    at = STEP // 3 * 4  # the end of the first step
    bad = {
        "space": text[:9] + " " + text[10:],
        "letter": text[:9] + "%" + text[10:],
        "early padding": text[: at - 2] + "==" + text[at:],
        "short": text[:-4],
        "long": text + "AAAA",
        "é": text[:9] + "é" + text[10:],
        "newline": text[:-1] + "\n",
    }[change]
    with pytest.raises(InvalidRequestError):
        read_array([STEP // 2], bad, "x")


def test_an_array_without_elements_is_not_sent() -> None:
    assert wire_array(None) is None
    assert wire_array(NDArrayData([], [0, 3])) is None
    assert wire_array(NDArrayData([1.5], [1])).array.tolist() == [1.5]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": 1, "b": [1, 2, {"c": None}]},
        {
            "a": WireArray(np.zeros((2, 3), np.float32)),
            "b": [WireArray(np.ones(1, np.float32))] * 2,
            "c": {"d": 'q"\n'},
        },
        {"list": [WireArray(np.zeros(STEP, np.float32))], "é": np.float32(0.5)},
    ],
)
async def test_pieces_are_the_json_of_the_whole(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, WireArray):
            content = base64.b64encode(item.array.tobytes()).decode()
            return {"shape": list(item.array.shape), "dtype": "float32", "data": content}
        if isinstance(item, dict):
            return {key: plain(one) for key, one in item.items()}
        return [plain(one) for one in item] if isinstance(item, list) else item

    response = PiecesResponse(pieces(value))
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await response({"type": "http"}, None, send)  # type: ignore[arg-type]
    body = b"".join(m.get("body", b"") for m in messages)
    assert json.loads(body) == json.loads(json.dumps(plain(value), default=float))
    assert int(response.headers["content-length"]) == len(body)
    assert [m.get("more_body") for m in messages[1:]] == [True] * (len(messages) - 2) + [False]
