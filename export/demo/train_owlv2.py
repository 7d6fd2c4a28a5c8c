"""Train the demo's small OWLv2 from scratch on synthetic scenes, on a CPU.

    python -m pixano_edge.export.demo.train_owlv2 --out DIR

Writes ``DIR/last.pt`` every few minutes (continue with ``--resume``) and ``DIR/final``: the averaged weights as an
``owlv2`` folder with its tokenizer and pre-processing. The schedule follows the number of steps, so a run is
reproducible from its seed up to rounding, with the same ``--workers``. The packaged checkpoint is such a run.

Each step shows B scenes and asks all of them for the same hundred or so texts: every shape, the phrases that are true
of the objects, phrases with one word exchanged, phrases at random, and words that name nothing. As in ``train_sam2``, a
step is divided between processes of one thread whose gradients are averaged; matrices inside the towers are trained
with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import Owlv2ForObjectDetection, Owlv2ImageProcessorPil

from pixano_edge.export.demo.detect_batches import ASKED, DetectBatch, detect_batches
from pixano_edge.export.demo.detect_eval import line, measure
from pixano_edge.export.demo.detect_loss import Targets, WhatIsHere, assign, centred, detection_loss
from pixano_edge.export.demo.owlv2_model import (
    IMAGE_SIZE,
    TorchDetector,
    encode_texts,
    initialise,
    normalise,
    predict,
    tiny_config,
)
from pixano_edge.export.demo.scenes import SHAPES
from pixano_edge.export.demo.textures import COLORS, PATTERNS
from pixano_edge.export.demo.train_sam2 import average, rate, share_gradients
from pixano_edge.export.demo.words import NAMED_PATTERNS, Phrase, all_phrases, build_tokenizer, spoken, stranger

log = logging.getLogger("train_owlv2")
COLOR_NAMES = tuple(COLORS)
RANDOM_PHRASES, STRANGE_TEXTS = 16, 4


def ask_phrases(words: Tensor, rng: np.random.Generator) -> list[Phrase]:
    """The phrases of a step: all shapes, those true of the objects, each with one word exchanged, some at random.

    ``words`` (n, 3) int64 of the objects that are asked for.
    """
    phrases = {Phrase(shape): None for shape in SHAPES}
    for shape, color, pattern in words.tolist():
        name, tint, dress = SHAPES[shape], COLOR_NAMES[color], PATTERNS[pattern]
        phrases[Phrase(name, color=tint)] = None
        other = SHAPES[rng.integers(len(SHAPES))]
        phrases[Phrase(other, color=tint) if rng.random() < 0.4 else _recolored(name, rng)] = None
        if dress in NAMED_PATTERNS:
            phrases[Phrase(name, pattern=dress)] = None
        if rng.random() < 0.5:
            phrases[Phrase(name, pattern=NAMED_PATTERNS[rng.integers(len(NAMED_PATTERNS))])] = None
    every = all_phrases()
    for index in rng.permutation(len(every))[:RANDOM_PHRASES]:
        phrases[every[index]] = None
    return list(phrases)


def _recolored(shape: str, rng: np.random.Generator) -> Phrase:
    return Phrase(shape, color=COLOR_NAMES[rng.integers(len(COLOR_NAMES))])


def matches(words: Tensor, phrases: list[Phrase], more: int) -> Tensor:
    """Which phrase is true of objects ``words`` (..., 3): (..., K) bool, ``more`` columns of texts that never are."""

    def index(names: tuple[str, ...], word: str | None) -> int:
        return -1 if word is None else names.index(word)

    rows = [(index(SHAPES, p.shape), index(COLOR_NAMES, p.color), index(PATTERNS, p.pattern)) for p in phrases]
    asked = torch.tensor(rows)
    true = ((asked < 0) | (words[..., None, :] == asked)).all(-1)
    return torch.cat([true, true.new_zeros(*true.shape[:-1], more)], -1)


def step_loss(
    model: Owlv2ForObjectDetection,
    tokenizer: Any,
    here: WhatIsHere,
    batch: DetectBatch,
    progress: float,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """The losses of a batch; ``progress`` of the run, 0 to 1, turns down the second task, and lets the model choose
    which token answers for an object."""
    words, state = torch.from_numpy(batch.words), torch.from_numpy(batch.state)
    phrases = ask_phrases(words[state == ASKED], rng)
    texts = [spoken(phrase, rng) for phrase in phrases] + [stranger(rng) for _ in range(STRANGE_TEXTS)]
    targets = Targets(
        boxes=centred(torch.from_numpy(batch.boxes)),
        state=state,
        match=matches(words, phrases, STRANGE_TEXTS),
        words=words,
        owner=torch.from_numpy(batch.owner).long(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = predict(model, normalise(torch.from_numpy(batch.images)), encode_texts(model, tokenizer, texts))
        dense = here.loss(out.features, targets)
    tokens = assign(out, targets, choice=min(1.0, max(0.0, (progress - 0.05) / 0.15)))
    losses = detection_loss(out, targets, tokens)
    losses["here"] = (1 - 0.7 * progress) * dense
    return losses


def build_optimizers(
    model: Owlv2ForObjectDetection, here: WhatIsHere, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of both towers' layers, AdamW for the rest; parts of CLIP that detection never uses (its
    image projection and its scale) stay as they are."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = [*here.parameters()]
    for name, parameter in model.named_parameters():
        if name in ("owlv2.visual_projection.weight", "owlv2.logit_scale"):
            parameter.requires_grad_(False)
            continue
        (matrices if ".encoder.layers." in name and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def write_folder(model: Owlv2ForObjectDetection, tokenizer: Any, folder: Path) -> None:
    """Writes what ``Owlv2ForObjectDetection`` and ``Owlv2Processor`` load: weights, tokenizer, pre-processing."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)


