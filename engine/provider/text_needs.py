"""What a vision-language model takes beside its graphs' weights and tensors: KV caches and image features."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..contracts import decoder as decoders
from ..contracts.base import GraphSpec
from ..contracts.decoder import DecoderConstants
from ..models.decoder.base import DEFAULT_CONTEXT, DEFAULT_CONVERSATIONS
from ..runtime.memory import MemoryUse
from ..runtime.ort_providers import OPENVINO
from .families import TEXT_FAMILIES
from .settings import LoadOptions

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest


def without_caches(manifest: Manifest, specs: dict[str, GraphSpec]) -> dict[str, GraphSpec]:
    """The graphs with no tensors of KV caches, which are no buffers of a binding and declared apart."""
    if manifest.family not in TEXT_FAMILIES:
        return specs
    return {
        name: replace(
            spec,
            inputs=tuple(t for t in spec.inputs if not t.name.startswith("past_")),
            outputs=tuple(t for t in spec.outputs if not t.name.startswith("present_")),
        )
        for name, spec in specs.items()
    }


def with_conversations(needs: MemoryUse, manifest: Manifest, options: LoadOptions) -> MemoryUse:
    """The figures of the graphs with a KV cache for each conversation that may be under way.

    Raises:
        ContractError: The decoder's constants do not fit.
    """
    if manifest.family not in TEXT_FAMILIES:
        return needs
    constants = DecoderConstants.from_dict(manifest.constants["decoder"])
    slots = min(options.context or DEFAULT_CONTEXT, constants.max_length)
    dtype = decoders.CACHE_DTYPES.get(options.precision, "float32")
    # The decoder of plain operators writes another cache than it reads (see `target_of`).
    plain = options.backend in ("tensorrt", OPENVINO) or (
        options.device != "cpu" and options.precision not in ("auto", "fp16")
    )
    copies = 2 if plain else 1
    return replace(
        needs,
        caches=(needs.caches or 0) + copies * DEFAULT_CONVERSATIONS * constants.cache_bytes(slots, dtype),
    )
