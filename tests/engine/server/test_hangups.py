"""Clients that leave, come back, ask twice or flood, over real sockets: what is computed, how often, in which order.

The models are fakes whose gates hold work back, so that each client leaves at a known moment.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.server import ServerSettings, create_app
from pixano_edge.engine.server.flights import Flights
from tests.engine.provider.fakes import FakeOpener, data_uri, png, until

SEGMENTATION = "/v1/inference/segmentation"
JOBS = "/v1/inference/tracking/jobs"
IMAGE = data_uri(png(40, 30))
CLICK = {"model": "alpha", "image": IMAGE, "points": [[[5, 7]]], "labels": [[1]], "multimaskOutput": False}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


class Box:
    """A server on a socket of this machine."""

    def __init__(self, port: int, app: Any) -> None:
        self.port = port
        self.server = app.state.server

    async def send(self, path: str, value: Any, method: str = "POST", cut: int | None = None, **headers: str) -> Call:
        """Sends a request, or its first `cut` bytes of body, and does not wait."""
        body = b"" if value is None else json.dumps(value).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        head += ["Content-Type: application/json", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join([*head, "", ""]).encode() + body[:cut])
        await writer.drain()
        return Call(reader, writer)

    async def ask(self, path: str, value: Any = None, method: str = "POST", **headers: str) -> Answer:
        return await (await self.send(path, value, method, **headers)).answer()


class Call:
    """A request on its way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def answer(self) -> Answer:
        content = await asyncio.wait_for(self._reader.read(), 60)
        self._writer.close()
        head, _, body = content.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return Answer(int(first.split()[1]), headers, json.loads(body) if body else None)

    async def leave(self) -> None:
        """Hangs up without a goodbye."""
        self._writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def _serving(provider: EdgeProvider, **settings: Any) -> AsyncIterator[Box]:
    app = create_app(ServerSettings(**settings), provider)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield Box(listening.getsockname()[1], app)
    finally:
        server.should_exit = server.force_exit = True
        await serving
        listening.close()


@pytest.fixture
async def box(provider: EdgeProvider) -> AsyncIterator[Box]:
    async with _serving(provider) as found:
        yield found


async def _in_thread(condition: Callable[[], Any]) -> None:
    await asyncio.to_thread(until, condition)


async def _loaded(box: Box, opener: FakeOpener) -> Any:
    """The fake predictor, once it is there and has nothing to do."""
    assert (await box.ask(SEGMENTATION, CLICK)).status == 200
    predictor = opener.opened[-1]
    predictor.predicted.clear()
    predictor.encoded = 0
    predictor.entered.clear()
    return predictor


def _click(x: int) -> dict[str, Any]:
    return {**CLICK, "points": [[[x, 7]]]}


def _points(predictor: Any) -> list[int]:
    """Where the answered clicks were."""
    return [int(prompts[0].points[0][0]) for prompts in predictor.predicted]


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_three_attempts_of_an_impatient_client_are_one_computation(box: Box, opener: FakeOpener) -> None:
    """As `pixano-inference-client` does after a read timeout: again after 0.5 and 1 s, here sooner."""
    predictor = await _loaded(box, opener)
    box.server.flights = Flights(patience=0.0, window=60.0)
    predictor.gate.clear()
    first = await box.send(SEGMENTATION, CLICK)
    await asyncio.to_thread(predictor.entered.wait, 20)
    await first.leave()
    await _in_thread(lambda: all(not flight.waiters for flight in box.server.flights._flights.values()))
    second = await box.send(SEGMENTATION, CLICK)
    await _in_thread(lambda: any(flight.waiters for flight in box.server.flights._flights.values()))
    await second.leave()
    await _in_thread(lambda: all(not flight.waiters for flight in box.server.flights._flights.values()))
    predictor.gate.set()
    await _in_thread(lambda: predictor.predicted)
    third = await box.ask(SEGMENTATION, CLICK)  # after the answer that nobody took
    assert third.status == 200
    assert (len(predictor.predicted), predictor.encoded) == (1, 1)
    assert box.server.flights.joined == 2
    assert (await box.ask(SEGMENTATION, CLICK)).status == 200
    assert len(predictor.predicted) == 2  # an answer that was taken is not kept


