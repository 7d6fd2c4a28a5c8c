"""The sweep behind the settings in `detect_baselines`: mean AP50 on training scenes (none of those that are judged).

Run ``python -m pixano_edge.export.demo.sweep_detect_baselines --scenes 60``; the best settings are the constants there.
"""

from __future__ import annotations

import argparse
import itertools
import logging

import cv2

from pixano_edge.export.demo.detect_baselines import ContourDetector, Settings
from pixano_edge.export.demo.detect_eval import Tallies, ask, summarise
from pixano_edge.export.demo.scenes import generate_scene

log = logging.getLogger("sweep_detect_baselines")
FIRST_SEED = 2_000_000
BLURS, TOLERANCES, OPENINGS, SMALLEST = (0, 5, 9, 15, 23), (20.0, 30.0, 40.0, 60.0), (0, 3, 7), (60, 150, 400)


def main(scenes: int) -> None:
    """Prints one line for each setting; blur and tolerance first, then the two others at the best of these."""
    cv2.setNumThreads(1)
    drawn = [generate_scene(seed, "train") for seed in range(FIRST_SEED, FIRST_SEED + scenes)]

    def tried(settings: Settings) -> float:
        tallies = Tallies()
        for scene in drawn:
            ask(ContourDetector(settings), scene, tallies)
        found = summarise(tallies)
        kinds = "  ".join(f"{kind} {s.ap50:.3f}" for kind, s in found.items())
        log.info("%s  AP50 %s", settings, kinds)
        return found["all"].ap50

    pairs = [Settings(blur=blur, tolerance=reach) for blur, reach in itertools.product(BLURS, TOLERANCES)]
    best = max(pairs, key=tried)
    rest = [Settings(best.blur, best.tolerance, cut, least) for cut, least in itertools.product(OPENINGS, SMALLEST)]
    log.info("best: %s", max(rest, key=tried))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Sweep the settings of the contour detector on training scenes.")
    parser.add_argument("--scenes", type=int, default=60)
    main(parser.parse_args().scenes)
