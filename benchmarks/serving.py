"""A server in a process of its own, and a client that adds as little as it can to what is measured."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.errors import EdgeError

SEGMENTATION = "/v1/inference/segmentation"
JOBS = "/v1/inference/tracking/jobs"

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_SECONDS = re.compile(rb'"processingTime":([0-9.eE+-]+)')


class ServerProcess:
    """`pixano-edge serve` on a free port of this machine, until `close`.

    Args:
        store: Folder of the model store.
        environ: Settings as environment variables, on top of this process's.
        options: More arguments of the command.
        seconds: To wait until it answers.

    Raises:
        EdgeError: It did not start.
    """

    def __init__(
        self, store: Path, environ: Mapping[str, str] | None = None, options: tuple[str, ...] = (), seconds: float = 120
    ) -> None:
        # The command's own module: works in a tree whose entry points are not installed, too.
        start = "from pixano_edge.engine.cli.serve import app; app()"
        command = [sys.executable, "-c", start, "--port", "0", "--store", str(store)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [*command, *options], stdout=self._log, stderr=subprocess.STDOUT, env={**os.environ, **(environ or {})}
        )
        end = time.monotonic() + seconds
        while (port := self._port()) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                text = self.log()[-2000:]
                self.close()
                raise EdgeError(f"The server did not start: {text}", "Try the command by hand: pixano-edge serve")
            time.sleep(0.01)
        self.port = port

    def _port(self) -> int | None:
        found = _ADDRESS.search(self.log())
        if found is None:
            return None
        try:
            with Client(int(found[1]), timeout=5) as client:
                return int(found[1]) if client.get("/v1/health")[0] == 200 else None
        except OSError:
            return None

    def log(self) -> str:
        """What it wrote."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def rss(self) -> int:
        """Bytes of memory that it holds now (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self, seconds: float = 60) -> int:
        """Ends it as an administrator does, by SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        return self.process.returncode

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One connection that is kept. Not thread-safe."""

    def __init__(self, port: int, timeout: float = 600, headers: Mapping[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def post(self, path: str, body: bytes) -> tuple[int, bytes, float]:
        """Status, answer and seconds until its last byte."""
        begun = time.perf_counter()
        self._connection.request("POST", path, body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        return answer.status, content, time.perf_counter() - begun

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and answer."""
        return self._plain("GET", path)

    def delete(self, path: str) -> tuple[int, bytes]:
        """Status and answer."""
        return self._plain("DELETE", path)

    def _plain(self, method: str, path: str) -> tuple[int, bytes]:
        self._connection.request(method, path, headers=self._headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FrameWatch(threading.Thread):
    """Reads a job's frames as they come and notes when; `times` in seconds of `time.perf_counter`."""

    def __init__(self, port: int, job_id: str) -> None:
        super().__init__(daemon=True)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._path = f"/v1/jobs/{job_id}/frames"
        self.times: list[float] = []
        self.start()

    def run(self) -> None:
        self._connection.request("GET", self._path)
        answer = self._connection.getresponse()
        while answer.readline():
            self.times.append(time.perf_counter())
        self._connection.close()


def engine_seconds(answer: bytes) -> float:
    """The time that the engine took, which an answer tells: from the provider's taking the request to its result."""
    found = _SECONDS.search(answer[:4096])
    if found is None:
        raise EdgeError(f"No answer of an inference: {answer[:200]!r}", "Look at the server's log.")
    return float(found[1])


def stage_totals(client: Client, model: str, stage: str) -> tuple[float, int]:
    """Seconds and runs of a stage of a model up to now, by the server's clock (its metrics); zeros before the first."""
    status, text = client.get("/metrics")
    if status != 200:
        raise EdgeError(f"The server's metrics answered {status}: {text[:200]!r}", "Look at the server's log.")
    labels = re.escape(f'{{model="{model}",stage="{stage}"}}')
    found = {
        part: re.search(rf"^pixano_edge_stage_seconds_{part}{labels} (\S+)$", text.decode(), re.MULTILINE)
        for part in ("sum", "count")
    }
    seconds, count = (float(match[1]) if match else 0.0 for match in found.values())
    return seconds, round(count)


def jpeg_uri(pixels: npt.NDArray[np.uint8], quality: int = 90) -> str:
    """``data:`` URI of a picture, (H, W, 3) uint8 RGB."""
    import cv2

    ok, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def photo(megapixels: float = 2.0, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A photo of that size: a real one enlarged, with noise as a camera has it, so that its file is as large as one."""
    import cv2

    from pixano_edge.export.photos import default_photos

    pixels = default_photos()[0].pixels
    height, width = pixels.shape[:2]
    scale = (megapixels * 1e6 / (height * width)) ** 0.5
    large = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, large.shape)
    return np.clip(large + noise, 0, 255).astype(np.uint8)


def click_body(model: str, image: str, x: int, y: int, **fields: Any) -> bytes:
    """A click as Pixano's page sends it: one positive point, logits asked for, one mask."""
    request: dict[str, Any] = {
        "model": model, "image": image, "points": [[[x, y]]], "labels": [[1]], "multimaskOutput": False,
        "numMultimaskOutputs": 1, "returnLogits": True, "resetPredictor": True, "returnImageEmbedding": False,
    }  # fmt: skip
    return json.dumps({**request, **fields}).encode()
