"""Train the memory of the demo's small SAM 2 on short synthetic clips, on a CPU: after this it tracks.

    python -m pixano_edge.export.demo.train_memory --checkpoint DIR --out DIR

Only the memory parameters learn (memory attention, memory encoder, pointers, codes of time, what stands for absence).
Image encoder, prompt encoder and mask decoder are not touched: every answer about a still image stays the same, bit
for bit. Writes ``OUT/last.pt`` every few minutes (continue with ``--resume``) and ``OUT/final``, a ``sam2_video``
folder with the averaged weights. A run is reproducible from its seed up to rounding, with the same ``--workers``.

Each step takes one new clip and some of the last ones again, in another direction and with other prompts, since
the frozen image encoder is half of the cost of a new clip. All objects of a clip are followed together: the first frame
by a click, a box or a mask; the others as the stock model tracks them, its own masks remembered. After a gap in the
clip, one frame is remembered with its true masks, so that frames far from the prompt are met as well. The gradient runs
through all frames.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import Sam2VideoModel

from pixano_edge.export.demo.clip_batches import ShortClip, short_clips
from pixano_edge.export.demo.clips import make_script
from pixano_edge.export.demo.memory_path import Answer, MemoryPath, of_objects
from pixano_edge.export.demo.memory_start import start_memory
from pixano_edge.export.demo.prompts import sample_box, sample_click
from pixano_edge.export.demo.sam2_model import IMAGE_SIZE, LOGIT_LIMIT, Features, encode, is_memory, normalise
from pixano_edge.export.demo.scenes import mask_box
from pixano_edge.export.demo.track_eval import held_out_j
from pixano_edge.export.demo.train_sam2 import average, correction, mask_loss, rate, share_gradients, true_iou

log = logging.getLogger("train_memory")
KINDS = ("click", "click", "box", "mask")
LOG_EVERY = 10


@dataclass
class Encoded:
    """A short clip with its features: one :class:`Features` of T images, bfloat16 where the encoder gave that."""

    clip: ShortClip
    features: Features


@torch.no_grad()
def encode_clip(model: Sam2VideoModel, clip: ShortClip) -> Encoded:
    """Runs the frozen image encoder."""
    with torch.autocast("cpu", torch.bfloat16):
        return Encoded(clip, encode(model, normalise(torch.from_numpy(clip.images))))


@dataclass
class Tracks:
    """n objects of C clips, all of T frames, in the order in which they are followed.

    ``features`` T times those of C images; ``owner`` (n,) int64 clip of each object; ``times`` T frame numbers, shared
    by all clips; ``masks`` (T, n, S, S) bool. A step from 0 to more than 1 is a gap.
    """

    features: list[Features]
    owner: Tensor
    times: tuple[int, ...]
    masks: Tensor


def gather(clips: Sequence[Encoded], rng: np.random.Generator, most: int) -> Tracks:
    """Puts clips side by side; those without a gap are turned round half the time.

    At most ``most`` objects of each are taken. Clips without a gap beside one with a gap take its frame numbers: their
    prompts then look older than they are, as with objects that hardly move.
    """
    owner: list[int] = []
    masks: list[Tensor] = []
    parts: list[tuple[Features, Tensor]] = []
    frames = len(clips[0].clip.images)
    gap = 0
    for number, encoded in enumerate(clips):
        clip = encoded.clip
        gap = max(gap, clip.times[1] - 1)
        backward = clip.times[1] == 1 and bool(clip.objects[1]) and rng.random() < 0.5
        order = torch.arange(frames - 1, -1, -1) if backward else torch.arange(frames)
        parts.append((encoded.features, order))
        labels = torch.from_numpy(clip.labels)[order]
        for index in rng.permutation(clip.objects[1 if backward else 0])[:most]:
            owner.append(number)
            masks.append(labels == int(index))
    features = [
        Features(
            torch.stack([f.top[order[step]] for f, order in parts]).float(),
            torch.stack([f.s0[order[step]] for f, order in parts]).float(),
            torch.stack([f.s1[order[step]] for f, order in parts]).float(),
            clips[0].features.position,
        )
        for step in range(frames)
    ]
    return Tracks(features, torch.tensor(owner), (0, *(t + gap for t in range(1, frames))), torch.stack(masks, 1))


def first_answer(path: MemoryPath, own: Features, masks: Tensor, kind: str, rng: np.random.Generator) -> Answer:
    """The prompted frame: ``masks`` (n, S, S) bool are what is to be marked, by ``kind``."""
    if kind == "mask":
        return path.given(own, masks.float())
    with torch.no_grad():
        shapes = [mask.numpy() for mask in masks]
        if kind == "click":
            points = torch.tensor([sample_click(rng, shape) for shape in shapes])[:, None]
            return path.prompted(own, points, torch.ones(len(masks), 1, dtype=torch.long))
        corners = np.stack([sample_box(rng, mask_box(shape), IMAGE_SIZE) for shape in shapes])
        points = torch.from_numpy(corners).reshape(-1, 2, 2)
        return path.prompted(own, points, torch.tensor([2, 3]).expand(len(masks), 2))


def bounded(losses: Tensor, most: float = 3.0) -> Tensor:
    """Losses scaled down to ``most`` where they are larger, with their gradient: a sliver of an object that is taken
    for the whole picture must not decide about a step alone."""
    return losses * (most / losses.detach().clamp(min=1e-6)).clamp(max=1)


def answer_loss(answer: Answer, target: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of one frame.

    Args:
        answer: of n objects, by the decoder.
        target: (n, S/2, S/2) float32 coverage.
        present: (n,) float32, 0 for a hidden object, which only the object score is to say.
        generator: draws a second candidate to be trained beside the chosen one, since another frame may choose it.
    """
    assert answer.all is not None
    assert answer.chosen is not None
    logits, guessed = answer.all.logits[:, 0], answer.all.iou[:, 0]
    rows = torch.arange(len(target))
    other = torch.randint(1, 4, (len(target),), generator=generator)
    picked = torch.stack([logits[rows, answer.chosen], logits[rows, other]], 1)
    full = F.interpolate(picked, size=target.shape[-2:], mode="bilinear", align_corners=False)
    masks = bounded(mask_loss(full, target[:, None].expand_as(full))) * torch.tensor([1.0, 0.5])
    small = F.avg_pool2d(target, 2)
    quality = (guessed - true_iou(logits, small[:, None].expand_as(logits))).abs()[:, 1:].mean(1)
    score = bounded(F.binary_cross_entropy_with_logits(answer.score, present, reduction="none"))
    shown = present.sum().clamp(min=1)
    return (present * (masks.sum(1) + 0.1 * quality)).sum() / shown + score.mean()


