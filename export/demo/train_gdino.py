"""Train the demo's small Grounding DINO from scratch on synthetic scenes, on a CPU.

    python -m pixano_edge.export.demo.train_gdino --out DIR

Draws its scenes first (``DIR/pool``, or ``--pool``), then trains. Writes ``DIR/last.pt`` every 200 steps (continue with
``--resume``) and at the end ``DIR/final``: the averaged weights as a ``grounding-dino`` folder with its processor. The
schedule follows the number of steps, so a run is reproducible from its seed up to rounding, with the same
``--workers``.

Each scene of a step is asked for phrases of its own, in one caption: what is true of its objects, the same with one
word exchanged, shapes, phrases at random, and words that name nothing. As in ``train_sam2``, a step is divided between
processes of one thread whose gradients are averaged; matrices and convolutions are trained with Muon, the rest with
AdamW. Each process steps its share of the matrices.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GroundingDinoForObjectDetection

from pixano_edge.export.demo.detect_batches import ASKED, SLOTS, turned, turned_box
from pixano_edge.export.demo.detect_eval import line, measure
from pixano_edge.export.demo.detect_loss import centred
from pixano_edge.export.demo.gdino_loss import PARTS, Targets, WhatIsHere, detection_loss
from pixano_edge.export.demo.gdino_model import (
    CHANNELS,
    FIRST_SIZE,
    FIXED_TOKENS,
    IMAGE_SIZE,
    STRIDES,
    TorchDetector,
    build_processor,
    build_tokenizer,
    freeze,
    initialise,
    normalise,
    predict,
    thaw,
    tiny_config,
)
from pixano_edge.export.demo.quick_deformable import quick_deformable
from pixano_edge.export.demo.quick_text import quick_text
from pixano_edge.export.demo.scene_pool import EASY_SHARE, ScenePool, draw_pool, open_pool
from pixano_edge.export.demo.scenes import SHAPES, SIZE
from pixano_edge.export.demo.textures import COLORS, PATTERNS
from pixano_edge.export.demo.train_sam2 import rate, share_gradients
from pixano_edge.export.demo.words import KINDS, NAMED_PATTERNS, Phrase, all_phrases, spoken, stranger

log = logging.getLogger("train_gdino")
COLOR_NAMES = tuple(COLORS)
RANDOM_PHRASES, STRANGE_TEXTS, ONE_KIND = 4, 2, 0.3
EASY_STEPS = 0.06
"""Share of the run that shows only the easy scenes."""
SMALL_STEPS = 0.6
"""Share of the run that shows scenes in ``FIRST_SIZE``."""
FEW_FROM, FEW = 0.85, 0.7
"""Where in the run most captions become short, and how many of them: what a caller asks is seldom forty phrases."""


def ask_phrases(words: NDArray[np.int64], rng: np.random.Generator) -> list[Phrase]:
    """Phrases for a scene with objects ``words`` (n, 3), in no particular order.

    What is true of the objects, the same with one word exchanged, some at random; often every shape alone. Sometimes
    only those of one kind are asked for, as a caller does.
    """
    phrases: dict[Phrase, None] = {}
    if rng.random() < 0.6:
        phrases |= {Phrase(shape): None for shape in SHAPES}
    for shape, color, pattern in words.tolist():
        name, tint, dress = SHAPES[shape], COLOR_NAMES[color], PATTERNS[pattern]
        other, shade = SHAPES[rng.integers(len(SHAPES))], COLOR_NAMES[rng.integers(len(COLORS))]
        phrases |= {Phrase(name): None, Phrase(name, color=tint): None, Phrase(other, color=tint): None}
        if rng.random() < 0.5:
            phrases[Phrase(name, color=shade)] = None
        if dress in NAMED_PATTERNS:
            phrases |= {Phrase(name, pattern=dress): None}
            if rng.random() < 0.5:
                phrases[Phrase(other, pattern=dress)] = None
        if rng.random() < 0.4:
            phrases[Phrase(name, pattern=NAMED_PATTERNS[rng.integers(len(NAMED_PATTERNS))])] = None
    every = all_phrases()
    for index in rng.integers(0, len(every), RANDOM_PHRASES):
        phrases[every[index]] = None
    order = list(phrases)
    if rng.random() < ONE_KIND:
        kind = KINDS[rng.integers(len(KINDS))]
        order = [phrase for phrase in order if phrase.kind == kind]
    return [order[i] for i in rng.permutation(len(order))]


def ask_few(words: NDArray[np.int64], rng: np.random.Generator) -> list[Phrase]:
    """Phrases of one kind for a scene with objects ``words`` (n, 3): what is true of them and about as many others, of
    which half share a word with a true one."""
    kind = KINDS[rng.integers(len(KINDS))]
    every = [phrase for phrase in all_phrases() if phrase.kind == kind]
    true = [phrase for phrase in every if _true_of(phrase, words).any()]
    said = {word for phrase in true for word in phrase.text.split()}
    false = [phrase for phrase in every if phrase not in true]
    alike = [phrase for phrase in false if said & set(phrase.text.split())]
    count = max(1, len(true) + int(rng.integers(-1, 2)))
    chosen = dict.fromkeys(true)
    for group in (alike, false):
        chosen |= {group[i]: None for i in rng.permutation(len(group))[: (count + 1) // 2]}
    order = list(chosen)
    return [order[i] for i in rng.permutation(len(order))]


class Captions:
    """Makes captions of phrases, as the engine does. ``few`` of them are short, see :func:`ask_few`."""

    few = 0.0

    def __init__(self, tokenizer: Any) -> None:
        self._encode = functools.lru_cache(20_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def __call__(
        self, words: NDArray[np.int64], asked: NDArray[np.bool_], rng: np.random.Generator
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Token ids of a caption for a scene with objects ``words`` (M, 3), of which some are ``asked`` (M,) for; and
        which token is part of a phrase that is true of which object, (M, T)."""
        short = bool(self.few) and rng.random() < self.few
        texts: list[tuple[str, Phrase | None]] = [
            (spoken(phrase, rng) if rng.random() < 0.25 else phrase.text, phrase)
            for phrase in (ask_few if short else ask_phrases)(words[asked], rng)
        ]
        for _ in range(int(rng.integers(2)) if short else STRANGE_TEXTS):
            texts.insert(int(rng.integers(len(texts) + 1)), (stranger(rng), None))
        ids = [FIXED_TOKENS["[CLS]"]]
        columns: list[NDArray[np.bool_]] = [np.zeros(len(words), bool)]
        for text, phrase in texts:
            tokens = self._encode(text)
            true = columns[0] if phrase is None else _true_of(phrase, words)
            ids += [*tokens, FIXED_TOKENS["."]]
            columns += [true] * len(tokens) + [columns[0]]
        ids.append(FIXED_TOKENS["[SEP]"])
        columns.append(columns[0])
        return ids, np.stack(columns, 1).astype(np.float32)


