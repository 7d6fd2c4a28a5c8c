"""Which commands `bench all` runs for a size, and how a reader repeats each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixano_edge.engine.bundle.manifest import MANIFEST_NAME
from pixano_edge.engine.bundle.store import DEMO_NAMES, demo_path
from pixano_edge.engine.contracts import qwen2_5_vl, smolvlm
from pixano_edge.engine.errors import EdgeError

SIZES = ("demo", "tiny", "small", "base-plus", "large")
PARTS = ("segment", "track", "detect", "describe", "serve", "startup", "memory", "graphs")
"""Run without `--only`, in this order."""
MORE = ("scaling",)
"""Run when asked for."""

_CHECKPOINTS = Path(__file__).resolve().parent.parent / "export" / "demo" / "checkpoints"

# Size of the run -> size of the random model.
_OWL = {"tiny": "small", "small": "base", "base-plus": "base", "large": "base"}
_DINO = {"tiny": "small", "small": "tiny", "base-plus": "tiny", "large": "base"}
_VLM = {"demo": "tiny", "tiny": "256M", "small": "256M", "base-plus": "500M", "large": "500M"}


@dataclass(frozen=True)
class Planned:
    """One command.

    Attributes:
        name: Key of `readings.READERS`.
        arguments: After ``pixano-edge bench``.
    """

    name: str
    arguments: tuple[str, ...]

    @property
    def text(self) -> str:
        """What a reader types."""
        return " ".join(("pixano-edge bench", *(f"'{a}'" if " " in a else a for a in self.arguments)))

    @property
    def command(self) -> tuple[str, ...]:
        """What is run: the same, with JSON on stdout, in a tree that is not installed too."""
        return (sys.executable, "-m", "pixano_edge.engine.cli", "bench", *self.arguments, "--json")


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        size: One of `SIZES`.
        parts: Of `PARTS` and `MORE`; empty: all of `PARTS`.
        quick: Few rounds: shows that everything works, its times mean little.
        threads: Of every contender.
        image_size: Side of the random SAM 2.1's input; None for that of the size.
        compiled: With ``torch.compile`` beside plain PyTorch.
    """

    size: str = "demo"
    parts: tuple[str, ...] = ()
    quick: bool = False
    threads: int = 1
    image_size: int | None = None
    compiled: bool = False


def make_plan(wanted: Wanted) -> list[Planned]:
    """The commands, in order.

    Raises:
        EdgeError: Unknown size or part.
    """
    if wanted.size not in SIZES:
        raise EdgeError(f"There is no size '{wanted.size}'.", f"Sizes: {', '.join(SIZES)}.")
    if unknown := sorted(set(wanted.parts) - {*PARTS, *MORE}):
        raise EdgeError(f"There is no part {unknown}.", f"Parts: {', '.join((*PARTS, *MORE))}.")
    chosen = wanted.parts or PARTS
    return [planned for name in (*PARTS, *MORE) if name in chosen for planned in _commands(name, wanted)]


def _commands(name: str, w: Wanted) -> list[Planned]:
    quick, threads, demo = w.quick, ("--threads", str(w.threads)), w.size == "demo"
    side = () if w.image_size is None else ("--image-size", str(w.image_size))
    sam = _demo("sam2-demo") if demo and w.image_size is None else ("--size", w.size, *side)
    bundle_alone = sam[:2]
    compiled = ("--compile",) if w.compiled else ()

    def rounds(few: int, many: int) -> tuple[str, str]:
        return "--rounds", str(few if quick else many)

    if name == "segment":
        if demo and w.image_size is not None:
            raise EdgeError("The demo model has one image size.", "Leave --image-size out, or use --size tiny.")
        return [Planned(name, (name, *sam, *rounds(2, 20), *threads, *compiled))]
    if name == "track":
        counts = (1,) if quick else (1, 4, 16) if demo else (1, 4)
        objects = [word for count in counts for word in ("--objects", str(count))]
        return [Planned(name, (name, *sam, *objects, *rounds(1, 20 if demo else 5), *threads, *compiled))]
    if name == "detect":
        owl = _demo("owlv2-demo") if demo else ("--family", "owlv2", "--size", _OWL[w.size])
        dino = _demo("grounding-dino-demo") if demo else ("--family", "grounding-dino", "--size", _DINO[w.size])
        return [
            Planned(part, (name, *model, *rounds(2, 20), *threads, *compiled))
            for part, model in (("detect", owl), ("detect-dino", dino))
        ]
    if name == "describe":
        tokens = ("--tokens", "8" if quick else "64")
        packaged = demo_vlm() if demo else None
        model = ("--size", _VLM[w.size]) if packaged is None else _demo(packaged)
        return [Planned(name, (name, *model, *tokens, *rounds(1, 5), *threads))]
    if name == "serve":
        few = ("--clients", "1", "--seconds", "1", "--clicks", "0") if quick else ()
        return [Planned(name, (name, *(bundle_alone if demo else sam), *rounds(3, 50), *few, *threads))]
    if name == "startup":
        models = () if demo else ("--size", w.size, *side)
        return [Planned(name, (name, *models, "--starts", "1" if quick else "5", *threads))]
    if name == "memory":
        return [Planned(name, (name, "--calls", "20" if quick else "500", *threads))]
    if name == "graphs":
        raced = {
            name: bundle_alone if demo else sam,
            **({"graphs-detect": ("--bundle", "owlv2-demo")} if demo else {}),
        }
        return [Planned(part, (name, *model, *rounds(2, 20), *threads)) for part, model in raced.items()]
    return [Planned(name, (name, *(("--quick",) if quick else ()), *threads))]


def _demo(name: str, checkpoints: Path = _CHECKPOINTS) -> tuple[str, ...]:
    """The packaged bundle, with the checkpoint that it was made from where this is a source tree."""
    folder = checkpoints / name
    if not (folder / "config.json").is_file():
        return "--bundle", name
    inside = Path.cwd().resolve()
    shown = folder.relative_to(inside) if folder.is_relative_to(inside) else folder
    return "--bundle", name, "--checkpoint", str(shown)


def demo_vlm() -> str | None:
    """Name of the packaged bundle that describes pictures; None while there is none."""
    for name in DEMO_NAMES:
        file = demo_path(name) / MANIFEST_NAME
        if file.is_file() and json.loads(file.read_bytes())["family"] in (smolvlm.FAMILY, qwen2_5_vl.FAMILY):
            return name
    return None


def shown(text: str, hidden: Mapping[str, str]) -> str:
    """A text without the paths of this machine."""
    for path, name in hidden.items():
        text = text.replace(path, name)
    return text


def hidden_paths(folders: Sequence[tuple[Path, str]]) -> dict[str, str]:
    """For `shown`: the longest first."""
    return dict(sorted(((str(path), name) for path, name in folders), key=lambda pair: -len(pair[0])))
