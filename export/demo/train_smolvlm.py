"""Train the demo's small SmolVLM from scratch on pictures and questions, on a CPU.

    python -m pixano_edge.export.demo.train_smolvlm --out DIR

Writes ``DIR/last.pt`` every few minutes (continue with ``--resume``) and ``DIR/final``: the averaged weights as a
``smolvlm`` folder with its tokenizer, chat template and pre-processing. The schedule follows the number of steps, so a
run is reproducible from its seed up to rounding, with the same ``--workers``. The packaged checkpoint is such a run
whose length was changed on the way (docs/vlm.md).

Each step shows B new scenes and asks eleven questions about each: two of every type and a caption. As in
``train_sam2``, a step is divided between processes of one thread whose gradients are averaged; matrices inside the
towers are trained with Muon, the rest with AdamW.
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
from numpy.typing import NDArray
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers import SmolVLMForConditionalGeneration

from pixano_edge.export.demo.smolvlm_model import (
    IMAGE_TOKENS,
    Losses,
    WhatIsHere,
    forward,
    initialise,
    normalise,
    tiny_config,
)
from pixano_edge.export.demo.train_sam2 import average, rate, share_gradients
from pixano_edge.export.demo.vlm_words import END, IM_START, IMAGE, PAD, build_tokenizer, write_processor
from pixano_edge.export.demo.vqa_batches import VqaBatch, Writer, vqa_batches
from pixano_edge.export.demo.vqa_eval import cases, judge, line
from pixano_edge.export.demo.vqa_scenes import SIZE

log = logging.getLogger("train_smolvlm")
VALIDATION_SEED = 600_000


def token_ids(tokenizer: Any) -> dict[str, int]:
    """What :func:`~.smolvlm_model.tiny_config` has to know of a tokenizer."""
    names = {"bos": IM_START, "eos": END, "pad": PAD, "image": IMAGE}
    return {"size": len(tokenizer), **{key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}}


def step_loss(model: SmolVLMForConditionalGeneration, here: WhatIsHere, batch: VqaBatch) -> Losses:
    """The losses of a batch."""
    images, tokens, positions, group, answer, shape, color = (
        torch.from_numpy(np.ascontiguousarray(array)) for array in vars(batch).values()
    )
    return forward(model, here, images, tokens, positions, group, answer, (shape, color))


def build_optimizers(
    model: SmolVLMForConditionalGeneration, here: WhatIsHere, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of both towers' layers, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = [*here.parameters()]
    for name, parameter in model.named_parameters():
        (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


class TorchTalker:
    """Greedy answers of the model in PyTorch, for one picture and one question; used to judge training."""

    def __init__(self, model: SmolVLMForConditionalGeneration, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.head = Writer().head

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], question: str, most: int = 80) -> str:
        """The answer without the space before it and its end; ``image`` (SIZE, SIZE, 3) uint8 RGB."""
        asked = self.tokenizer.encode(f"{question}{END}\nAssistant:", add_special_tokens=False)
        tokens = torch.tensor([[*self.head, *asked]])
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=normalise(torch.from_numpy(image)[None])[None],
            max_new_tokens=most,
            do_sample=False,
        )
        return str(self.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


def validation(model: SmolVLMForConditionalGeneration, tokenizer: Any, count: int) -> str:
    """Exact answers, in per cent, to questions that are not among those of the table."""
    talker = TorchTalker(model, tokenizer)
    asked = cases(count, VALIDATION_SEED)
    return line(judge([talker(case.image, case.question.text) for case in asked], asked))


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
    model = SmolVLMForConditionalGeneration(tiny_config(token_ids(tokenizer)))
    model.set_attn_implementation("eager")  # its backward pass is much faster on a CPU than the fused one's
    initialise(model)
    model.train()
    ema = copy.deepcopy(model).eval()
    here = WhatIsHere(model.model.vision_model.embeddings.embed_dim)
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
        ema.save_pretrained(out / "final")
        write_processor(out / "final", tokenizer, SIZE, IMAGE_TOKENS)

    start = time.monotonic() - spent
    saved_at = logged_at = spent
    words = patches = 0.0
    count = 0
    share = args.batch // args.workers
    for batch in vqa_batches(step, args.seed * args.workers + rank, share):
        if step >= args.steps:
            break
        progress = step / args.steps
        factor = rate(progress, args.decay_from)
        losses = step_loss(model, here, batch)
        (losses.words + (1 - 0.7 * progress) * losses.here).backward()
        share_gradients(trained)
        nn.utils.clip_grad_norm_(trained, args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average(ema, model, min(0.998, step / (step + 20)))
        words, patches, count = words + float(losses.words.detach()), patches + float(losses.here.detach()), count + 1
        spent = time.monotonic() - start
        if spent - logged_at > 30:
            means = f"answers {words / count:.3f}  patches {patches / count:.3f}"
            log.info("%5.1f min  step %d  lr x%.2f  %s", spent / 60, step, factor, means)
            words, patches, count, logged_at = 0.0, 0.0, 0, spent
        if rank == 0 and spent - saved_at > args.save_every * 60:
            saved_at = spent
            save()
            log.info("step %d, held-out %s", step, validation(ema, tokenizer, 100))
    if rank != 0:
        return
    save()
    log.info("finished after %.1f min, %d steps; %s", spent / 60, step, validation(ema, tokenizer, 300))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo's small SmolVLM on pictures and questions.")
    parser.add_argument("--out", required=True, help="folder for the checkpoints")
    parser.add_argument("--steps", type=int, default=3200, help="length of the run in steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--batch", type=int, default=24, help="scenes in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="peak rate of Muon")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of a gradient")
    parser.add_argument("--decay-from", type=float, default=0.3, help="fraction of the run where the rate descends")
    parser.add_argument("--save-every", type=float, default=6.0, help="minutes between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; --batch is shared by them")
    parser.add_argument("--port", type=int, default=29551, help="local port by which the processes find each other")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    spawn(train, args=(arguments,), nprocs=arguments.workers)
