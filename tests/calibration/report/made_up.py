"""A result with everything in it, made up: what the tests of the report draw."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from pixano_edge.calibration.result import (
    BlockResult,
    Budget,
    CalibrationResult,
    DataSummary,
    GraphSize,
    MemoryUse,
    SampleValue,
    Score,
    SkippedFile,
    Speed,
    TensorRange,
    TruthScore,
    VariantResult,
    WorstSample,
)


def png(seed: int, size: int = 24) -> bytes:
    """A small picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def variant(name: str = "int8", bar: float = 0.98, values: tuple[float, ...] = (0.999, 0.991, 0.972)) -> VariantResult:
    """A variant of two graphs with blocks, ranges and pictures; it passes if the mean of `values` meets `bar`."""
    budget = Budget("mask_iou", bar)
    held_out = Score.of(tuple(SampleValue(f"scene-{i}.png", v) for i, v in enumerate(values)))
    passed = budget.met(held_out.mean)
    blocks = tuple(
        BlockResult(
            graph="image_encoder" if i < 6 else "mask_decoder",
            name=f"blocks.{i}.{'attn' if i % 2 else 'mlp'}",
            kind="attention" if i % 2 else "mlp",
            macs=(i + 1) * 1_000_000,
            weight_bytes=(i + 1) * 4096,
            quantised=i != 3,
            why="alone it costs 0.031 of mask_iou, more than the budget leaves" if i == 3 else "",
            alone=0.969 if i == 3 else 0.9995 - 0.0001 * i,
        )
        for i in range(8)
    )
    rng = np.random.default_rng(0)
    ranges = []
    for i in range(8):
        counts, edges = np.histogram(np.abs(rng.normal(size=20000) * (1 + 9 * (rng.random(20000) < 0.001))), bins=2048)
        amax = float(np.quantile(np.abs(rng.normal(size=1000)), 0.999))
        ranges.append(
            TensorRange(
                graph="image_encoder",
                name=f"blocks.{i}.norm1.output",
                limit=float(edges[-1]),
                counts=TensorRange.merged(counts),
                amax=amax,
                method="percentile 99.9",
                clipped=0.001,
                held_out_clipped=0.0012,
                smoothed=i % 2 == 0,
            )
        )
    return VariantResult(
        name=name,
        precision="int8",
        graphs=(
            GraphSize("image_encoder", 2_600_000, 9_000_000, layers=46, of_layers=48),
            GraphSize("mask_decoder", 1_400_000, 4_000_000, layers=20, of_layers=22),
        ),
        bytes=4_000_000,
        fp32_bytes=13_000_000,
        budget=budget,
        held_out=held_out,
        on_calibration=Score.of((SampleValue("scene-9.png", 0.995),)),
        truth=TruthScore("mask_iou", 0.912, 0.908, 3),
        fp32_speed=(Speed("image_encoder", "onnxruntime CPUExecutionProvider", 2, 20, 0.080, 0.091),),
        speed=(Speed("image_encoder", "onnxruntime CPUExecutionProvider", 2, 20, 0.052, 0.055),),
        memory=(MemoryUse("image_encoder", 21 << 20, 55 << 20, 80 << 20, None),),
        passed=passed,
        published=passed,
        problems=() if passed else (f"mask_iou is {held_out.mean:.4f} on held-out data, below {bar:g}",),
        notes=("The mask decoder is not faster in int8 here: its products are small.",),
        blocks=blocks,
        ranges=tuple(ranges),
        worst=tuple(
            WorstSample(f"scene-{i}.png", v, "click at 12, 9", png(i), png(i + 100)) for i, v in enumerate(values)
        ),
    )


def result(**changes: object) -> CalibrationResult:
    """A whole result; `changes` replace fields."""
    made = CalibrationResult(
        bundle="sam2-demo",
        bundle_hash="ab" * 32,
        family="sam2",
        architecture="sam2-demo",
        created="2026-11-27T03:00:00+00:00",
        command="calibrate sam2-demo --precision int8 --budget 'mask_iou>=0.98'",
        hardware=("CPU: Example, 2 threads usable", "versions: onnxruntime 1.27.0"),
        data=DataSummary(
            "photos",
            "images",
            ("a.png", "b.png"),
            ("scene-0.png", "scene-1.png", "scene-2.png"),
            (SkippedFile("broken.png", "it is cut off"),),
            seed=3,
            digest="cd" * 32,
        ),
        variants=(variant(),),
        seconds=83.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]