def taught(answer: Answer, target: Tensor, present: Tensor, who: Tensor) -> Answer:
    """The answer as it is remembered: for objects in ``who`` (n,) bool, with their true mask and presence."""
    truth = (F.avg_pool2d(target, 2) * 2 - 1) * 10
    logits = torch.where(who[:, None, None], truth, answer.logits)
    sure = torch.where(who, present * 20 - 10, answer.score)
    return replace(answer, logits=logits, score=sure, pointer_score=sure)


def clip_loss(
    path: MemoryPath, tracks: Tracks, kind: str, teach: float, fix: bool, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """The loss of following all objects, averaged over the frames, and their mean IoU on the last frame.

    Args:
        path: of the model.
        tracks: the objects.
        kind: how they are marked on the first frame.
        teach: chance that an object's true mask is remembered on a frame instead of the model's.
        fix: whether the middle frame is corrected by a click.
        rng: draws prompts and the above.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    bank = path.bank()
    total, count, last = torch.zeros(()), 0, 0.0
    middle = len(tracks.times) // 2
    for step, time_ in enumerate(tracks.times):
        own = of_objects(tracks.features[step], tracks.owner)
        masks = tracks.masks[step]
        with torch.autocast("cpu", torch.bfloat16):
            if step == 0:
                answer = first_answer(path, own, masks, kind, rng)
                path.remember(bank, time_, own, answer, True)
                continue
            if step == 1 and time_ > 1:
                path.remember(bank, time_, own, path.given(own, masks.float()), False)
                continue
            answer = path.tracked(own, bank.select(time_, False, None))
        target = F.avg_pool2d(masks.float(), 2)
        present = (target.sum((1, 2)) >= 4).float()
        total, count = total + answer_loss(answer, target, present, generator), count + 1
        prompted = fix and step == middle
        if prompted:
            earlier = answer.logits.detach().clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            small = F.avg_pool2d(target, 2)
            points, labels = correction(earlier[:, None], small[:, None], generator)
            with torch.autocast("cpu", torch.bfloat16):
                embed = replace(own, top=path.attend(own, bank.select(time_, False, None)))
                answer = path.prompted(embed, points[:, 0], labels[:, 0], earlier)
            total, count = total + answer_loss(answer, target, present, generator), count + 1
        who = torch.rand(len(masks), generator=generator) < teach
        with torch.autocast("cpu", torch.bfloat16):
            path.remember(bank, time_, own, taught(answer, target, present, who), prompted)
        with torch.no_grad():
            small = F.avg_pool2d(target, 2)
            last = float((true_iou(answer.logits, small) * present).sum() / present.sum().clamp(min=1))
    return total / count, last


def memory_parameters(model: Sam2VideoModel) -> dict[str, nn.Parameter]:
    """The trained parameters by name; all others are frozen."""
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_memory(name) and not name.startswith("no_memory_positional"))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def build_optimizers(parameters: dict[str, nn.Parameter], lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """AdamW, with codes of time, of absence and the like, which start small, learning faster; and Muon for the
    matrices of the memory attention, unless ``muon_lr`` is 0."""
    quick = {
        n for n, p in parameters.items() if p.ndim == 1 or n.startswith(("memory_temporal", "no_obj", "occlusion"))
    }
    inner = {n for n, p in parameters.items() if muon_lr and p.ndim == 2 and n.startswith("memory_attention")} - quick
    rest = parameters.keys() - quick - inner
    groups = [
        {"params": [p for n, p in parameters.items() if n in rest], "lr": lr},
        {"params": [p for n, p in parameters.items() if n in quick], "lr": 2 * lr, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if inner:
        matrices = [p for n, p in parameters.items() if n in inner]
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def start_samples(model: Sam2VideoModel, seed: int) -> Tensor:
    """Embeddings of a few training frames, (N, C, G, G)."""
    images = np.stack([make_script(seed * 10**7 + i, "train").render(0)[0] for i in range(16)])
    with torch.no_grad():
        return encode(model, normalise(torch.from_numpy(images))).top


def schedule(progress: float) -> tuple[float, float]:
    """How often the truth is remembered, and how often a frame is corrected, at a point of the training."""
    return max(0.0, 0.5 - progress), 0.25 if progress > 0.3 else 0.0


def steps_of(model: Sam2VideoModel, args: argparse.Namespace, first: int, stream: int) -> Iterator[tuple[int, Tracks]]:
    """The tracks of steps ``first``, ``first`` + 1, ...; a step takes one new clip and ``args.again`` old ones."""
    kept: deque[Encoded] = deque(maxlen=args.keep)
    start = max(0, first - args.keep)  # so that a resumed run has the clips of before
    for index, clip in enumerate(short_clips(start, stream, args.frames, args.steps), start):
        rng = np.random.default_rng([19, stream, index])
        kept.append(encode_clip(model, clip))
        if index < first:
            continue
        old = [kept[int(i)] for i in rng.integers(len(kept), size=args.again)]
        yield index, gather([kept[-1], *old], rng, args.objects)


def train(rank: int, args: argparse.Namespace) -> None:
    """Run or continue a training as the command line asks, as one of ``args.workers`` processes."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, stream=sys.stdout, format="%(asctime)s %(message)s"
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=args.workers)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # In float32, whatever it is stored in; without dropout, since no clip is seen twice alike.
    model = Sam2VideoModel.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")
    parameters = memory_parameters(model)
    if not args.keep_memory:
        start_memory(model, start_samples(model, args.seed), args.seed)
    ema = copy.deepcopy(model)
    optimizers = build_optimizers(parameters, args.lr, args.muon_lr)
    first, spent = 0, 0.0
    if args.resume:
        state = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["spent"]
    path = MemoryPath(model)
    log.info("%s, %d trained parameters", args, sum(p.numel() for p in parameters.values()))
    begin = time.monotonic() - spent
    saved_at = spent
    losses: list[float] = []
    ious: list[float] = []
    step = first
    for step, tracks in steps_of(model, args, first, args.seed * args.workers + rank):
        progress = step / args.steps
        if progress >= 1 or (args.stop and step >= args.stop):
            break
        shared = np.random.default_rng([23, args.seed, step])  # the same in all processes: equal work for each
        own = np.random.default_rng([29, args.seed * args.workers + rank, step])
        teach, fix = schedule(progress)
        kind = KINDS[shared.integers(len(KINDS))]
        path.refresh()
        loss, iou = clip_loss(path, tracks, kind, teach, bool(shared.random() < fix), own)
        loss.backward()
        for parameter in parameters.values():
            if parameter.grad is None:  # a part that this step did not use; all processes must send alike
                parameter.grad = torch.zeros_like(parameter)
        share_gradients(list(parameters.values()))
        nn.utils.clip_grad_norm_(parameters.values(), args.clip)
        factor = rate(progress, args.decay_from)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average(ema, model, min(0.995, (step + 1) / (step + 21)))
        losses.append(float(loss.detach()))
        ious.append(iou)
        spent = time.monotonic() - begin
        if (step + 1) % LOG_EVERY == 0:
            text = "%5.1f min  step %d  lr x%.2f  loss %.4f  IoU on last frames %.3f"
            log.info(text, spent / 60, step + 1, factor, np.mean(losses), np.mean(ious))
            losses, ious = [], []
        if spent - saved_at > args.save_every * 60:
            saved_at = spent
            if rank == 0:
                save(out, model, ema, optimizers, step + 1, spent)
                log.info("held-out J %s", held_out_j(ema, args.watch))
    if rank == 0:
        spent = time.monotonic() - begin
        save(out, model, ema, optimizers, step, spent)
        log.info("finished after %.1f min, %d steps; held-out J %s", spent / 60, step, held_out_j(ema, 2 * args.watch))


