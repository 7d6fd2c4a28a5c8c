"""Average precision of a trained checkpoint in torch, before it is a bundle (then: `pixano-edge bench detect-quality`).

python -m pixano_edge.export.demo.judge_owlv2 --scenes 500
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from transformers import CLIPTokenizer, Owlv2ForObjectDetection

from pixano_edge.export.demo.detect_baselines import ContourDetector
from pixano_edge.export.demo.detect_eval import line, measure
from pixano_edge.export.demo.owlv2_model import TorchDetector

log = logging.getLogger("judge_owlv2")
CHECKPOINT = Path("export/demo/checkpoints/owlv2-demo")
FIRST_SEED = 500_000
"""As in the benchmarks: training watches the first held-out scenes."""


def open_checkpoint(folder: Path) -> TorchDetector:
    """The detector of a checkpoint folder, with its weights in float32."""
    model = Owlv2ForObjectDetection.from_pretrained(folder, dtype=torch.float32)
    return TorchDetector(model, CLIPTokenizer.from_pretrained(folder))


def main(checkpoint: Path, scenes: int, first: int, baseline: bool) -> None:
    """Prints one line for the checkpoint, and one for the baseline if asked for."""
    seeds = range(first, first + scenes)
    log.info("%s: %s", checkpoint, line(measure(open_checkpoint(checkpoint), seeds)))
    if baseline:
        log.info("colours and contours: %s", line(measure(ContourDetector(), seeds)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Judge a checkpoint of the demo's small OWLv2 on held-out scenes.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--first", type=int, default=FIRST_SEED)
    parser.add_argument("--baseline", action="store_true", help="also colours and contours")
    arguments = parser.parse_args()
    main(arguments.checkpoint, arguments.scenes, arguments.first, arguments.baseline)
