"""The HTTP server: Pixano's v1 protocol over an `EdgeProvider`. Needs the extra ``[server]``."""

from __future__ import annotations

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
