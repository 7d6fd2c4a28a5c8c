"""Train the demo's small SAM 2 from scratch on synthetic scenes, on a CPU.

    python -m pixano_edge.export.demo.train_sam2 --out DIR

Writes ``DIR/last.pt`` every few minutes (continue with ``--resume``) and, at the end, ``DIR/final`` with the
averaged weights as a ``sam2_video`` folder (config.json and model.safetensors). The learning-rate schedule follows
the number of steps and not the speed of the machine (unless ``--minutes`` asks for that), so a run is reproducible from
its seed up to rounding, with the same ``--workers``. The packaged checkpoint is a run with ``--small 0``.

Each step shows B scenes with P clicks and P boxes; every third step asks some of them again with one correcting
click and the logits of the first round as a mask prompt. A step is divided between ``--workers`` processes of one
thread each, whose gradients are averaged: small operations gain little from threads, and lose much by waiting
for each other. Matrices inside blocks are trained with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import Sam2VideoModel

from pixano_edge.export.demo.prompts import Batch, batches
from pixano_edge.export.demo.sam2_eval import held_out_iou
from pixano_edge.export.demo.sam2_model import (
    IMAGE_SIZE,
    Decoded,
    Features,
    decode,
    encode,
    initialise,
    is_memory,
    normalise,
    tiny_config,
)
from pixano_edge.export.demo.surroundings import Surroundings

log = logging.getLogger("train_sam2")
BOX_LABELS = (2, 3)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the object's area, plus dice, for each mask.

    Args:
        logits: (..., H, W) float32.
        target: (..., H, W) float32 coverage in [0, 1].

    Returns:
        (...) float32. The first term is a smooth count of wrong pixels over the pixels of the union (at most twice
        the object's), close to 1 - IoU whatever the object's size; a focal factor keeps easy pixels quiet.
    """
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = (probability.detach() - target).abs()
    area = target.sum((-1, -2))
    union = area + (probability.detach() * (1 - target)).sum((-1, -2))
    union = union.minimum(2 * area).clamp(min=target.shape[-1] * target.shape[-2] / 512)
    pixels = (entropy * (0.25 + wrong)).sum((-1, -2)) / union
    overlap = (probability * target).sum((-1, -2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + area + 1)
    return pixels + dice


def true_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of thresholded logits (..., H, W) and a coverage of that shape; (...) float32, without gradient."""
    predicted, wanted = logits > 0, target > 0.5
    both = (predicted & wanted).sum((-1, -2)).float()
    return both / (predicted | wanted).sum((-1, -2)).clamp(min=1).float()


def rivalry_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Which prompt a pixel belongs to: cross-entropy over the P prompts of an image, at every pixel of an object.

    A mask that only tells objects from background says nothing about the prompt, and training lingers there; this
    term is blind to that part of the answer and rewards only what differs between the prompts.

    Args:
        logits: (B, P, 4, h, w) float32.
        target: (B, P, h, w) float32 coverage.
    """
    owner = (target > 0.5).float()
    asked = owner.sum(1, keepdim=True)
    share = owner / asked.clamp(min=1)
    entropy = -(share[:, :, None] * logits.log_softmax(1)).sum(1).mean(1)
    return (entropy * (asked[:, 0] > 0)).sum() / (asked > 0).sum().clamp(min=1)


def round_loss(
    out: Decoded,
    target: Tensor,
    present: Tensor,
    multimask: bool,
    generator: torch.Generator,
    rivalry: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of one decoding and the index of the candidate a user would be given.

    Args:
        out: of (B, P) prompts.
        target: (B, P, 2h, 2w) float32 coverage, for logits of h x w.
        present: (B, P) float32, 0 where there is no object to find.
        multimask: whether the stock model answers this kind of prompt with candidates 1 to 3 (a single click)
            or with candidate 0 (a box, several clicks). The other kind is trained too, with less weight.
        generator: draws which of candidates 1 to 3 is trained. SAM trains the best of the three, since a click
            on a real picture may mean a whole or a part; here it means one thing, and all three shall know it.
        rivalry: weight of :func:`rivalry_loss`.
    """
    small = F.avg_pool2d(target, 2)
    with torch.no_grad():
        iou = true_iou(out.logits, small[:, :, None].expand_as(out.logits))
        other = torch.randint(1, 4, target.shape[:2], generator=generator)
    chosen = torch.stack([torch.zeros_like(other), other], dim=2)
    size = tuple(target.shape[-2:])
    picked = out.logits.gather(2, chosen[..., None, None].expand(-1, -1, -1, *out.logits.shape[-2:]))
    full = F.interpolate(picked.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    losses = mask_loss(full.unflatten(0, picked.shape[:2]), target[:, :, None].expand(-1, -1, 2, -1, -1))
    weight = torch.tensor([0.5, 1.0] if multimask else [1.0, 0.3])
    masks = (losses * weight).sum(-1)
    quality = (out.iou - iou).abs().mean(-1)
    score = F.binary_cross_entropy_with_logits(out.score, present, reduction="none")
    total = (present * (masks + quality)).mean() + 0.1 * score.mean()
    if rivalry:
        total = total + rivalry * rivalry_loss(out.logits, small)
    given = out.iou[:, :, 1:].argmax(-1) + 1 if multimask else torch.zeros_like(other)
    return total, given


def correction(logits: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One click in the wrong part of each mask: points (B, P, 1, 2) float32 and labels (B, P, 1) int64.

    ``logits`` and ``target`` are (B, P, S/4, S/4). A missed part gives a positive click, a part too many a
    negative one; where nothing is wrong the click falls on the object. Points are pixels of the image of
    ``IMAGE_SIZE``, however large the one that the model saw.
    """
    wanted = target > 0.5
    wrong = ((logits > 0) != wanted).float().flatten(2)
    weights = wrong + 1e-3 * wanted.float().flatten(2) + 1e-6
    cell = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).unflatten(0, logits.shape[:2])
    width = logits.shape[-1]
    jitter = torch.rand(*cell.shape, 2, generator=generator)
    points = (torch.stack([cell % width, cell // width], -1) + jitter) * (IMAGE_SIZE / width) - 0.5
    return points, wanted.flatten(2).gather(2, cell).long()


def step_loss(
    model: Sam2VideoModel,
    surroundings: Surroundings,
    batch: Batch,
    refine: int,
    progress: float,
    generator: torch.Generator,
    shrink: int = 1,
) -> Tensor:
    """The whole loss of a batch; ``refine`` prompts of each kind get a second round (0 for none).

    Both helping terms matter most early: ``progress`` of the run, 0 to 1, turns them down. The model sees pictures and
    masks ``shrink`` times smaller; prompts stay where they are, since only their share of the image's side counts.
    """
    rivalry = 1.0 if progress < 0.15 else 0.2
    pixels = F.avg_pool2d(normalise(torch.from_numpy(batch.images)), shrink)
    with torch.autocast("cpu", torch.bfloat16):
        features = encode(model, pixels)
    shape = batch.clicks.shape[:2]
    clicks = torch.from_numpy(batch.clicks)[:, :, None]
    corners = torch.from_numpy(batch.boxes).reshape(*shape, 2, 2)
    kinds = (
        (clicks, torch.ones(*shape, 1, dtype=torch.long), batch.click_masks, batch.click_present, True),
        (corners, torch.tensor(BOX_LABELS).expand(*shape, 2), batch.box_masks, None, False),
    )
    with torch.autocast("cpu", torch.bfloat16):
        dense = surroundings.loss(features, torch.from_numpy(batch.regions), torch.from_numpy(batch.outlines))
    total = (1 - 0.7 * progress) * dense
    for points, labels, masks, here, multimask in kinds:
        target = F.avg_pool2d(torch.from_numpy(masks).float() / 255, shrink)
        present = torch.ones(shape) if here is None else torch.from_numpy(here)
        with torch.autocast("cpu", torch.bfloat16):
            out = decode(model, features, points, labels)
        loss, given = round_loss(out, target, present, multimask, generator, rivalry)
        total = total + loss
        if refine:
            total = total + second_round(
                model, features, out, given, points, labels, target, present, refine, generator
            )
    return total


def second_round(
    model: Sam2VideoModel,
    features: Features,
    out: Decoded,
    given: Tensor,
    points: Tensor,
    labels: Tensor,
    target: Tensor,
    present: Tensor,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Ask the first ``count`` prompts again, with the mask given in round one and a correcting click."""
    index = given[:, :count, None, None, None].expand(-1, -1, 1, *out.logits.shape[-2:])
    first = out.logits[:, :count].gather(2, index)[:, :, 0].detach()
    click, label = correction(first, F.avg_pool2d(target[:, :count], 2), generator)
    points = torch.cat([points[:, :count], click], 2)
    labels = torch.cat([labels[:, :count], label], 2)
    with torch.autocast("cpu", torch.bfloat16):
        again = decode(model, features, points, labels, mask_input=first)
    loss, _ = round_loss(again, target[:, :count], present[:, :count], False, generator)
    return 0.5 * loss


def build_optimizers(
    model: Sam2VideoModel, surroundings: Surroundings, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward layers, AdamW for the rest; memory is frozen."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = [*surroundings.parameters()]
    for name, parameter in model.named_parameters():
        if is_memory(name):
            parameter.requires_grad_(False)
            continue
        inner = "vision_encoder.backbone.blocks" in name or "mask_decoder.transformer" in name
        (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def rate(progress: float, decay_from: float) -> float:
    """The learning rate's factor: short warm-up, constant, straight descent to 1 % from ``decay_from`` on."""
    if progress < 0.02:
        return max(progress / 0.02, 0.02)
    return 1.0 if progress < decay_from else max(0.01, (1 - progress) / (1 - decay_from))


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move ``ema``'s parameters towards ``model``'s, in place."""
    targets: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    averages: list[Tensor] = [a for a, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    torch._foreach_lerp_(averages, targets, 1 - decay)


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def agreed_minutes(minutes: float) -> float:
    """The first process's clock, so that all processes follow one schedule."""
    clock = torch.tensor([minutes], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return float(clock)


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
    model = Sam2VideoModel(tiny_config())
    model.set_attn_implementation("eager")  # its backward pass is much faster on a CPU than the fused one's
    initialise(model)
    model.train()
    ema = copy.deepcopy(model).eval()
    surroundings = Surroundings()
    optimizers = build_optimizers(model, surroundings, args.lr, args.muon_lr)
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    step, spent = 0, 0.0
    if args.resume:
        state = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(state["model"])
        surroundings.load_state_dict(state["surroundings"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    log.info("%s, %d trained parameters", args, sum(p.numel() for p in trained))
    start = time.monotonic() - spent
    saved_at = logged_at = spent
    running, count = 0.0, 0
    share = args.batch // args.workers
    for batch in batches(step, args.seed * args.workers + rank, share, args.prompts, IMAGE_SIZE):
        spent = 60 * agreed_minutes((time.monotonic() - start) / 60)
        progress = spent / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            break
        factor = rate(progress, args.decay_from)
        generator = torch.Generator().manual_seed((args.seed * args.workers + rank) * 10**8 + step)
        refine = 2 if step % 3 == 0 and progress > 0.1 else 0
        shrink = 2 if progress < args.small else 1
        loss = step_loss(model, surroundings, batch, refine, progress, generator, shrink)
        loss.backward()
        share_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 3.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average(ema, model, min(0.998, step / (step + 20)))
        running, count = running + float(loss.detach()), count + 1
        if spent - logged_at > 30:
            log.info("%5.1f min  step %d  lr x%.2f  loss %.4f", spent / 60, step, factor, running / count)
            running, count, logged_at = 0.0, 0, spent
        if spent - saved_at > args.save_every * 60:
            saved_at = spent
            if rank == 0:
                save(out / "last.pt", model, surroundings, ema, optimizers, step, spent)
                ema.save_pretrained(out / "final")
                log.info("held-out IoU %s", held_out_iou(ema, 40))
    if rank != 0:
        return
    save(out / "last.pt", model, surroundings, ema, optimizers, step, spent)
    ema.save_pretrained(out / "final")
    log.info("finished after %.1f min, %d steps; held-out IoU %s", spent / 60, step, held_out_iou(ema, 200))


def save(
    path: Path,
    model: nn.Module,
    surroundings: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    """Write the state of a run; the old file stays until the new one is whole."""
    part = path.with_suffix(".part")
    weights = {"model": model.state_dict(), "surroundings": surroundings.state_dict(), "ema": ema.state_dict()}
    torch.save({**weights, "step": step, "spent": spent, "optimizers": [o.state_dict() for o in optimizers]}, part)
    part.replace(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's small SAM 2 on synthetic scenes.")
    parser.add_argument("--out", required=True, help="folder for the checkpoints")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=8600, help="length of the run in steps")
    length.add_argument("--minutes", type=float, default=0.0, help="length of the run by the clock instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--batch", type=int, default=8, help="scenes in a step")
    parser.add_argument("--prompts", type=int, default=6, help="clicks, and boxes, for each scene")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=1.5e-3, help="peak rate of Muon")
    parser.add_argument("--decay-from", type=float, default=0.2, help="fraction of the run where the rate descends")
    parser.add_argument("--small", type=float, default=0.6, help="fraction of the run that sees half the side")
    parser.add_argument("--save-every", type=float, default=6.0, help="minutes between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; --batch is shared by them")
    parser.add_argument("--port", type=int, default=29531, help="local port by which the processes find each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    spawn(train, args=(arguments,), nprocs=arguments.workers)
