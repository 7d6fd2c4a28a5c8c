"""`ServerSettings`: everything an administrator can set, from the environment, options of a command, or code."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import EdgeError
from ..provider.jobs_file import job_file
from ..provider.settings import (
    DEFAULT_CACHE_MB,
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_PIXELS,
    DEFAULT_MAX_VIDEO_BYTES,
)
from ..provider.worker import QUEUE_DEPTH
from .echoes import MAX_TEXT_BYTES

PREFIXES = ("PIXANO_EDGE_", "PIXANO_INFERENCE_")
"""Of environment variables; the first one wins. The second is what Pixano's own inference server reads."""

DEFAULT_PORT = 7463

MEMORY = "memory"
"""As `jobs`: forget tracking jobs at the end."""

STRONG_KEY = 16
"""Characters from which an API key is not warned about; ``openssl rand -hex 16`` writes 32."""

_MIB = 1 << 20
_LISTS = (
    "api_keys",
    "media_url_hosts",
    "media_url_host_allowlist",
    "media_roots",
    "cors_allow_origins",
    "preload",
    "bundle_roots",
)


class ServerSettings(BaseModel):
    """Settings of one server; the environment variable of each is its name in capitals behind a prefix of `PREFIXES`.

    Attributes:
        host: Address to bind.
        port: TCP port.
        api_keys: Accepted keys; without any, everybody who reaches the port is served.
        allow_anonymous: Bind an address beyond loopback without keys.
        store: Folder of the model store; None for the user's own.
        demo: Offer the packaged demo bundles.
        bundle_roots: Folders besides the store from which ``POST /v1/models`` may load bundles by path.
        manage_models: Whether ``POST`` and ``DELETE /v1/models`` answer; see `models_managed` for None.
        preload: Models to load at start.
        device, backend, precision, threads, cache_mb: Of models that are loaded on demand; see `EdgeProvider`.
        warm_up: Run models once when they are loaded at start or by ``POST /v1/models``; see `EdgeProvider`.
        queue_depth: Requests that may wait per model, and clips it may track in at once.
        jobs: File in which tracking jobs outlive the server, or the folder of a ``jobs.sqlite``; text that ends with a
            slash is a folder, whether it is there or not. `MEMORY` or None for memory.
        embedding_handles: Answer with a few numbers that stand for an image embedding, instead of 22 MB.
        echo_mb: MiB of sent embeddings that are kept, to know them again when they come back.
        max_request_body_bytes: Larger bodies are refused with 413, whether they say their length or not.
        max_bodies_bytes: Of all requests under way together; a body without room is answered with 503 at once. One of
            `max_request_body_bytes` always has room when it is alone.
        media_allow_url: Fetch images and videos from http(s) addresses.
        media_url_hosts, media_url_host_allowlist, media_allow_private_ips, media_max_redirects,
            media_connect_timeout_s, media_read_timeout_s, media_total_timeout_s, media_video_timeout_s,
            media_ca_file: Of such fetches; see `FetchPolicy`.
        media_max_urls, media_max_fetched_bytes: That one request may name, and have fetched, all in all.
        media_roots: Folders whose files requests may name; empty for none.
        head_timeout_s: Seconds that a client may take for the head of a request, until its connection is closed.
        body_timeout_s: Seconds that a client may send nothing in the middle of a body, until 408.
        body_total_timeout_s: Seconds that a whole body may take to come, until 408.
        media_max_image_bytes, media_max_video_bytes: Of one encoded file.
        media_max_image_pixels: Width times height, checked on the header before decoding.
        segmentation_timeout_s, detection_timeout_s, tracking_timeout_s, vlm_timeout_s: Seconds until 504.
        cors_allow_origins: Origins whose pages may call the server from a browser; ``*`` for all.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        log_json: One JSON object per line instead of text.
        shutdown_delay_s: Seconds between SIGTERM and closing the listener, in which ``ready`` answers 503.
        shutdown_timeout_s: Seconds that requests under way have to end after that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    allow_anonymous: bool = False
    store: Path | None = None
    demo: bool = False
    bundle_roots: tuple[Path, ...] = ()
    manage_models: bool | None = None
    preload: tuple[str, ...] = ()
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    cache_mb: float = Field(default=DEFAULT_CACHE_MB, ge=0)
    warm_up: bool = True
    queue_depth: int = Field(default=QUEUE_DEPTH, ge=1)
    jobs: Path | None = None
    embedding_handles: bool = False
    echo_mb: int = Field(default=MAX_TEXT_BYTES >> 20, ge=0)
    max_request_body_bytes: int = Field(default=100 * _MIB, ge=1)
    max_bodies_bytes: int = Field(default=512 * _MIB, ge=1)
    head_timeout_s: float = Field(default=20.0, gt=0)
    body_timeout_s: float = Field(default=60.0, gt=0)
    body_total_timeout_s: float = Field(default=300.0, gt=0)
    media_allow_url: bool = False
    media_url_hosts: tuple[str, ...] = ()
    media_url_host_allowlist: tuple[str, ...] = ()
    media_allow_private_ips: bool = False
    media_max_redirects: int = Field(default=3, ge=0)
    media_connect_timeout_s: float = Field(default=5.0, gt=0)
    media_read_timeout_s: float = Field(default=30.0, gt=0)
    media_total_timeout_s: float = Field(default=60.0, gt=0)
    media_video_timeout_s: float = Field(default=300.0, gt=0)
    media_ca_file: Path | None = None
    media_max_urls: int = Field(default=1000, ge=1)
    media_max_fetched_bytes: int = Field(default=DEFAULT_MAX_VIDEO_BYTES, ge=1)
    media_roots: tuple[Path, ...] = ()
    media_max_image_bytes: int = Field(default=DEFAULT_MAX_BYTES, ge=1)
    media_max_video_bytes: int = Field(default=DEFAULT_MAX_VIDEO_BYTES, ge=1)
    media_max_image_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1)
    segmentation_timeout_s: float = Field(default=60.0, gt=0)
    detection_timeout_s: float = Field(default=60.0, gt=0)
    tracking_timeout_s: float = Field(default=600.0, gt=0)
    vlm_timeout_s: float = Field(default=300.0, gt=0)
    cors_allow_origins: tuple[str, ...] = ()
    log_level: str = "info"
    log_json: bool = False
    shutdown_delay_s: float = Field(default=0.0, ge=0)
    shutdown_timeout_s: float = Field(default=30.0, ge=0)

    @field_validator(*_LISTS, mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Lists may come as comma-separated text or as a JSON array."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        if text.startswith("["):
            return json.loads(text)
        return [part.strip() for part in text.split(",") if part.strip()]

    @field_validator("api_keys")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not key.strip() or not key.isascii() or not key.isprintable() for key in value):
            raise ValueError("a key is empty or holds characters that an HTTP header cannot carry")
        return value

    @field_validator("jobs", mode="before")
    @classmethod
    def _jobs(cls, value: Any) -> Any:
        if value == MEMORY:
            return None
        return job_file(value) if isinstance(value, str) else value

    @field_validator("log_level")
    @classmethod
    def _level(cls, value: str) -> str:
        level = value.strip().lower()
        if level not in ("debug", "info", "warning", "error"):
            raise ValueError("use debug, info, warning or error")
        return level

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **changes: Any) -> ServerSettings:
        """Settings from the environment, with `changes` on top; None in `changes` keeps what the environment says.

        Raises:
            EdgeError: A value is malformed; names the variable or setting, never a key.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for name in cls.model_fields:
            variable = next((p + name.upper() for p in PREFIXES if env.get(p + name.upper(), "") != ""), None)
            if variable is not None:
                values[name], origin[name] = env[variable], variable
        for name, value in changes.items():
            if value is not None:
                values[name], origin[name] = value, f"--{name.replace('_', '-')}"
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            raise EdgeError(
                f"{origin.get(name, name)} is malformed: {first['msg']}.", "docs/server.md has the settings."
            ) from error

    @property
    def loopback(self) -> bool:
        """Whether `host` is reachable from this machine only."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def models_managed(self) -> bool:
        """Whether clients may load and unload models: what `manage_models` says, else everybody but strangers.

        Pixano's clients load models by ``POST /v1/models``, and only bundles of this machine can be loaded, so
        holders of a key and users of this machine may. Without keys beyond loopback anybody could unload what others
        work with.
        """
        return bool(self.loopback or self.api_keys) if self.manage_models is None else self.manage_models

    def weak_keys(self) -> int:
        """How many keys are short enough to be guessed."""
        return sum(len(key) < STRONG_KEY for key in self.api_keys)

    def check_bind(self) -> None:
        """Refuses to serve everybody by accident.

        Raises:
            EdgeError: The address is not loopback, there is no key, and `allow_anonymous` is off.
        """
        if not (self.loopback or self.api_keys or self.allow_anonymous):
            raise EdgeError(
                f"Binding {self.host} without an API key would serve everybody who can reach this machine.",
                "Set keys with PIXANO_EDGE_API_KEYS or --api-key-file, bind 127.0.0.1, or say --allow-anonymous.",
            )
