"""Questions about the scenes of :mod:`.vqa_scenes`, with the one right answer of each, and captions.

Five types are asked and judged: the colour of a thing, how many there are, whether there is one, where it is, and what
it is. Which answer is right is drawn first, evenly among those that the scene allows, and then a question that has it:
a type's most frequent answer is therefore no good guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pixano_edge.export.demo.vqa_scenes import COLOR_NAMES, PLACES, SHAPES, TalkScene, Thing

TYPES: tuple[str, ...] = ("color", "count", "exists", "where", "what")
CAPTION_PROMPTS: tuple[str, ...] = ("Describe the image.", "What is in the image?", "Write a caption.")
_SHOWN = {
    "color": ("What color is the {}?", "Which color does the {} have?"),
    "count": ("How many {} are there?", "Count the {}."),
    "exists": ("Is there {}?", "Can you see {}?"),
    "where": ("Where is the {}?", "In which part of the image is the {}?"),
    "what": ("What is {}?", "What shape is {}?"),
}


@dataclass(frozen=True)
class Question:
    """``kind`` is one of :data:`TYPES` or ``caption``."""

    kind: str
    text: str
    answer: str


def article(words: str) -> str:
    """ "an orange star", "a red star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_phrase(place: int) -> str:
    """ "in the center", "at the top left", as captions and questions say it."""
    name = PLACES[place]
    return f"{'in' if name == 'center' else 'on' if name in ('left', 'right') else 'at'} the {name}"


def caption(things: Iterable[Thing]) -> str:
    """All things in reading order: "A red circle at the top left and a blue star in the center."."""
    parts = [f"{article(f'{t.color} {t.shape}')} {place_phrase(t.place)}" for t in things]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def _only(things: tuple[Thing, ...]) -> list[tuple[Thing, str]]:
    """Every thing with each way of naming it that fits no other one: "star", "red star"."""
    shapes = Counter(t.shape for t in things)
    both = Counter((t.color, t.shape) for t in things)
    named = [(t, t.shape) for t in things if shapes[t.shape] == 1]
    return named + [(t, f"{t.color} {t.shape}") for t in things if both[t.color, t.shape] == 1]


def _colors(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    shapes = Counter(t.shape for t in things)
    for thing in things:
        if shapes[thing.shape] == 1:
            found.setdefault(thing.color, []).append(thing.shape)
    return found


def _counts(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for shape in SHAPES:
        found.setdefault(str(sum(t.shape == shape for t in things)), []).append(_plural(shape))
    for color in COLOR_NAMES:
        found.setdefault(str(sum(t.color == color for t in things)), []).append(f"{color} objects")
    every = found.setdefault(str(len(things)), [])
    every.extend(["objects"] * max(1, len(every)))
    return found


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _exists(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[str]]:
    yes = [article(t.shape) for t in things] + [article(f"{t.color} {t.shape}") for t in things]
    there = {(t.color, t.shape) for t in things}
    no = [article(shape) for shape in SHAPES if all(t.shape != shape for t in things)]
    # One word exchanged is the harder question, so half of what is absent is of that kind.
    for thing in things:
        for _ in range(3):
            near = (thing.color, SHAPES[rng.integers(len(SHAPES))])
            other = (COLOR_NAMES[rng.integers(len(COLOR_NAMES))], thing.shape)
            no.extend(article(" ".join(pair)) for pair in (near, other) if pair not in there)
    return {"yes": yes, "no": no}


def _places(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for thing, name in _only(things):
        found.setdefault(PLACES[thing.place], []).append(name)
    return found


def _shapes(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    colors = Counter(t.color for t in things)
    for thing in things:
        found.setdefault(thing.shape, []).append(place_phrase(thing.place))
        if colors[thing.color] == 1:
            found[thing.shape].append(thing.color)
    return found


_ASK = {"color": _colors, "count": _counts, "exists": _exists, "where": _places, "what": _shapes}


def ask(scene: TalkScene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of a type about a scene; None where the scene allows none (two things cannot be told apart)."""
    if kind == "caption":
        text = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
        return Question(kind, text, caption(scene.things))
    found = {answer: names for answer, names in _ASK[kind](scene.things, rng).items() if names}
    if not found:
        return None
    answer = sorted(found)[rng.integers(len(found))]
    name = found[answer][rng.integers(len(found[answer]))]
    form = _SHOWN[kind][rng.integers(len(_SHOWN[kind]))]
    return Question(kind, form.format(name), answer)


def corpus() -> list[str]:
    """Every word that questions, answers and captions use, in the surroundings where the tokenizer meets them."""
    texts = [*CAPTION_PROMPTS]
    for forms in _SHOWN.values():
        texts.extend(form.replace("{}", "it") for form in forms)
    for shape in SHAPES:
        texts += [f" {shape}", f" {_plural(shape)}", f" {shape}?", f" {_plural(shape)}."]
    texts += [f" {word}" for name in COLOR_NAMES for word in (article(name), article(name).capitalize())]
    texts += [f" {place_phrase(p)}" for p in range(len(PLACES))]
    texts += [f" {n}" for n in range(10)] + [" yes", " no", " objects", " and", "A", "An", " a", " an", ",", "."]
    return texts