def train(rank: int, args: argparse.Namespace) -> None:
    """Run or continue a training as the command line asks, as one of ``args.workers`` processes."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        stream=sys.stdout,
        format="%(asctime)s %(message)s",
    )
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{args.port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = Owlv2ForObjectDetection(tiny_config(len(tokenizer)))
    model.set_attn_implementation("eager")  # its backward pass is much faster on a CPU than the fused one's
    initialise(model)
    model.train()
    ema = copy.deepcopy(model).eval()
    here = WhatIsHere(model.layer_norm.normalized_shape[0])
    optimizers = build_optimizers(model, here, args.lr, args.muon_lr)
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    step, spent = 0, 0.0
    if args.resume:
        state = torch.load(out / "last.pt", weights_only=True)
        for module, key in ((model, "model"), (here, "here"), (ema, "ema")):
            module.load_state_dict(state[key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    log.info("%s, %d trained parameters", args, sum(p.numel() for p in trained))

    def save() -> None:
        part = out / "last.part"
        weights = {"model": model.state_dict(), "here": here.state_dict(), "ema": ema.state_dict()}
        torch.save({**weights, "step": step, "spent": spent, "optimizers": [o.state_dict() for o in optimizers]}, part)
        part.replace(out / "last.pt")
        write_folder(ema, tokenizer, out / "final")

    start = time.monotonic() - spent
    saved_at = logged_at = spent
    sums: dict[str, float] = {}
    count = 0
    share = args.batch // args.workers
    for batch in detect_batches(step, args.seed * args.workers + rank, share, IMAGE_SIZE):
        if step >= args.steps:
            break
        progress = step / args.steps
        factor = rate(progress, args.decay_from)
        rng = np.random.default_rng([13, args.seed, rank, step])
        losses = step_loss(model, tokenizer, here, batch, progress, rng)
        total = torch.stack([*losses.values()]).sum()
        total.backward()
        share_gradients(trained)
        nn.utils.clip_grad_norm_(trained, args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average(ema, model, min(0.998, step / (step + 20)))
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        count += 1
        spent = time.monotonic() - start
        if spent - logged_at > 30:
            means = "  ".join(f"{key} {value / count:.3f}" for key, value in sums.items())
            log.info("%5.1f min  step %d  lr x%.2f  %s", spent / 60, step, factor, means)
            sums, count, logged_at = {}, 0, spent
        if rank == 0 and spent - saved_at > args.save_every * 60:
            saved_at = spent
            save()
            log.info("step %d, held-out %s", step, line(measure(TorchDetector(ema, tokenizer), range(60))))
    if rank != 0:
        return
    save()
    log.info(
        "finished after %.1f min, %d steps; %s",
        spent / 60,
        step,
        line(measure(TorchDetector(ema, tokenizer), range(200))),
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's small OWLv2 on synthetic scenes.")
    parser.add_argument("--out", required=True, help="folder for the checkpoints")
    parser.add_argument("--steps", type=int, default=4600, help="length of the run in steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--batch", type=int, default=16, help="scenes in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="peak rate of Muon")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of a gradient")
    parser.add_argument("--decay-from", type=float, default=0.3, help="fraction of the run where the rate descends")
    parser.add_argument("--save-every", type=float, default=6.0, help="minutes between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; --batch is shared by them")
    parser.add_argument("--port", type=int, default=29541, help="local port by which the processes find each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    spawn(train, args=(arguments,), nprocs=arguments.workers)
