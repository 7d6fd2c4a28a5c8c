"""Clicks while a clip is tracked: how long they wait, by the client's clock and by the server's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import EdgeError

from .metrics import Latency, latency
from .segment import SETTLE_SECONDS
from .serve import NAME, click, served
from .serving import JOBS, Client, FrameWatch, click_body, jpeg_uri, photo, stage_totals


@dataclass(frozen=True)
class WaitRow:
    """Clicks while a clip is tracked.

    Attributes:
        frame: Seconds per frame of the job, as they come to the client.
        idle: Seconds of a click without the job.
        click: Seconds of a click with it.
        frames: `click` less the median of `idle`, in median frames: with what the job costs the upload, the click's
            own work and the answer, which share the cores with it.
        most_frames: The longest of these.
        frames_passed: Most frames that ended while one click was on its way, upload included.
        queued: Seconds that a click waited for the model, by the server's clock.
        step: Mean seconds of a frame on the model's thread, by the server's clock.
        most_steps: The longest of `queued`, in `step`: what the order of clicks and frames is to blame for.
    """

    frame: Latency
    idle: Latency
    click: Latency
    frames: Latency
    most_frames: float
    frames_passed: int
    queued: Latency
    step: float
    most_steps: float


def clicks_while_tracking(
    bundle: Bundle, *, clicks: int, threads: int, device: str = "cpu", step: Callable[[str], None] = lambda _: None
) -> WaitRow:
    """Clicks at random moments while a clip of 960x540 is tracked on the same model."""
    import cv2

    image = jpeg_uri(photo())
    wide = cv2.resize(photo(), (1100, 540), interpolation=cv2.INTER_AREA)
    frames = [jpeg_uri(np.asarray(wide[:, i : i + 960], np.uint8), 75) for i in range(0, 128, 4)]
    # A click waits for a frame at most, and comes 1 to 2 frames after the one before; on a GPU it takes many frames.
    count = 12 + (4 if device == "cpu" else 40) * clicks
    body_bytes = 1 << 30  # all frames of the clip are in one request
    rng = np.random.default_rng(0)
    with (
        served(bundle.root, threads, device, PIXANO_EDGE_MAX_REQUEST_BODY_BYTES=str(body_bytes)) as server,
        Client(server.port) as client,
    ):
        step("clicks without a job")
        # It loads all graphs, so that the clicks before and during the job meet one model; metrics go by its bundle.
        tracked = f"{NAME}-video"
        body = click_body(tracked, image, 400, 300)
        for _ in range(3):
            click(client, body)
        idle = []
        for _ in range(max(10, clicks // 2)):
            time.sleep(SETTLE_SECONDS)
            idle.append(click(client, body))
        step("clicks while tracking")
        job = {
            "model": tracked, "video": [frames[i % len(frames)] for i in range(count)], "objectsIds": [1],
            "frameIndexes": [0],
            "keyframes": [{"frameIndex": 0, "prompts": {"points": [{"x": 480, "y": 270, "label": 1}]}}],
        }  # fmt: skip
        status, answer, _ = client.post(JOBS, json.dumps(job).encode())
        if status != 202:
            raise EdgeError(f"The server answered {status}: {answer[:300]!r}", "Look at its log.")
        job_id = json.loads(answer)["jobId"]
        watch = FrameWatch(server.port, job_id)
        while len(watch.times) < 8:
            if not watch.is_alive():
                raise EdgeError("The tracking job ended before its first frames.", "Look at the server's log.")
            time.sleep(0.05)
        frame = float(np.median(np.diff(watch.times)))
        times, passed, queued = [], [], []
        steps_before = stage_totals(client, NAME, "track")
        for _ in range(clicks):
            time.sleep(float(rng.uniform(1.0, 2.0)) * frame)
            if not watch.is_alive():
                raise EdgeError("The tracking job ended before the last click.", "Use a slower model, or fewer clicks.")
            waited, _ = stage_totals(client, NAME, "queue")
            before = len(watch.times)
            times.append(click(client, body))
            passed.append(len(watch.times) - before)
            queued.append(stage_totals(client, NAME, "queue")[0] - waited)
        spent, done = (b - a for a, b in zip(steps_before, stage_totals(client, NAME, "track")))
        alone = [b - a for a, b in zip(watch.times, watch.times[1:])]
        client.delete(f"/v1/jobs/{job_id}")
        watch.join(60)
    waits = [(taken - latency(idle).p50) / frame for taken in times]
    step_seconds = spent / done
    return WaitRow(
        latency(alone), latency(idle), latency(times), latency(waits), max(waits), max(passed),
        latency(queued), step_seconds, max(queued) / step_seconds,
    )  # fmt: skip


def wait_text(row: WaitRow) -> str:
    """Two lines for people: by the client's clock, and by the server's."""
    return (
        f"click while tracking: p50 {1000 * row.click.p50:.0f} ms, p99 {1000 * row.click.p99:.0f} ms; alone "
        f"{1000 * row.idle.p50:.0f} ms; a frame {1000 * row.frame.p50:.0f} ms; longer than alone by p50 "
        f"{row.frames.p50:.2f}, at most {row.most_frames:.2f} frames; at most {row.frames_passed} frame(s) ended while "
        f"one was on its way\nby the server's clock it waited for the model p50 {1000 * row.queued.p50:.0f} ms, at "
        f"most {row.most_steps:.2f} frames of {1000 * row.step:.0f} ms"
    )