async def test_a_request_whose_client_left_is_dropped_from_the_queue(box: Box, opener: FakeOpener) -> None:
    predictor = await _loaded(box, opener)
    predictor.gate.clear()
    first = await box.send(SEGMENTATION, _click(1))
    await asyncio.to_thread(predictor.entered.wait, 20)
    waiting = [await box.send(SEGMENTATION, _click(x)) for x in (2, 3)]
    await _in_thread(lambda: len(box.server.flights) == 3)
    await waiting[0].leave()
    await _in_thread(lambda: len(box.server.flights) == 2)
    predictor.gate.set()
    assert [(await call.answer()).status for call in (first, waiting[1])] == [200, 200]
    assert _points(predictor) == [1, 3]


async def test_a_client_that_leaves_while_its_image_is_decoded_stops_there(
    box: Box, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.engine.provider import segmentation

    predictor = await _loaded(box, opener)
    entered, gate, real = threading.Event(), threading.Event(), segmentation.decode_image

    def slow(*values: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return real(*values)

    monkeypatch.setattr(segmentation, "decode_image", slow)
    call = await box.send(SEGMENTATION, {**CLICK, "image": data_uri(png(41, 30))})
    await asyncio.to_thread(entered.wait, 20)
    await call.leave()
    await _in_thread(lambda: len(box.server.flights) == 0)
    gate.set()
    assert (await box.ask(SEGMENTATION, _click(9))).status == 200
    assert _points(predictor) == [9]
    assert predictor.encoded == 1  # the other image never was


async def test_a_client_that_leaves_while_the_model_loads_is_not_answered_for(box: Box, opener: FakeOpener) -> None:
    opener.gate.clear()
    call = await box.send(SEGMENTATION, _click(1))
    await asyncio.to_thread(opener.entered.wait, 20)
    await call.leave()
    await _in_thread(lambda: len(box.server.flights) == 0)
    opener.gate.set()
    assert (await box.ask(SEGMENTATION, _click(2))).status == 200  # the load went on, for the next one
    assert len(opener.opened) == 1
    assert _points(opener.opened[0]) == [2]


async def test_tracking_stops_within_a_frame_of_its_client(box: Box, opener: FakeOpener) -> None:
    assert (await box.ask("/v1/inference/tracking", _clip(1))).status == 200
    video = opener.videos[-1]
    video.steps.clear()
    video.hold_at = ("frame", 3)
    video.gate.clear()
    video.reached.clear()
    call = await box.send("/v1/inference/tracking", _clip(200))
    await asyncio.to_thread(video.reached.wait, 20)
    await call.leave()
    await _in_thread(lambda: len(box.server.flights) == 0)
    video.gate.set()
    await _in_thread(lambda: video.trackers[-1].closed)
    assert ("frame", 4) not in video.steps


async def test_half_a_body_does_nothing(box: Box, opener: FakeOpener) -> None:
    predictor = await _loaded(box, opener)
    for cut in (0, 10, 200):
        await (await box.send(SEGMENTATION, CLICK, cut=cut)).leave()
    await asyncio.sleep(0.2)
    assert predictor.predicted == []
    assert (await box.ask(SEGMENTATION, CLICK)).status == 200


# --- asking twice ----------------------------------------------------------------------------------------------------


def _clip(count: int) -> dict[str, Any]:
    keyframe = {"frameIndex": 0, "prompts": {"points": [{"x": 5, "y": 7, "label": 1}]}}
    return {
        "model": "alpha-video", "video": [IMAGE] * count, "objectsIds": [1], "frameIndexes": [0],
        "keyframes": [keyframe],
    }  # fmt: skip


async def test_a_job_that_is_submitted_again_is_the_same_job(provider: EdgeProvider, opener: FakeOpener) -> None:
    async with _serving(provider, api_keys=("one", "two")) as box:
        opener.gate.clear()
        calls = [await box.send(JOBS, _clip(5), x_api_key="one") for _ in range(3)]
        answers = [await call.answer() for call in calls]
        answers.append(await box.ask(JOBS, _clip(5), x_api_key="one"))
        assert {answer.status for answer in answers} == {202}
        (job_id,) = {answer.body["jobId"] for answer in answers}
        other_key = (await box.ask(JOBS, _clip(5), x_api_key="two")).body["jobId"]
        other_clip = (await box.ask(JOBS, _clip(6), x_api_key="one")).body["jobId"]
        assert len({job_id, other_key, other_clip}) == 3
        assert (await box.ask(f"/v1/jobs/{job_id}", method="DELETE", x_api_key="one")).body["status"] == "canceled"
        again = (await box.ask(JOBS, _clip(5), x_api_key="one")).body
        assert again["jobId"] != job_id  # whoever cancels and submits anew means it
        assert again["status"] == "running"
        assert len(await provider.jobs()) == 4
        opener.gate.set()


async def test_a_submit_whose_client_left_is_found_again(box: Box, provider: EdgeProvider, opener: FakeOpener) -> None:
    store = provider._video._store
    real, entered, gate = store.add, threading.Event(), threading.Event()

    def slow(*values: Any) -> None:
        entered.set()
        assert gate.wait(20)
        real(*values)

    store.add = slow  # type: ignore[method-assign]
    call = await box.send(JOBS, _clip(3))
    await asyncio.to_thread(entered.wait, 20)
    await call.leave()
    await _in_thread(lambda: all(not flight.waiters for flight in box.server.flights._flights.values()))
    again = await box.send(JOBS, _clip(3))
    gate.set()
    job_id = (await again.answer()).body["jobId"]
    assert [status.job_id for status in await provider.jobs()] == [job_id]


# --- taking turns ----------------------------------------------------------------------------------------------------


async def test_a_click_waits_for_one_frame_of_a_job_at_most(box: Box, opener: FakeOpener) -> None:
    assert (await box.ask("/v1/inference/tracking", _clip(1))).status == 200
    video, predictor = opener.videos[-1], opener.opened[-1]
    for at in (3, 5, 8):
        video.steps.clear()
        video.hold_at = ("frame", at)
        video.gate.clear()
        video.reached.clear()
        job_id = (await box.ask(JOBS, _clip(20 + at))).body["jobId"]
        await asyncio.to_thread(video.reached.wait, 20)  # in the middle of a frame
        seen: list[Any] = []
        predictor.on_predict = lambda seen=seen: seen.append(video.steps[-1])
        call = await box.send(SEGMENTATION, {**CLICK, "model": "alpha-video"})
        await _in_thread(lambda: len(box.server.flights) >= 1 and provider_waits(box))
        video.gate.set()
        assert (await call.answer()).status == 200
        assert seen == [("frame", at)]  # after that frame, before the next one
        predictor.on_predict = lambda: None
        await _in_thread(lambda job_id=job_id: box.server.provider.job_state(job_id) == "completed")


def provider_waits(box: Box) -> bool:
    """Whether a request is in a model's queue."""
    return any(slot.worker._pending for slot in box.server.provider._table.slots())


async def test_one_who_floods_does_not_keep_the_others_waiting(provider: EdgeProvider, opener: FakeOpener) -> None:
    async with _serving(provider, api_keys=("flood", "one", "two")) as box:
        assert (await box.ask(SEGMENTATION, CLICK, x_api_key="one")).status == 200
        predictor = opener.opened[-1]
        predictor.predicted.clear()
        predictor.entered.clear()
        predictor.gate.clear()
        flood = [await box.send(SEGMENTATION, _click(1), x_api_key="flood")]
        await asyncio.to_thread(predictor.entered.wait, 20)
        flood += [await box.send(SEGMENTATION, _click(x), x_api_key="flood") for x in range(2, 16)]
        await _in_thread(lambda: len(box.server.flights) == 15)
        other = await box.send(SEGMENTATION, _click(30), x_api_key="one")
        await _in_thread(lambda: len(box.server.flights) == 16)
        third = await box.send(SEGMENTATION, _click(31), x_api_key="two")
        await _in_thread(lambda: _queued(box) == 17)
        predictor.gate.set()
        assert [(await call.answer()).status for call in (*flood, other, third)] == [200] * 17
        order = _points(predictor)
        assert order.index(30) <= 2
        assert order.index(31) <= 3
        assert sorted(order) == [*range(1, 16), 30, 31]


def _queued(box: Box) -> int:
    return sum(slot.worker._pending for slot in box.server.provider._table.slots())
