"""Writes ``tests/data/owl_reference.npz``: model inputs of transformers' OWLv2 and OWL-ViT image processors.

Run from the repository root after a deliberate change: ``python -m tests.support.make_owl_reference``. The file lets
the pre-processing be checked where transformers is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.make_preprocess_reference import procedural_image

REFERENCE = Path(__file__).resolve().parent.parent / "data" / "owl_reference.npz"
SIZE = 32

# (height, width): down- and upscaling, odd and extreme shapes, unchanged size, one pixel.
CASES = ((1, 1), (1, 57), (57, 2), (97, 161), (161, 97), (31, 33), (32, 32), (301, 17), (23, 19), (333, 512))


def processor(family: str, size: int) -> Any:
    """transformers' own, in its form without torchvision."""
    import transformers

    kind = {"owlv2": "Owlv2ImageProcessorPil", "owlvit": "OwlViTImageProcessorPil"}[family]
    return getattr(transformers, kind)(size={"height": size, "width": size})


def owl_reference(family: str, image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    """(1, 3, S, S): what the processor makes of an image."""
    found = processor(family, size)(np.ascontiguousarray(image), input_data_format="channels_last", return_tensors="np")
    return np.asarray(found["pixel_values"])


def main() -> None:
    arrays = {
        f"{family}_{h}x{w}": owl_reference(family, procedural_image(h, w), SIZE)[0]
        for family in ("owlv2", "owlvit")
        for h, w in CASES
    }
    np.savez_compressed(REFERENCE, **arrays)


if __name__ == "__main__":
    main()
