"""What to expect on machines that are not at hand, from arithmetic alone: FLOPs and bytes of a model over a device's.

Nothing here is measured. FLOPs of SAM 2 are counted by PyTorch on the meta device, which runs no arithmetic; those of
the other models are sums over their matrices. A time is the longer one of computing and of reading the weights, inputs
and outputs once; a device reaches a part of its peak, so a range is told beside the floor.

``python -m pixano_edge.benchmarks.cost_model`` prints the tables of docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .report import markdown

SHARES = (0.25, 0.5)
"""Of the floor's speed, what is expected: well-fused graphs reach the upper one, launch by launch the lower one."""

MEMORIES, POINTERS = 7, 16
"""Of a full memory bank: maps, and object pointers of 4 tokens each."""


@dataclass(frozen=True)
class Machine:
    """Peaks of a device, dense, by its vendor's data sheet.

    Attributes:
        name: With the variant that the figures are of.
        fp32: FLOP/s of float32 outside tensor cores.
        fp16: FLOP/s of float16 in tensor cores, sums in float32.
        bandwidth: Bytes/s of memory.
        how: Where the figures come from, or how they follow from the data sheet.
    """

    name: str
    fp32: float
    fp16: float
    bandwidth: float
    how: str


MACHINES = (
    Machine(
        "Jetson AGX Orin 64 GB", 5.3e12, 42.5e12, 204.8e9,
        "fp32 5.3 TFLOP/s; INT8 170 TOP/s sparse on the GPU, so 85 dense and fp16 half of that; 204.8 GB/s",
    ),
    Machine(
        "GeForce RTX 4090", 82.6e12, 165.2e12, 1008e9,
        "fp32 82.6 TFLOP/s; fp16 165.2 TFLOP/s dense with fp32 sums; 1008 GB/s",
    ),
    Machine("H100 SXM 80 GB", 66.9e12, 989.4e12, 3350e9, "fp32 66.9 TFLOP/s; fp16 989.4 TFLOP/s dense; 3.35 TB/s"),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One call of one graph.

    Attributes:
        name: What is done.
        flops: Multiplications and additions of matrix products and convolutions, two for each pair.
        numbers: Weights read, and inputs and outputs moved, in numbers; each has 2 bytes in fp16, 4 in fp32.
    """

    name: str
    flops: float
    numbers: float

    def floor(self, machine: Machine, precision: str) -> float:
        """Seconds that no program can go below."""
        peak, size = (machine.fp16, 2) if precision == "fp16" else (machine.fp32, 4)
        return max(self.flops / peak, self.numbers * size / machine.bandwidth)

    def bound(self, machine: Machine, precision: str) -> str:
        """``computing`` or ``memory``: what the floor is made of."""
        peak, size = (machine.fp16, 2) if precision == "fp16" else (machine.fp32, 4)
        return "computing" if self.flops / peak >= self.numbers * size / machine.bandwidth else "memory"


def sam2_work(size: str, image_size: int = 1024) -> list[Work]:
    """Of SAM 2.1: encoder, decoder for one click, memory attention with a full bank, memory encoder.

    Args:
        size: tiny, small, base-plus or large.
        image_size: Side of the model's input.
    """
    import torch
    from transformers import Sam2VideoModel

    from pixano_edge.export.sam2.sizes import SIZES

    config: Any = next(s for s in SIZES if s.name == f"hiera-{size}").video_config("sam2.1")
    grid = image_size // 16
    config.image_size = image_size
    config.prompt_encoder_config.image_size = image_size
    config.memory_attention_rope_feat_sizes = [grid, grid]
    config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Sam2VideoModel(config).eval()

        def empty(*shape: int) -> Any:
            return torch.empty(shape)

        tokens, memory = grid * grid, MEMORIES * grid * grid + 4 * POINTERS
        high = [empty(1, 32, 4 * grid, 4 * grid), empty(1, 64, 2 * grid, 2 * grid)]
        calls: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
            (f"SAM 2.1 {size}, encoder", model.vision_encoder, (empty(1, 3, image_size, image_size),), {}),
            (
                f"SAM 2.1 {size}, decoder, one click", model.mask_decoder,
                (empty(1, 256, grid, grid), empty(1, 256, grid, grid), empty(1, 1, 2, 256), empty(1, 256, grid, grid)),
                {"multimask_output": True, "high_resolution_features": high},
            ),
            (
                f"SAM 2.1, memory attention, {memory} keys", model.memory_attention,
                (empty(tokens, 1, 256), empty(memory, 1, 64), empty(tokens, 1, 256), empty(memory, 1, 64)),
                {"num_object_pointer_tokens": 4 * POINTERS},
            ),
            (
                "SAM 2.1, memory encoder", model.memory_encoder,
                (empty(1, 256, grid, grid), empty(1, 1, image_size, image_size)), {},
            ),
        ]  # fmt: skip
        return [Work(name, *_count(module, args, more)) for name, module, args, more in calls]


def _count(module: Any, arguments: tuple[Any, ...], more: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of a call on the meta device, and numbers of its weights, inputs and outputs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = module(*arguments, **more)
    numbers = sum(p.numel() for p in module.parameters()) + _numbers([arguments, list(more.values()), found])
    return float(counter.get_total_flops()), float(numbers)


def _numbers(value: Any) -> int:
    """Elements of all tensors in a nest of containers."""
    if hasattr(value, "numel"):
        return int(value.numel())
    if isinstance(value, dict):
        return sum(_numbers(one) for one in value.values())
    return sum(_numbers(one) for one in value) if isinstance(value, list | tuple) else 0


def transformer_work(
    name: str, layers: int, width: int, inner: int, tokens: int, kv_width: int | None = None, gated: bool = False
) -> Work:
    """A transformer over all of its tokens at once.

    Args:
        name: What is done.
        layers: Blocks.
        width: Of a token.
        inner: Width between the two products of a block's second half.
        tokens: Of the input.
        kv_width: Width of the keys, and of the values, where heads share them; None: that of a token.
        gated: Whether the second half has a third product.
    """
    kv = kv_width or width
    weights = layers * (2 * width * width + 2 * width * kv + (3 if gated else 2) * width * inner)
    products = layers * 2 * 2.0 * tokens * tokens * width
    return Work(name, 2.0 * tokens * weights + products, weights + 2.0 * tokens * width)


def owlv2_work() -> Work:
    """The image encoder of OWLv2 base at 960 pixels (random weights of the same shape: `detector_checkpoints`)."""
    from .detector_checkpoints import OWL_SIZES

    vision, _, side = OWL_SIZES["base"]
    tokens = (side // 16) ** 2 + 1
    name = f"OWLv2 base, image encoder, {tokens} tokens"
    return transformer_work(
        name, vision["num_hidden_layers"], vision["hidden_size"], vision["intermediate_size"], tokens
    )


def decode_work(size: str) -> Work:
    """One token of a SmolVLM's answer: every weight of the language model is read once."""
    from .vlm_checkpoints import SIZES

    _, text, _ = SIZES[size]
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    kv = width // text["num_attention_heads"] * text["num_key_value_heads"]
    one = transformer_work("", layers, width, text["intermediate_size"], 1, kv, gated=True)
    head = text["vocab_size"] * width
    return Work(f"SmolVLM {size}, one token", one.flops + 2.0 * head, one.numbers + head)


def all_work(size: str = "tiny", image_size: int = 1024) -> list[Work]:
    """Everything that the tables show."""
    return [*sam2_work(size, image_size), owlv2_work(), decode_work("256M"), decode_work("500M")]


def work_table(work: Sequence[Work]) -> str:
    """GFLOPs and megabytes in fp16."""
    rows = [(w.name, number(w.flops / 1e9), number(2 * w.numbers / 1e6)) for w in work]
    return markdown(("one call", "GFLOP", "MB in fp16"), rows)


def number(value: float) -> str:
    """Two significant digits, more before the point, never an exponent."""
    if value >= 10:
        return f"{value:.0f}"
    digits = 1
    while value and round(value, digits) < 10 ** (1 - digits):
        digits += 1
    return f"{value:.{digits}f}"


def time_table(work: Sequence[Work], precision: str) -> str:
    """Floor and expectation in milliseconds, and what bounds them."""
    rows = []
    for w in work:
        cells = [w.name]
        for machine in MACHINES:
            floor = 1000 * w.floor(machine, precision)
            low, high = floor / SHARES[1], floor / SHARES[0]
            cells.append(f"{number(floor)} ({number(low)} to {number(high)}), {w.bound(machine, precision)}")
        rows.append(cells)
    return markdown(["derived, ms", *(m.name for m in MACHINES)], rows)


def tables(size: str, image_size: int) -> str:
    """All tables as Markdown."""
    work = all_work(size, image_size)
    machines = markdown(("device", "peaks, from data sheets"), [(m.name, m.how) for m in MACHINES])
    return "\n\n".join((
        machines, work_table(work), "In fp16:", time_table(work, "fp16"), "In fp32:", time_table(work, "fp32"),
    ))  # fmt: skip


app = typer.Typer(add_completion=False)


@app.command()
def main(
    size: Annotated[str, typer.Option(help="Of SAM 2.1: tiny, small, base-plus, large.")] = "tiny",
    image_size: Annotated[int, typer.Option(help="Side of its input.")] = 1024,
) -> None:
    """FLOPs, bytes, and the times that follow from them on an Orin, an RTX box and an H100. Needs torch."""
    typer.echo(tables(size, image_size))


if __name__ == "__main__":
    app()
