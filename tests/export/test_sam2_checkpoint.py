"""transformers folders and hub ids: what is read, what is refused and with which words."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.sam2 import checkpoint


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_tiny_checkpoint(tiny_checkpoint: Path) -> None:
    loaded = checkpoint.load(tiny_checkpoint, image_only=True)
    assert (loaded.constants.image_size, loaded.constants.hidden_dim) == (128, 32)
    assert loaded.source.format == "transformers"
    assert loaded.source.checkpoint == tiny_checkpoint.name
    assert loaded.source.architecture == "sam2.1-hiera-custom"
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert loaded.source.sha256 == hashlib.sha256(weights).hexdigest()
    assert loaded.licence.spdx == "Apache-2.0"
    assert not loaded.model.training


def test_image_only_checkpoint_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`Sam2Model.save_pretrained` writes model_type sam2 without the video memory."""
    loaded = checkpoint.load(tiny_checkpoint, image_only=True)
    loaded.model.save_pretrained(tmp_path / "image")
    again = checkpoint.load(tmp_path / "image")
    assert again.source.architecture == "sam2-hiera-custom"
    assert again.licence.spdx == "unknown"
    assert "--licence" in again.licence.text
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])


def test_sharded_checkpoint_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(tiny_checkpoint, image_only=True)
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    again = checkpoint.load(tmp_path / "sharded", image_only=True)
    assert again.source.sha256 != loaded.source.sha256
    assert torch.equal(again.model.no_memory_embedding, loaded.model.no_memory_embedding)
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(ExportError, match="lacks model-00002"):
        checkpoint.load(tmp_path / "sharded", image_only=True)


def test_processor_values_are_read(copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}))
    constants = checkpoint.load(copy, image_only=True).constants
    assert constants.mean == (0.1, 0.2, 0.3)
    assert constants.std == (1.0, 1.0, 2.0)
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(ExportError, match="three values"):
        checkpoint.load(copy, image_only=True)
    (copy / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    with pytest.raises(ExportError, match="normalisation"):
        checkpoint.load(copy, image_only=True)


def test_nested_processor_values_are_read(copy: Path) -> None:
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    (copy / "processor_config.json").write_text(json.dumps(nested))
    assert checkpoint.load(copy, image_only=True).constants.mean == (0.1, 0.2, 0.3)


def test_nothing_there() -> None:
    for source in ("no/such/folder/at/all", "missing.pt", "/nowhere/model.pt", "two words/x"):
        with pytest.raises(ExportError, match="no checkpoint"):
            checkpoint.load(source)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ExportError, match=r"sam2\.1-hiera-tiny' could not be downloaded") as error:
        checkpoint.load("facebook/sam2.1-hiera-tiny")
    assert "network" in error.value.action


@pytest.mark.parametrize("name", ["ConnectError", "ReadTimeout", "RemoteProtocolError", "InvalidURL"])
def test_errors_of_the_hub_client_are_export_errors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    base = next(c for c in errors.HfHubHTTPError.__mro__ if c.__module__.startswith("httpx"))
    error = getattr(sys.modules[base.__module__.partition(".")[0]], name)
    # Why they need a word of their own.
    assert not issubclass(error, OSError | ValueError | RuntimeError)

    def download(*args: Any, **options: Any) -> str:
        raise error("connection refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ExportError, match="could not be downloaded: connection refused") as caught:
        checkpoint.load("facebook/sam2.1-hiera-tiny")
    assert "network" in caught.value.action


def test_mistake_in_our_code_is_not_taken_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise TypeError("unexpected keyword")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(TypeError):
        checkpoint.load("facebook/sam2.1-hiera-tiny")


def test_hub_id_downloads_no_code_and_states_the_licence(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, revision=revision, patterns=allow_patterns)
        folder = tmp_path / "snapshot"
        shutil.copytree(tiny_checkpoint, folder)
        (folder / "README.md").unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = checkpoint.load("facebook/sam2.1-hiera-tiny", revision="abc", image_only=True)
    assert asked["revision"] == "abc"
    assert not any(p.endswith((".py", "*")) or "bin" in p or ".pt" in p for p in asked["patterns"])
    assert loaded.source.checkpoint == "facebook/sam2.1-hiera-tiny"
    assert loaded.licence.spdx == "Apache-2.0"


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no config\.json"):
        checkpoint.load(tmp_path)


def test_other_model_type(copy: Path) -> None:
    edit_json(copy / "config.json", model_type="sam")
    with pytest.raises(ExportError, match="'sam'"):
        checkpoint.load(copy, image_only=True)


def test_checkpoint_that_wants_code(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(copy / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(ExportError, match="auto_map"):
        checkpoint.load(copy, image_only=True)


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ExportError, match=r"config\.json"):
        checkpoint.load(copy, image_only=True)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ExportError, match="JSON object"):
        checkpoint.load(copy, image_only=True)


def test_pickled_weights_are_not_opened(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ExportError, match="safetensors"):
        checkpoint.load(copy, image_only=True)


@pytest.mark.parametrize("keep", [0, 6, 200, 0.5, 0.99])
def test_truncated_weights(copy: Path, keep: float) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ExportError, match="damaged or truncated"):
        checkpoint.load(copy, image_only=True)


def test_missing_tensor(copy: Path) -> None:
    """transformers would fill it with random values and go on."""
    edit_weights(copy, no_memory_embedding=None)
    with pytest.raises(ExportError, match="no_memory_embedding"):
        checkpoint.load(copy, image_only=True)


def test_unknown_tensor(copy: Path) -> None:
    edit_weights(copy, adapter=torch.zeros(3))
    with pytest.raises(ExportError, match="adapter"):
        checkpoint.load(copy, image_only=True)


def test_wrong_shape(copy: Path) -> None:
    edit_weights(copy, no_memory_embedding=torch.zeros(1, 1, 7))
    with pytest.raises(ExportError):
        checkpoint.load(copy, image_only=True)


def test_nan_weights(copy: Path) -> None:
    edit_weights(copy, no_memory_embedding=torch.full((1, 1, 32), float("nan")))
    with pytest.raises(ExportError, match="NaN"):
        checkpoint.load(copy, image_only=True)


def test_architecture_outside_the_contract(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["prompt_encoder_config"]["patch_size"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="patch_size"):
        checkpoint.load(copy, image_only=True)


def test_given_licence_wins(tiny_checkpoint: Path) -> None:
    licence = checkpoint.load(tiny_checkpoint, image_only=True, licence="CC-BY-NC-4.0").licence
    assert licence.spdx == "CC-BY-NC-4.0"
    assert "stated" in licence.text