def _true_of(phrase: Phrase, words: NDArray[np.int64]) -> NDArray[np.bool_]:
    true = words[:, 0] == SHAPES.index(phrase.shape)
    if phrase.color:
        true = true & (words[:, 1] == COLOR_NAMES.index(phrase.color))
    if phrase.pattern:
        true = true & (words[:, 2] == PATTERNS.index(phrase.pattern))
    return true


def shown(
    pool: ScenePool, row: int, turn: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """A scene in one of its 8 positions and in `size` pixels, for G places a side: image (S, S, 3), boxes (M, 4) and
    owners (PARTS G, PARTS G)."""
    image: Any = np.ascontiguousarray(turned(np.asarray(pool.images[row]), turn))
    if size != SIZE:
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    boxes = np.array([turned_box(tuple(box), SIZE, turn) for box in pool.boxes[row].tolist()], np.float32)
    side = PARTS * size // STRIDES[0]
    places = ((np.arange(side) + 0.5) * pool.owner.shape[1] / side).astype(np.int64)
    owner = turned(np.asarray(pool.owner[row]), turn)[places][:, places]
    return image, boxes, owner.astype(np.int64)


def varied(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A scene a little brighter or darker, flatter or harsher, sometimes with noise: textures are new in judging."""
    if rng.random() < 0.3:
        return image
    pixels = (image.astype(np.float32) - 128) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-10, 10)
    if rng.random() < 0.3:
        pixels += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 8))
    return pixels.clip(0, 255).astype(np.uint8)


def pool_rows(count: int, steps: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The scenes (batch,) of each step: the easy ones first, then all others in epochs of random order."""
    rng = np.random.default_rng([17, seed])
    easy = int(EASY_SHARE * count)
    left = np.empty(0, np.int64)
    for step in range(steps):
        if step == int(EASY_STEPS * steps):
            left = left[:0]
        while len(left) < batch:
            fresh = rng.permutation(easy) if step < int(EASY_STEPS * steps) else easy + rng.permutation(count - easy)
            left = np.concatenate([left, fresh])
        yield left[:batch]
        left = left[batch:]


def make_step(
    pool: ScenePool, captions: Captions, rows: NDArray[np.int64], rng: np.random.Generator, size: int = IMAGE_SIZE
) -> tuple[Tensor, Tensor, Targets]:
    """Images (B, size, size, 3) uint8, token ids (B, T) and targets of some scenes of the pool."""
    images, boxes, owners, ids, matches = [], [], [], [], []
    for row in rows:
        image, box, owner = shown(pool, int(row), int(rng.integers(8)), size)
        tokens, match = captions(pool.words[row], pool.state[row] == ASKED, rng)
        images.append(varied(image, rng))
        boxes.append(box)
        owners.append(owner)
        ids.append(tokens)
        matches.append(match)
    length = max(map(len, ids))
    padded = np.zeros((len(ids), length), np.int64)
    match = np.zeros((len(ids), SLOTS, length), np.float32)
    for i, (tokens, own) in enumerate(zip(ids, matches, strict=True)):
        padded[i, : len(tokens)] = tokens
        match[i, :, : len(tokens)] = own
    targets = Targets(
        boxes=centred(torch.from_numpy(np.stack(boxes))),
        state=torch.from_numpy(np.asarray(pool.state[rows])),
        words=torch.from_numpy(np.asarray(pool.words[rows])),
        match=torch.from_numpy(match),
        real=torch.from_numpy((padded != 0).astype(np.float32)),
        owner=torch.from_numpy(np.stack(owners)),
    )
    return torch.from_numpy(np.stack(images)), torch.from_numpy(padded), targets


def step_loss(
    model: GroundingDinoForObjectDetection,
    here: WhatIsHere,
    images: Tensor,
    ids: Tensor,
    targets: Targets,
    progress: float,
    bf16: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of a step, and how often shapes were right, see :class:`WhatIsHere`; ``progress`` 0 to 1 of the run
    turns the second task down and the products with the text up, and lets the model choose which place answers for an
    object."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = predict(model, normalise(images).contiguous(memory_format=torch.channels_last), ids)
    choice = min(1.0, max(0.0, (progress - 0.05) / 0.15))
    losses, _, queries = detection_loss(out, targets, choice, query_weight=2 + 2 * progress)
    second, rights = here.loss(out, targets, queries)
    for name, value in second.items():
        losses[name] = (1 - 0.8 * progress) * value
    return losses, rights


class FlatParameters:
    """Convolutions as matrices, for Muon: parameters that share memory with those of a model."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._whole = parameters
        self.flat = [nn.Parameter(p.data.flatten(1)) for p in parameters]
        if any(f.data_ptr() != p.data_ptr() for f, p in zip(self.flat, parameters, strict=True)):
            raise ValueError("a convolution's weights are not contiguous")

    def take_gradients(self) -> None:
        """Lets the matrices see the gradients of the convolutions."""
        for flat, whole in zip(self.flat, self._whole, strict=True):
            flat.grad = None if whole.grad is None else whole.grad.contiguous().flatten(1)


def divided(matrices: list[nn.Parameter], parts: int) -> list[list[nn.Parameter]]:
    """Matrices in `parts` groups whose steps of Muon cost about the same."""
    groups: list[list[nn.Parameter]] = [[] for _ in range(parts)]
    costs = [0] * parts
    for matrix in sorted(matrices, key=lambda m: -min(m.shape) * m.numel()):
        least = costs.index(min(costs))
        groups[least].append(matrix)
        costs[least] += min(matrix.shape) * matrix.numel()
    return groups


@torch.no_grad()
def share_matrices(groups: list[list[nn.Parameter]]) -> None:
    """Gives every process the matrices that each has stepped: group i is that of process i."""
    for owner, group in enumerate(groups):
        flat = torch.cat([matrix.flatten() for matrix in group])
        dist.broadcast(flat, owner)
        for matrix, part in zip(group, flat.split([m.numel() for m in group]), strict=True):
            matrix.copy_(part.view_as(matrix))


def build_optimizers(
    model: GroundingDinoForObjectDetection, here: WhatIsHere, args: argparse.Namespace, rank: int = 0
) -> tuple[list[torch.optim.Optimizer], list[list[nn.Parameter]], FlatParameters, list[nn.Parameter]]:
    """Muon for convolutions behind the stem and for matrices of layers, AdamW for the rest.

    Muon costs as much as a fifth of a step's gradients, so each process steps its own share of the matrices.

    Returns:
        The optimizers of process `rank`, Muon first; the matrices of each process; the convolutions; all parameters.
    """
    matrices: list[nn.Parameter] = []
    convolutions: list[nn.Parameter] = []
    rest: list[nn.Parameter] = [*here.parameters()]
    fixed = ("sampling_offsets", "attention_weights", "embeddings")
    for name, parameter in model.named_parameters():
        inner = ".layers." in name or ".layer." in name or ".stages." in name
        if parameter.ndim == 4 and inner:
            convolutions.append(parameter)
        elif parameter.ndim == 2 and inner and not any(word in name for word in fixed) and "bbox" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    flat = FlatParameters(convolutions)
    groups = divided([*matrices, *flat.flat], args.workers)
    muon = torch.optim.Muon(groups[rank], lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw], groups, flat, [*matrices, *convolutions, *rest]


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves ``ema``'s parameters and batch statistics towards ``model``'s, in place."""
    theirs = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    own = [t for t in (*ema.parameters(), *ema.buffers()) if t.is_floating_point()]
    torch._foreach_lerp_(own, theirs, 1 - decay)


def write_folder(model: GroundingDinoForObjectDetection, folder: Path) -> None:
    """Writes what ``GroundingDinoForObjectDetection`` and its processor load; `model` may be thawed."""
    freeze(model).save_pretrained(folder)
    build_processor(build_tokenizer()).save_pretrained(folder)


def train(rank: int, args: argparse.Namespace) -> None:
    """Run or continue a training as the command line asks, as one of ``args.workers`` processes."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        stream=sys.stdout,
        format="%(asctime)s %(message)s",
    )
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    tokenizer = build_tokenizer()
    captions = Captions(tokenizer)
    pool = open_pool(Path(args.pool or out / "pool"))
    model = GroundingDinoForObjectDetection(tiny_config())
    thaw(model)
    initialise(model)
    model.train()
    ema = copy.deepcopy(model).eval()
    here = WhatIsHere(CHANNELS)
    optimizers, groups, flat, trained = build_optimizers(model, here, args, rank)
    step, spent = 0, 0.0
    if args.resume:
        state = torch.load(out / "last.pt", weights_only=True)
        for module, key in ((model, "model"), (here, "here"), (ema, "ema")):
            module.load_state_dict(state[key])
        for optimizer, saved in zip(optimizers, state["optimizers"][rank], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    log.info("%s, %d trained parameters", args, sum(p.numel() for p in trained))

    def save() -> None:
        """To be called by all processes: each has the state of its own share of Muon."""
        states: list[Any] = [None] * args.workers
        dist.all_gather_object(states, [optimizer.state_dict() for optimizer in optimizers])
        if rank == 0:
            part = out / "last.part"
            weights = {"model": model.state_dict(), "here": here.state_dict(), "ema": ema.state_dict()}
            torch.save({**weights, "step": step, "spent": spent, "optimizers": states}, part)
            part.replace(out / "last.pt")

    start = time.monotonic() - spent
    logged_at = spent
    sums: dict[str, float] = {}
    rights, count = torch.zeros(3), 0
    share = args.batch // args.workers
    for index, rows in enumerate(pool_rows(len(pool), args.steps, args.batch, args.seed)):
        if index < step:
            continue
        progress = step / args.steps
        factor = rate(progress, args.decay_from)
        rng = np.random.default_rng([13, args.seed, rank, step])
        captions.few = FEW if progress >= FEW_FROM else 0.0
        size = FIRST_SIZE if progress < SMALL_STEPS else IMAGE_SIZE
        images, ids, targets = make_step(pool, captions, rows[rank * share : (rank + 1) * share], rng, size)
        # SDPA's fused form costs more than the plain one at these lengths, above all in the way back.
        with quick_deformable(), quick_text(model), sdpa_kernel(SDPBackend.MATH):
            losses, right = step_loss(model, here, images, ids, targets, progress)
            torch.stack([*losses.values()]).sum().backward()
        share_gradients(trained)
        nn.utils.clip_grad_norm_(trained, args.clip)
        flat.take_gradients()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        share_matrices(groups)
        for parameter in trained:
            parameter.grad = None
        step += 1
        average(ema, model, min(0.998, step / (step + 20)))
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        rights += right
        count += 1
        spent = time.monotonic() - start
        if spent - logged_at > 30:
            means = "  ".join(f"{key} {value / count:.3f}" for key, value in sums.items())
            shapes = " ".join(f"{value:.3f}" for value in rights / count)
            pace = count * args.batch / (spent - logged_at)
            log.info(
                "%5.1f min  step %d  lr x%.2f  %s  shapes %s  %.1f/s", spent / 60, step, factor, means, shapes, pace
            )
            sums, count, logged_at = {}, 0, spent
            rights.zero_()
        if step % args.save_every == 0:
            save()
        if rank == 0 and step % args.judge_every == 0:
            log.info("step %d, held-out %s", step, line(measure(TorchDetector(ema, tokenizer), range(60))))
    save()
    if rank != 0:
        return
    write_folder(ema, out / "final")
    log.info("finished after %.1f min, %d steps", spent / 60, step)
    log.info("held-out %s", line(measure(TorchDetector(ema, tokenizer), range(args.judge_scenes))))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's small Grounding DINO on synthetic scenes.")
    parser.add_argument("--out", required=True, help="folder for the checkpoints")
    parser.add_argument("--pool", help="folder of the scenes; default: OUT/pool")
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes of the pool")
    parser.add_argument("--steps", type=int, default=4600, help="length of the run in steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--batch", type=int, default=32, help="scenes in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="peak rate of Muon")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of a gradient")
    parser.add_argument("--decay-from", type=float, default=0.3, help="fraction of the run where the rate descends")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--judge-every", type=int, default=400, help="steps between judgements on 60 scenes")
    parser.add_argument("--judge-scenes", type=int, default=200, help="scenes of the judgement at the end")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; --batch is shared by them")
    parser.add_argument("--port", type=int, default=29547, help="local port by which the processes find each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    draw_pool(Path(arguments.pool or Path(arguments.out) / "pool"), arguments.scenes, arguments.seed, arguments.workers)
    sys.stdout.write(f"scenes: {(time.monotonic() - started) / 60:.1f} min\n")
    sys.stdout.flush()
    spawn(train, args=(arguments,), nprocs=arguments.workers)
