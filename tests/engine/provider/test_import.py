"""What the import of the provider costs, and that names which come later are there all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pixano_edge.engine import bundle

CODE = """
import sys
import pixano_edge.engine.provider
loaded = {"pydantic", "sqlite3", "importlib.metadata", "cv2", "onnxruntime", "tokenizers"} & set(sys.modules)
raise SystemExit(f"imported: {sorted(loaded)}" if loaded else 0)
"""


def test_import_leaves_out_what_only_later_work_needs() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", bundle.__all__)
def test_every_name_of_the_package_is_there(name: str) -> None:
    assert getattr(bundle, name) is not None


def test_other_names_of_the_package_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Bundel'"):
        bundle.Bundel  # type: ignore[attr-defined]  # noqa: B018
