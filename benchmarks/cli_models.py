"""What the commands of `pixano-edge bench` share: the models and pictures that they measure on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.options import open_bundle
from pixano_edge.engine.cli.output import note
from pixano_edge.engine.errors import MissingDependencyError
from pixano_edge.engine.models.images import Rgb, decode_image

from .torch_options import Beside

Step = Callable[[str], object]


def side_of(size: str, image_size: int | None) -> int:
    """Input of a random SAM 2.1 of a size."""
    return image_size or (256 if size == "demo" else 1024)


def random_sam2(size: str, image_size: int | None) -> Bundle:
    """Bundle of a SAM 2.1 that tracks, with random weights, exported once.

    Raises:
        MissingDependencyError: No torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "export", "Making the bundle")
    from .checkpoints import exported_bundle, random_checkpoint

    return open_bundle(str(exported_bundle(random_checkpoint(size, side_of(size, image_size), video=True))))


def random_detector(size: str) -> Bundle:
    """Bundle of an OWLv2 with random weights, exported once."""
    from .checkpoints import exported_bundle
    from .detector_checkpoints import OWLV2, export_detector
    from .detector_checkpoints import random_detector as make

    return open_bundle(str(exported_bundle(make(OWLV2, size), export_detector)))


def check_torch(bundle: str | None) -> bool:
    """Whether PyTorch and transformers can take part.

    Raises:
        MissingDependencyError: They cannot, and there is no bundle either.
    """
    here = all(importlib.util.find_spec(module) is not None for module in ("torch", "transformers"))
    if not here and bundle is None:
        raise MissingDependencyError("torch", "export", "Making the bundle and the comparison with PyTorch")
    return here


def open_pair(
    bundle: str | None,
    checkpoint: Path | None,
    make: Callable[[], Path],
    step: Step,
    export: Callable[[Path, Path], Path] | None = None,
) -> tuple[Bundle, Path | None]:
    """The bundle to measure and the checkpoint to compare it with, which is None where there is no comparison.

    Args:
        bundle: That was asked for; None to export the checkpoint, once.
        checkpoint: That was given.
        make: A checkpoint of random weights, where none was given.
        step: Told what is done.
        export: Of the family; None for SAM 2.
    """
    torch_here = check_torch(bundle)
    if bundle is None:
        from .checkpoints import exported_bundle

        step("making the random checkpoint")
        checkpoint = checkpoint or make()
        step("exporting the bundle")
        opened = open_bundle(str(exported_bundle(checkpoint, export)))
    else:
        opened = open_bundle(bundle)
    if not torch_here:
        note("PyTorch is not installed: no comparison. Install it with: pip install 'pixano-edge[export]'")
        return opened, None
    if checkpoint is None:
        note("Without --checkpoint there is nothing to compare --bundle with.")
    return opened, checkpoint


def check_picture(picture: Path | None) -> None:
    """Raises MissingDependencyError where the default picture is asked for and not there."""
    if picture is None and importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The default picture")


def read_picture(picture: Path | None) -> Rgb:
    """The picture that was given, or a photo of scikit-image."""
    if picture is not None:
        return decode_image(picture)
    from skimage import data

    photo: Rgb = data.coffee()
    return photo


def tell_random(opened: Bundle, what: str) -> None:
    """Remarks that the weights are random, and what that means for the answers."""
    if "-random" in opened.manifest.name:
        note(f"The weights are random: speed is that of the real size, {what}.")


def tell_left_out(left_out: dict[str, str]) -> None:
    """Who was not measured, as remarks."""
    for name, why in left_out.items():
        note(f"Not measured: {name}: {why}")


def told(beside: Beside) -> dict[str, Any]:
    """Who was not measured, and PyTorch's threads, for the file."""
    return {"left_out": beside.left_out, "torch_threads": beside.torch_threads}
