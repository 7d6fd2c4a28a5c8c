"""Opening a bundle of any vision-language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...contracts import qwen2_5_vl, smolvlm
from ...errors import BundleError
from .model import DecoderModel

FAMILIES = (smolvlm.FAMILY, qwen2_5_vl.FAMILY)
"""What `open_vlm` opens."""


def open_vlm(
    bundle: Bundle | Path | str,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    check: Callable[[], None] | None = None,
    force: bool = False,
    **options: Any,
) -> DecoderModel:
    """Opens a vision-language model of whatever family the bundle holds.

    Args:
        bundle: An open bundle or its folder.
        device: See `SmolVlmModel.open`, as the next five.
        backend: Back end.
        precision: Variant.
        threads: Threads of one call.
        check: Called between the steps.
        force: Use a combination although it failed its check here.
        options: More arguments of the family's `open`, such as ``cache_bytes``, ``context`` and ``conversations``.

    Raises:
        BundleError: The bundle holds no such model; or as the family's `open`.
        DeviceError, ContractError, PromptError: As the family's `open`.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    return _model(bundle).open(  # type: ignore[no-any-return]
        bundle,
        device=device,
        backend=backend,
        precision=precision,
        threads=threads,
        check=check,
        force=force,
        **options,
    )


def _model(bundle: Bundle) -> Any:
    """The class that runs a bundle; imported here, since a box needs one of them."""
    family = bundle.manifest.family
    if family == smolvlm.FAMILY:
        from ..smolvlm.model import SmolVlmModel

        return SmolVlmModel
    if family == qwen2_5_vl.FAMILY:
        from ..qwen2_5_vl.model import Qwen2_5VlModel

        return Qwen2_5VlModel
    raise BundleError(
        f"Bundle '{bundle.manifest.name}' holds '{family}', which does not answer in text.",
        f"Families that do: {', '.join(FAMILIES)}.",
    )
