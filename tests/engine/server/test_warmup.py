"""A server that is ready has imported what its first request needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="needs pixano-edge[server]")

CODE = """
import asyncio, sys
from pixano_edge.engine.server.app import create_app

NEEDED = {"PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pycocotools.mask"}
app = create_app()
assert not NEEDED & set(sys.modules), "importing the server should not load them"

async def main():
    async with app.router.lifespan_context(app):
        for _ in range(1000):
            if NEEDED <= set(sys.modules):
                return
            await asyncio.sleep(0.05)
    raise SystemExit(f"missing: {NEEDED - set(sys.modules)}")

asyncio.run(main())
"""


def test_codecs_are_loaded_at_start() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