def save(
    out: Path,
    model: Sam2VideoModel,
    ema: Sam2VideoModel,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    """Write the state of a run and the averaged model; the old state stays until the new one is whole."""
    part = out / "last.part"
    weights = {"model": model.state_dict(), "ema": ema.state_dict()}
    torch.save({**weights, "step": step, "spent": spent, "optimizers": [o.state_dict() for o in optimizers]}, part)
    part.replace(out / "last.pt")
    ema.save_pretrained(out / "final")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    packaged = Path(__file__).parent / "checkpoints" / "sam2-demo"
    parser = argparse.ArgumentParser(description="Train the memory of the demo's small SAM 2 on synthetic clips.")
    parser.add_argument("--checkpoint", default=str(packaged), help="sam2_video folder with a trained image part")
    parser.add_argument("--out", required=True, help="folder for the checkpoints")
    parser.add_argument("--steps", type=int, default=900, help="length of the run")
    parser.add_argument("--stop", type=int, default=0, help="leave the run at this step, to be resumed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--keep-memory", action="store_true", help="start from the checkpoint's memory, not anew")
    parser.add_argument("--frames", type=int, default=8, help="frames of a short clip")
    parser.add_argument("--again", type=int, default=2, help="earlier clips in a step, beside the new one")
    parser.add_argument("--keep", type=int, default=32, help="how many earlier clips to draw from")
    parser.add_argument("--objects", type=int, default=3, help="objects of each clip, at most")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.0, help="peak rate of Muon, 0 for AdamW alone")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--decay-from", type=float, default=0.3, help="fraction of the run where the rate descends")
    parser.add_argument("--save-every", type=float, default=10.0, help="minutes between checkpoints")
    parser.add_argument("--watch", type=int, default=3, help="held-out clips to track then")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--port", type=int, default=29532, help="local port by which the processes find each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    spawn(train, args=(arguments,), nprocs=arguments.workers)
