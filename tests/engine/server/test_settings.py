"""Settings from the environment and from options."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.server import ServerSettings


def test_the_environment_of_pixano_inference_is_read_and_the_own_one_wins() -> None:
    env = {
        "PIXANO_INFERENCE_API_KEYS": "a, b",
        "PIXANO_INFERENCE_MAX_REQUEST_BODY_BYTES": "1000",
        "PIXANO_EDGE_MAX_REQUEST_BODY_BYTES": "2000",
        "PIXANO_INFERENCE_MEDIA_ROOTS": '["/a", "/b,c"]',
        "PIXANO_INFERENCE_MEDIA_ALLOW_URL": "true",
        "PIXANO_INFERENCE_MEDIA_MAX_IMAGE_PIXELS": "100",
        "PIXANO_INFERENCE_CORS_ALLOW_ORIGINS": "https://a",
        "PIXANO_INFERENCE_LOG_LEVEL": "WARNING",
        "PIXANO_INFERENCE_LOG_JSON": "1",
        "PIXANO_EDGE_HOME": "/elsewhere",
        "PIXANO_EDGE_PORT": "",
    }
    found = ServerSettings.read(env, port=0, host=None)
    assert found.api_keys == ("a", "b")
    assert found.max_request_body_bytes == 2000
    assert found.media_roots == (Path("/a"), Path("/b,c"))
    assert (found.media_allow_url, found.media_max_image_pixels) == (True, 100)
    assert found.cors_allow_origins == ("https://a",)
    assert (found.log_level, found.log_json) == ("warning", True)
    assert (found.port, found.host) == (0, "127.0.0.1")


def test_defaults_are_safe() -> None:
    found = ServerSettings()
    assert found.loopback
    assert not found.allow_anonymous
    assert not found.media_allow_url
    assert not found.media_allow_private_ips
    assert found.media_roots == found.bundle_roots == found.cors_allow_origins == ()
    assert not found.demo


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"PIXANO_EDGE_PORT": "http"}, "PIXANO_EDGE_PORT"),
        ({"PIXANO_INFERENCE_LOG_LEVEL": "loud"}, "PIXANO_INFERENCE_LOG_LEVEL"),
        ({"PIXANO_EDGE_API_KEYS": "se\ncret,ok"}, "PIXANO_EDGE_API_KEYS"),
        ({"PIXANO_EDGE_API_KEYS": "["}, "PIXANO_EDGE_API_KEYS"),
    ],
)
def test_a_malformed_variable_is_named_and_no_key_is_shown(env: dict[str, str], named: str) -> None:
    with pytest.raises(EdgeError, match=named) as caught:
        ServerSettings.read(env)
    assert "cret" not in str(caught.value)
    with pytest.raises(EdgeError, match="--media-max-image-bytes"):
        ServerSettings.read({}, media_max_image_bytes=0)


def test_keys_do_not_show_in_a_printed_setting() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


def test_a_folder_for_jobs_is_not_taken_for_a_file(tmp_path: Path) -> None:
    for text, expected in (
        (f"{tmp_path}/new/", tmp_path / "new" / "jobs.sqlite"),
        (str(tmp_path), tmp_path / "jobs.sqlite"),
        (f"{tmp_path}/mine.db", tmp_path / "mine.db"),
    ):
        assert ServerSettings.read({"PIXANO_EDGE_JOBS": text}).jobs == expected
        assert ServerSettings.read({}, jobs=text).jobs == expected
    assert ServerSettings.read({"PIXANO_EDGE_JOBS": "memory"}).jobs is None
    assert ServerSettings.read({"PIXANO_EDGE_JOBS": str(tmp_path)}, jobs="memory").jobs is None
    assert not (tmp_path / "new").exists(), "settings make nothing"


def test_short_keys_are_counted() -> None:
    assert ServerSettings(api_keys=("k" * 15, "k" * 16, "k")).weak_keys() == 2
    assert ServerSettings().weak_keys() == 0
