"""Writes ``tests/data/preprocess_reference.npz``: model inputs computed by PyTorch on procedural images.

Run from the repository root after a deliberate change: ``python -m tests.support.make_preprocess_reference``.
The file lets the pre-processing be checked where PyTorch is not installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

REFERENCE = Path(__file__).resolve().parent.parent / "data" / "preprocess_reference.npz"

# (height, width, model size): down- and upscaling, odd and extreme shapes, unchanged size.
CASES = (
    (1, 1, 32),
    (1, 57, 32),
    (57, 1, 32),
    (97, 161, 32),
    (161, 97, 32),
    (31, 33, 32),
    (32, 32, 32),
    (64, 64, 32),
    (301, 17, 32),
    (23, 19, 64),
    (540, 960, 64),
)


def procedural_image(height: int, width: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 with detail at every scale, from integer arithmetic only."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((x * 73 + y * 151 + c * 31 + x * y * (c + 1) + (x // 7) * (y // 5) * 13) % 256).astype(np.uint8)


def torch_reference(
    image: npt.NDArray[np.uint8],
    size: int,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    antialias: bool = True,
) -> npt.NDArray[np.float32]:
    """(1, 3, S, S): what SAM 2's own transform (torchvision's tensor resize, then normalise) computes."""
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    pixels = interpolate(pixels, (size, size), mode="bilinear", antialias=antialias, align_corners=False)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return normalised.numpy()


def main() -> None:
    arrays = {f"{h}x{w}_to_{s}": torch_reference(procedural_image(h, w), s)[0] for h, w, s in CASES}
    np.savez_compressed(REFERENCE, **arrays)


if __name__ == "__main__":
    main()
