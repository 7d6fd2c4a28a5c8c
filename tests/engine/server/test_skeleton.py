"""The application over ASGI with the packaged demo bundle."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import numpy as np
import pytest

from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.server import ServerSettings, create_app


@pytest.fixture
async def client(tmp_path: Path):
    app = create_app(ServerSettings(demo=True, store=tmp_path, threads=1))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    await app.state.server.close()


async def test_health_ready_info_models(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/health")).json() == {"status": "healthy"}
    ready = await client.get("/v1/ready")
    assert ready.status_code == 200
    assert set(ready.json()) == {"ready", "models", "models_loaded", "version"}
    models = (await client.get("/v1/models")).json()
    assert {m["name"]: m["capability"] for m in models} == {
        "sam2-demo": "segmentation",
        "sam2-demo-video": "tracking",
        "owlv2-demo": "detection",
        "grounding-dino-demo": "detection",
        "smolvlm-demo": "vlm",
    }
    assert (await client.get("/v1/info")).json()["models"] == [m["name"] for m in models]


async def test_segmentation_with_features_back_and_forth(client: httpx.AsyncClient, bedroom: Path) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode((bedroom / "00000.jpg").read_bytes()).decode()
    request = {"model": "sam2-demo", "image": uri, "multimaskOutput": False, "returnImageEmbedding": True}
    warm = (await client.post("/v1/inference/segmentation", json=request)).json()["data"]
    click = {
        **request,
        "points": [[[480, 270]]],
        "labels": [[1]],
        "returnImageEmbedding": False,
        "returnLogits": True,
    }
    first = await client.post("/v1/inference/segmentation", json=click)
    assert first.status_code == 200
    again = await client.post(
        "/v1/inference/segmentation",
        json={
            **click,
            "imageEmbedding": warm["imageEmbedding"],
            "highResolutionFeatures": warm["highResolutionFeatures"],
        },
    )
    data = first.json()["data"]
    assert again.json()["data"]["masks"] == data["masks"]
    mask = decode_rle(data["masks"][0][0])
    assert mask.shape == (540, 960)
    assert np.frombuffer(base64.b64decode(data["scores"]["data"]), "<f4").shape == (1,)
    assert data["maskLogits"]["shape"][0] == 1
