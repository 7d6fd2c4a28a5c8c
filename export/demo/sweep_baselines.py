"""The sweep behind the settings in `baselines`: ``python -m pixano_edge.export.demo.sweep_baselines --scenes 60``.

Mean IoU on training scenes (none of those that are judged) for every setting; the best ones are the constants there.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from pixano_edge.export.demo.baselines import flood_fill, grabcut
from pixano_edge.export.demo.sam2_eval import iou
from pixano_edge.export.demo.scenes import Mask, Prompt, Scene, generate_scene, held_out_prompts

log = logging.getLogger("sweep_baselines")
FIRST_SEED = 2_000_000
BLURS = (0, 5, 9, 13, 17)
TOLERANCES = (14, 20, 28, 38, 50, 64)
DISKS = (0.04, 0.07, 0.1, 0.14)


def mean_iou(asked: list[tuple[Scene, Prompt]], method: Callable[..., Mask], kind: str, **how: Any) -> float:
    """Mean over all prompts of what a method answers to a ``click`` or a ``box`` with the given settings."""
    masks = (method(s.image, **{kind: getattr(p, kind)}, **how) for s, p in asked)
    return float(np.mean([iou(mask, s.objects[p.index].visible) for mask, (s, p) in zip(masks, asked, strict=True)]))


def main(scenes: int) -> None:
    """Prints one line for each setting."""
    cv2.setNumThreads(1)
    drawn = [generate_scene(seed, "train") for seed in range(FIRST_SEED, FIRST_SEED + scenes)]
    asked = [(scene, prompt) for scene in drawn for prompt in held_out_prompts(scene)]
    for blur in BLURS:
        for tolerance in TOLERANCES:
            click, box = (
                mean_iou(asked, flood_fill, kind, tolerance=tolerance, blur=blur) for kind in ("click", "box")
            )
            log.info("flood fill  blur %2d  tolerance %2d  click %.3f  box %.3f", blur, tolerance, click, box)
    log.info("GrabCut  box %.3f", mean_iou(asked, grabcut, "box"))
    for disk in DISKS:
        log.info("GrabCut  disk %.2f  click %.3f", disk, mean_iou(asked, grabcut, "click", disk=disk))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Sweep the settings of flood fill and GrabCut on training scenes.")
    parser.add_argument("--scenes", type=int, default=60)
    main(parser.parse_args().scenes)
