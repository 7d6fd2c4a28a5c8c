"""What HTTP adds to the engine: the requests of Pixano's page, and many clients at once.

The server is a process of its own. Beside it, the same requests go to an `EdgeProvider` in this process, in turns with
those over HTTP. The overhead is paired: seconds until the answer's last byte, less what the engine took for that very
request, which the answer tells.
"""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.provider.edge import EdgeProvider
from pixano_edge.engine.provider.types import ArrayData, EdgeMaskGenerationInput

from .metrics import Latency, latency
from .segment import SETTLE_SECONDS
from .serving import (
    SEGMENTATION,
    Client,
    ServerProcess,
    click_body,
    engine_seconds,
    jpeg_uri,
    photo,
)

NAME = "bench"
"""What the bundle is called in the store."""

WARM_NEW = "warm-up, new image"
FIRST = "first click, features asked for"
LEAN = "click, no echo"
ECHO = "click, features and logits echoed"
HANDLE = "click, handle and logits echoed"
OWN = "click, features of its own (control)"


@dataclass(frozen=True)
class Row:
    """One kind of request.

    Attributes:
        case: What was sent.
        sent: Bytes of the request.
        received: Bytes of the answer.
        engine: Seconds of `EdgeProvider` in this process.
        http: Seconds until the answer's last byte.
        overhead: Seconds of the same requests, less what the engine took for each.
    """

    case: str
    sent: int
    received: int
    engine: Latency
    http: Latency
    overhead: Latency


@dataclass(frozen=True)
class LoadRow:
    """Clients that click as fast as they are answered.

    Attributes:
        clients: How many.
        requests: Answered in all.
        errors: Answers that were none.
        per_second: Answers.
        seconds: Of each.
    """

    clients: int
    requests: int
    errors: int
    per_second: float
    seconds: Latency


@contextmanager
def served(bundle: Path, threads: int, device: str = "cpu", **environ: str) -> Iterator[ServerProcess]:
    """A server that has the bundle as `NAME`."""
    with tempfile.TemporaryDirectory(prefix="pixano-edge-bench-") as folder:
        (Path(folder) / NAME).symlink_to(bundle.resolve(), target_is_directory=True)
        settings = {
            "PIXANO_EDGE_THREADS": str(threads), "PIXANO_EDGE_DEVICE": device, "PIXANO_EDGE_MAX_REQUEST_BODY_BYTES":
            str(200 << 20), "PIXANO_EDGE_SEGMENTATION_TIMEOUT_S": "600", **environ,
        }  # fmt: skip
        with ServerProcess(Path(folder), settings, ("--jobs", "memory", "--log-level", "warning")) as server:
            yield server


