"""Small and large bodies are parsed by two parsers, which must agree."""

from __future__ import annotations

import json

import pytest

from pixano_edge.engine.server.bodies import LARGE, parse_json
from pixano_edge.engine.server.errors import ApiError

PAD = " " * (LARGE + 1)


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5e-3, True, None, 'ü\u20ac \\ " \n']}, [], 3, "x", {"n": 12345678901234567890, "f": 1e300}]
)
def test_both_parsers_read_the_same(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text.encode()) == parse_json((text + PAD).encode()) == value
    utf8 = json.dumps(value, ensure_ascii=False)
    assert parse_json(bytearray((utf8 + PAD).encode())) == value


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1,]", b'{"a":1}}', b"NaN", b"[Infinity]", b"\xff\xfe", b'"\xc3"', b"'a'", b"[" * 100_000]
)
def test_both_parsers_refuse_the_same_and_do_not_repeat_it(text: bytes) -> None:
    for body in (text, text + PAD.encode(), PAD.encode() + text):
        with pytest.raises(ApiError) as caught:
            parse_json(body)
        assert caught.value.status == 422
        assert len(json.dumps(caught.value.message)) < 500
