"""Where a packaged detector goes wrong with shapes: all twelve asked of held-out scenes, by shape, size and cover.

python -m pixano_edge.export.demo.shape_errors --bundle engine/assets/grounding-dino-demo
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.export.demo.detect_eval import IOU, LOWEST_SCORE, box_iou
from pixano_edge.export.demo.judge_owlv2 import FIRST_SEED
from pixano_edge.export.demo.scenes import SHAPES, generate_scene, is_evaluated

log = logging.getLogger("shape_errors")
MISSED = "-"


def main(bundle: Path, scenes: int) -> None:
    """Prints the shares of objects whose best box, of those that lie right, has the right shape."""
    detector = open_detector(Bundle.open(bundle), threads=1)
    said: Counter[tuple[str, str]] = Counter()
    sides: dict[int, list[bool]] = defaultdict(list)
    shown: dict[int, list[bool]] = defaultdict(list)
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        scene = generate_scene(seed, "heldout")
        found = detector.detect(scene.image, SHAPES, box_threshold=LOWEST_SCORE, text_threshold=LOWEST_SCORE)
        for obj in filter(is_evaluated, scene.objects):
            near = np.flatnonzero(box_iou(found.boxes, np.array([obj.box], np.float32))[:, 0] >= IOU)
            name = SHAPES[found.labels[near[0]]] if len(near) else MISSED
            said[obj.shape, name] += 1
            side = max(obj.box[2] - obj.box[0], obj.box[3] - obj.box[1])
            sides[side // 40 * 40].append(name == obj.shape)
            shown[int(10 * obj.visible.sum() / obj.amodal.sum()) // 2 * 20].append(name == obj.shape)
    detector.close()
    total = sum(said.values())
    missed = sum(count for (_, name), count in said.items() if name == MISSED)
    right = sum(count for (shape, name), count in said.items() if name == shape)
    log.info("%d objects, %.3f with a box, %.3f with the right name", total, 1 - missed / total, right / total)
    for shape in SHAPES:
        own = Counter({name: count for (true, name), count in said.items() if true == shape})
        log.info("%-10s %s", shape, ", ".join(f"{name} {n / own.total():.2f}" for name, n in own.most_common(5)))
    for title, groups in (("pixels, from", sides), ("% that shows, from", shown)):
        parts = (f"{key}: {np.mean(values):.2f} of {len(values)}" for key, values in sorted(groups.items()))
        log.info("right by %s  %s", title, ", ".join(parts))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Where a packaged detector goes wrong with shapes.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=150)
    arguments = parser.parse_args()
    main(arguments.bundle, arguments.scenes)