class _Engine:
    """The provider in this process, asked from plain code."""

    def __init__(self, bundle: Path, threads: int, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pixano-edge-bench-")
        (Path(self._folder.name) / NAME).symlink_to(bundle.resolve(), target_is_directory=True)
        self._loop = asyncio.new_event_loop()
        self._edge = EdgeProvider(store=self._folder.name, device=device, threads=threads)

    def seconds(self, **fields: Any) -> float:
        """One request."""
        request = EdgeMaskGenerationInput(
            model=NAME, multimask_output=False, num_multimask_outputs=1, answer_arrays=True, **fields
        )
        begun = time.perf_counter()
        self._loop.run_until_complete(self._edge.image_mask_generation(request, 600))
        return time.perf_counter() - begun

    def close(self) -> None:
        self._loop.run_until_complete(self._edge.close())
        self._loop.close()
        self._folder.cleanup()


def measure(
    bundle: Bundle, *, rounds: int, threads: int, device: str = "cpu", step: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The page's requests on a photo of 2 megapixels.

    Args:
        bundle: A SAM 2.
        rounds: Timed requests of each kind; of a new image a tenth, at least 3.
        threads: CPU threads of the engine, in both processes.
        device: Of the engine, in both.
        step: Told what is timed.

    Raises:
        EdgeError: A request failed.
    """
    pixels = photo()
    engine = _Engine(bundle.root, threads, device)
    rows: list[Row] = []
    try:
        with served(bundle.root, threads, device) as server, Client(server.port) as client:
            page = _Page(client, engine, pixels)
            step(WARM_NEW)
            rows.append(page.times(WARM_NEW, max(3, rounds // 10)))
            for case in (FIRST, LEAN, ECHO, OWN):
                step(case)
                rows.append(page.times(case, rounds))
        step(HANDLE)
        with (
            served(bundle.root, threads, device, PIXANO_EDGE_EMBEDDING_HANDLES="true") as server,
            Client(server.port) as client,
        ):
            rows.append(_Page(client, engine, pixels).times(HANDLE, rounds))
    finally:
        engine.close()
    return rows


class _Page:
    """Pixano's page with one image open, over HTTP and in this process."""

    def __init__(self, client: Client, engine: _Engine, pixels: npt.NDArray[np.uint8]) -> None:
        self._client = client
        self._engine = engine
        self._pixels = pixels
        self._image = jpeg_uri(pixels)
        height, width = pixels.shape[:2]
        self._point = (width // 2, height // 2)
        warm = self._ask(self._body(points=None, labels=None, returnLogits=False, returnImageEmbedding=True))
        self._features = {key: warm[key] for key in ("imageEmbedding", "highResolutionFeatures")}
        self._logits = self._ask(self._body())["maskLogits"]
        self._logit_values = ArrayData(
            np.frombuffer(base64.b64decode(self._logits["data"]), "<f4"), self._logits["shape"]
        )
        engine.seconds(image=self._image)

    def _body(self, **fields: Any) -> bytes:
        return click_body(NAME, fields.pop("image", self._image), *self._point, **fields)

    def _ask(self, body: bytes) -> Any:
        status, answer, _ = self._client.post(SEGMENTATION, body)
        if status != 200:
            raise EdgeError(f"The server answered {status}: {answer[:300]!r}", "Look at its log.")
        return json.loads(answer)["data"]

    def _request(self, case: str, turn: int) -> tuple[bytes, dict[str, Any]]:
        """Over HTTP, and what the engine needs for the same mask."""
        click = {"image": self._image, "points": [[list(self._point)]], "labels": [[1]], "return_logits": True}
        if case == WARM_NEW:
            pixels = self._pixels.copy()
            pixels[:32, :32] = turn
            image = jpeg_uri(pixels)
            body = self._body(image=image, points=None, labels=None, returnLogits=False, returnImageEmbedding=True)
            return body, {"image": image, "return_image_embedding": True}
        if case == FIRST:
            return self._body(returnImageEmbedding=True), {**click, "return_image_embedding": True}
        if case == LEAN:
            return self._body(), click
        echoed = {**self._features, "maskInput": self._logits}
        if case == OWN:
            data = self._features["imageEmbedding"]["data"]
            array = {**self._features["imageEmbedding"], "data": "AAAAAAAA" + data[8:]}
            echoed["imageEmbedding"] = array
        return self._body(**echoed), {**click, "mask_input": self._logit_values}

    def times(self, case: str, rounds: int, warmup: int = 2) -> Row:
        """Times of one kind of request, in turns with the engine's."""
        engine, http, overhead = [], [], []
        body, answer = b"", b""
        for turn in range(-warmup, rounds):
            body, fields = self._request(case, turn + warmup + 1)
            time.sleep(SETTLE_SECONDS)
            taken = self._engine.seconds(**fields)
            time.sleep(SETTLE_SECONDS)
            status, answer, seconds = self._client.post(SEGMENTATION, body)
            if status != 200:
                raise EdgeError(f"'{case}': the server answered {status}: {answer[:300]!r}", "Look at its log.")
            if turn >= 0:
                engine.append(taken)
                http.append(seconds)
                overhead.append(seconds - engine_seconds(answer))
        return Row(case, len(body), len(answer), latency(engine), latency(http), latency(overhead))


def load(
    bundle: Bundle,
    *,
    clients: Sequence[int],
    seconds: float,
    threads: int,
    device: str = "cpu",
    step: Callable[[str], None] = lambda _: None,
) -> list[LoadRow]:
    """Clients that each click somewhere else on the same photo, the next time when the answer is there."""
    image = jpeg_uri(photo())
    rows = []
    with served(bundle.root, threads, device) as server:
        with Client(server.port) as client:
            client.post(SEGMENTATION, click_body(NAME, image, 100, 100))
        for count in clients:
            step(f"{count} clients")
            rows.append(_closed_loop(server.port, image, count, seconds))
    return rows


def _closed_loop(port: int, image: str, clients: int, seconds: float) -> LoadRow:
    barrier = threading.Barrier(clients + 1)
    stop = threading.Event()

    def one(number: int) -> tuple[list[float], int]:
        bodies = [click_body(NAME, image, 100 + 40 * number, 100 + 90 * i) for i in range(8)]
        times: list[float] = []
        errors = 0
        with Client(port) as client:
            barrier.wait()
            while not stop.is_set():
                status, _, taken = client.post(SEGMENTATION, bodies[len(times) % len(bodies)])
                times.append(taken)
                errors += status != 200
        return times, errors

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(one, number) for number in range(clients)]
        barrier.wait()
        begun = time.perf_counter()
        time.sleep(seconds)
        stop.set()
        found = [future.result() for future in futures]
        lasted = time.perf_counter() - begun
    times = [taken for one_times, _ in found for taken in one_times]
    return LoadRow(clients, len(times), sum(errors for _, errors in found), len(times) / lasted, latency(times))


def click(client: Client, body: bytes) -> float:
    """Seconds of a click; raises EdgeError for another answer than masks."""
    status, answer, seconds = client.post(SEGMENTATION, body)
    if status != 200:
        raise EdgeError(f"The server answered {status}: {answer[:300]!r}", "Look at its log.")
    return seconds


COLUMNS = (
    "request", "sent", "received", "engine p50", "p90", "p99", "HTTP p50", "p90", "p99", "overhead p50", "p90", "p99",
)  # fmt: skip
LOAD_COLUMNS = ("clients", "requests", "errors", "per s", "p50 ms", "p90 ms", "p99 ms")


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table; times in ms, sizes in MB."""
    return [
        (
            row.case,
            *(f"{size / 1e6:.2f}" for size in (row.sent, row.received)),
            *(
                f"{1000 * s:.1f}"
                for part in (row.engine, row.http, row.overhead)
                for s in (part.p50, part.p90, part.p99)
            ),
        )
        for row in rows
    ]


def load_rows(rows: Sequence[LoadRow]) -> list[tuple[str, ...]]:
    """Cells of the table of many clients."""
    return [
        (
            str(row.clients), str(row.requests), str(row.errors), f"{row.per_second:.1f}",
            *(f"{1000 * s:.1f}" for s in (row.seconds.p50, row.seconds.p90, row.seconds.p99)),
        )
        for row in rows
    ]  # fmt: skip


def to_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows as JSON-ready values, times in seconds."""
    return [asdict(row) for row in rows]
