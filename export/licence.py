"""Licence of a checkpoint: read from its model card, never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pixano_edge.engine.bundle.manifest import Licence

# Hub licence tags are lower case; SPDX identifiers are not.
_SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "cc0-1.0": "CC0-1.0",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
    "mpl-2.0": "MPL-2.0",
    "gpl-3.0": "GPL-3.0-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "cecill-c": "CECILL-C",
    "cecill-2.1": "CECILL-2.1",
    "unlicense": "Unlicense",
}

ADVICE = "Look up the licence of the weights before you use or share the bundle, and export again with --licence."


def detect(
    folder: Path | None = None,
    hub_id: str | None = None,
    given: str | None = None,
    official: Mapping[str, str] = MappingProxyType({}),
) -> Licence:
    """Licence of a checkpoint as an SPDX identifier, or ``unknown`` with what to do.

    Args:
        folder: Checkpoint folder, whose README.md may start with a YAML front matter.
        hub_id: Hub id the folder was downloaded from.
        given: What the user stated; wins.
        official: SPDX identifier per hub id whose publisher states it; used where the card is silent.
    """
    if given:
        return Licence(spdx=given, text="stated by the user at export")
    tag = card_licence(folder / "README.md") if folder else None
    if tag in _SPDX:
        return Licence(spdx=_SPDX[tag], text=f"model card (license: {tag})")
    if tag:
        return Licence(spdx="unknown", text=f"The model card says 'license: {tag}'. {ADVICE}")
    if hub_id is not None and hub_id in official:
        return Licence(spdx=official[hub_id], text=f"official checkpoint {hub_id}")
    return Licence(spdx="unknown", text=f"The checkpoint states no licence. {ADVICE}")


def card_licence(card: Path) -> str | None:
    """The ``license`` tag in the front matter of a model card, lower case; None if there is none."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    if not front:
        return None
    line = re.search(r"^license:[ \t]*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE)
    return line[1].lower() if line else None
