"""Parity of exported vision-language models with PyTorch: features, and logits at every step of greedy answers.

Each graph gets PyTorch's own inputs, so its error is its own: the decoder reads PyTorch's embeddings and, step by step,
the tokens that PyTorch chose. Where every step's largest logit is at PyTorch's token, the graphs' own greedy answer is
PyTorch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from pixano_edge.engine.bundle.manifest import GenerationParity, ParityReport, TensorParity
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.export.decoder.run import DecoderRun, rounded_decoder
from pixano_edge.export.differences import Worst
from pixano_edge.export.parity import FP16, FP16_CPU, FP32_MAX_REL, Runner, onnx_runner, require_passed
from pixano_edge.export.pipeline import rounded_files
from pixano_edge.export.tensorrt_graph import SUFFIX
from pixano_edge.export.vlm.family import Answer

FP16_MAX_REL = 5e-2
"""Logits of fp16 graphs, over random and trained weights alike; what it means for answers is in `agreement`."""
TOLERANCE = {"fp32_max_rel": FP32_MAX_REL, "fp16_max_rel": FP16_MAX_REL}


@dataclass
class VariantParity:
    """Result of one variant."""

    variant: str
    tensors: list[TensorParity]
    generation: GenerationParity | None = None

    def problems(self) -> list[str]:
        """Every figure that misses the bar, in words. Quantised weights have no bar here: their price is accuracy,
        which is measured on answers."""
        bar = FP32_MAX_REL if self.variant.startswith("fp32") else FP16_MAX_REL
        bar = float("inf") if self.variant.startswith("int") else bar
        figures = [(f"{t.graph}.{t.tensor}", t.max_rel) for t in self.tensors]
        found = [
            f"{self.variant} {name}: relative error {rel:.2e} > {bar:.0e}"
            for name, rel in figures
            if not rel <= bar or not np.isfinite(rel)
        ]
        g = self.generation
        if g is not None and self.variant.startswith("fp32") and g.equal + g.ties < g.tokens:
            found.append(f"{self.variant} answers: {g.tokens - g.equal - g.ties} of {g.tokens} tokens differ")
        return found


def compare_vision(
    run: Runner, specs: Mapping[str, GraphSpec], answers: Sequence[Answer], variant: str
) -> VariantParity:
    """Errors of the vision graphs."""
    worst = {(g.name, t.name): Worst() for g in specs.values() for t in g.outputs}
    for answer in answers:
        for one in answer.runs:
            got = run(one.graph, one.feeds)
            for name, want in one.want.items():
                found = got[name]
                if one.rows is not None:
                    found = found.reshape(-1, found.shape[-1])[one.rows]
                worst[one.graph, name].add(found, want)
    return VariantParity(variant, _tensors(worst, variant))


def measure_vision(
    files: dict[str, Path], specs: Mapping[str, GraphSpec], answers: Sequence[Answer], variant: str, threads: int | None
) -> list[VariantParity]:
    """Figures of one variant; fp16 twice, since ONNX Runtime's CPU provider hides most of its error."""
    if variant.startswith("fp32"):
        return [compare_vision(onnx_runner(files, threads), specs, answers, variant)]
    with rounded_files(files) as copies:
        as_on_gpu = compare_vision(onnx_runner(copies, threads, optimise=False), specs, answers, variant)
    if variant != FP16:
        return [as_on_gpu]
    return [as_on_gpu, compare_vision(onnx_runner(files, threads), specs, answers, FP16_CPU)]


def compare_embedding(file: Path, answers: Sequence[Answer], variant: str, threads: int | None) -> VariantParity:
    """Errors of the token embedding, on the answers' tokens."""
    run = onnx_runner({contract.EMBED_TOKENS: file}, threads)
    worst = {(contract.EMBED_TOKENS, contract.EMBEDS): Worst()}
    for answer in answers:
        got = run(contract.EMBED_TOKENS, {contract.INPUT_IDS: answer.tokens[None].astype(np.int32)})
        worst[contract.EMBED_TOKENS, contract.EMBEDS].add(got[contract.EMBEDS][0], answer.token_embeds)
    return VariantParity(variant, _tensors(worst, variant))


def compare_decoder(decoder: DecoderRun, answers: Sequence[Answer], variant: str) -> VariantParity:
    """Errors of the logits at every step, and how many of PyTorch's tokens they choose."""
    worst = Worst()
    tokens = equal = ties = 0
    for answer in answers:
        got = decoder.logits(answer.parts(), answer.part_positions())
        worst.add(got, answer.logits)
        right = got.argmax(axis=1) == answer.tokens
        close = answer.margins <= 2 * FP32_MAX_REL * float(np.abs(answer.logits).max())
        tokens += len(answer.tokens)
        equal += int(right.sum())
        ties += int((~right & close).sum())
    generation = GenerationParity(
        variant=variant, prompts=len(answers), tokens=tokens, equal=equal, ties=ties, max_rel=worst.relative
    )
    return VariantParity(variant, _tensors({(contract.DECODER, contract.LOGITS): worst}, variant), generation)


def measure_decoder(
    file: Path, constants: DecoderConstants, answers: Sequence[Answer], variant: str, threads: int | None
) -> VariantParity:
    """Figures of one variant. fp16 for TensorRT is measured as a GPU computes it where memory allows; fp16 of ONNX
    Runtime's own operators as the CPU provider computes it, which keeps more digits than a GPU."""
    target = contract.TENSORRT if variant.endswith(SUFFIX) else contract.ONNX
    if variant == FP16 + SUFFIX:
        copy = rounded_decoder(file)
        if copy is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rounded.onnx"
                onnx.save(copy, path)
                del copy
                return compare_decoder(DecoderRun(path, constants, target, threads, optimise=False), answers, variant)
    name = FP16_CPU if variant == FP16 else variant
    return compare_decoder(DecoderRun(file, constants, target, threads), answers, name)


def require(reference: str, answers: Sequence[Answer], variants: Sequence[VariantParity]) -> ParityReport:
    """The report, or ParityError with every figure that misses the bar."""
    problems = [p for v in variants for p in v.problems()]
    report = ParityReport(
        reference=reference,
        inputs=list(dict.fromkeys(a.photo.name for a in answers)),
        tensors=[t for v in variants for t in v.tensors],
        masks=[],
        generations=[v.generation for v in variants if v.generation is not None],
        tolerance=TOLERANCE,
        passed=not problems,
    )
    return require_passed(report, problems)


def _tensors(worst: Mapping[tuple[str, str], Worst], variant: str) -> list[TensorParity]:
    return [
        TensorParity(graph=g, tensor=t, variant=variant, max_abs=w.absolute, max_rel=w.relative)
        for (g, t), w in worst.items()
    ]
