"""Answers about a picture: time to the first token and tokens per second, next to transformers and a bound.

Contenders take turns, so that whatever else the machine does meets all of them. A decoder reads all of its weights for
each token, so the bound is the speed at which this machine reads memory over the bytes of the weights; the keys and
values of the prompt are read as well and stand beside it. Answers are compared in the same run: logits of each step
over the tokens that transformers chose in fp32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.decoder import CACHE_DTYPES, DecoderConstants
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.opening import ONNXRUNTIME
from pixano_edge.engine.runtime.ort_providers import OPENVINO

from .bandwidth import Bandwidth, measure_read
from .describe_contenders import Answered, EngineAnswers, GenaiAnswers, TorchAnswers, build_genai
from .llama_cpp import KINDS as LLAMA_KINDS
from .llama_cpp import LlamaCppAnswers, open_llama_cpp
from .segment import REFERENCE, SETTLE_SECONDS
from .torch_options import use_best_threads

OPENED_BY = ", OpenVINO"
OPENVINO_PRECISIONS = ("fp32", "bf16")
"""Of the engine through OpenVINO, where its plug-in is installed and takes this CPU."""

PICTURE = "picture, first question"
AGAIN = "same picture, next question"
TEXT = "text alone"

QUESTION = "Describe this image in detail."
NEXT = "How many things are on it?"
FILL = "Tell me more about all of it, please. "
"""Repeated for the case `TEXT`."""


@dataclass(frozen=True)
class Row:
    """One contender in one case; medians.

    Attributes:
        case: `PICTURE`, `AGAIN` or `TEXT`.
        contender: Who.
        prompt: Tokens of the prompt.
        first: Seconds to the first token, pre-processing included.
        rate: Tokens per second after it.
        ratio: Rate over that of transformers in fp32 in this case; None without it.
        of_bound: Rate over the bound for this contender's weights; None where these are not known.
        graph_share: Of the time after the first token, the part within the decoder's graph; None where unknown.
    """

    case: str
    contender: str
    prompt: int
    first: float
    rate: float
    ratio: float | None
    of_bound: float | None
    graph_share: float | None


@dataclass(frozen=True)
class Accuracy:
    """Answers of one contender against those of transformers in fp32.

    Attributes:
        contender: Who.
        tokens: Compared.
        equal: Steps at which it would have chosen the same token, after the same tokens before.
        max_rel: Largest error of a step's logits, relative to the largest of them; None where only tokens are known.
    """

    contender: str
    tokens: int
    equal: int
    max_rel: float | None


@dataclass(frozen=True)
class Bound:
    """Tokens per second that reading memory allows.

    Attributes:
        variant: Of the bundle.
        weight_bytes: Read for each token.
        cache_bytes: Keys and values read for each token at the length in the middle of the answer.
        rate: Bandwidth over `weight_bytes`.
        rate_with_cache: Bandwidth over both.
    """

    variant: str
    weight_bytes: int
    cache_bytes: int
    rate: float
    rate_with_cache: float


@dataclass(frozen=True)
class Figures:
    """Everything that `measure` found; `left_out` says why a contender is missing."""

    rows: list[Row]
    accuracy: list[Accuracy]
    bounds: list[Bound]
    bandwidth: Bandwidth
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, times in seconds."""
        return asdict(self)


def measure(
    bundle: Bundle,
    checkpoint: Path | None,
    picture: npt.NDArray[np.uint8],
    *,
    tokens: int,
    rounds: int,
    threads: int,
    precisions: Sequence[str] = ("fp32",),
    genai_python: Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Times and compares every contender.

    Args:
        bundle: Exported from `checkpoint`.
        checkpoint: Folder in transformers' format; None leaves transformers and the accuracy out.
        picture: (H, W, 3) uint8 RGB.
        tokens: Of each answer, 2 or more.
        rounds: Answers per contender and case.
        threads: CPU threads of each contender; transformers takes fewer where that is faster.
        precisions: Variants of the bundle.
        genai_python: Interpreter that has onnxruntime-genai.
        step: Told what is about to be timed.
    """
    step("measuring memory")
    bandwidth = measure_read(threads)
    left_out: dict[str, str] = {}
    with ExitStack() as opened:
        step("loading")
        engines = open_engines(bundle, picture, tokens, threads, precisions, opened, left_out)
        torches: dict[str, TorchAnswers] = {}
        if checkpoint is not None:
            for name, dtype in ((REFERENCE, "float32"), ("PyTorch bf16", "bfloat16")):
                torches[name] = TorchAnswers(checkpoint, picture, tokens, threads, dtype)
            step("choosing PyTorch's threads")
            use_best_threads(partial(torches[REFERENCE].text, QUESTION), threads, rounds=1)
        genai = None
        if genai_python is None:
            left_out["onnxruntime-genai"] = "--genai-python names no interpreter that has it"
        elif checkpoint is None:
            left_out["onnxruntime-genai"] = "without --checkpoint there is nothing to build from"
        else:
            step("building for onnxruntime-genai")
            try:
                folder = build_genai(genai_python, checkpoint, checkpoint.with_name(f"{checkpoint.name}.genai-fp32"))
                genai = GenaiAnswers(genai_python, folder, tokens, threads)
                opened.callback(genai.close)
            except EdgeError as error:
                left_out["onnxruntime-genai"] = error.message
        one = next(iter(engines.values()))
        calls: dict[str, dict[str, Callable[[], Answered]]] = {PICTURE: {}, AGAIN: {}, TEXT: {}}
        length = one.first(QUESTION).prompt
        fill = FILL * max(1, (length - 20) // (len(one.prompt_ids(FILL * 9)) - len(one.prompt_ids(FILL * 8))))
        ids = one.prompt_ids(fill)
        step("building for llama.cpp")
        llamas: dict[str, LlamaCppAnswers] = {}
        kinds = [kind for kind, precision in LLAMA_KINDS.items() if f"pixano-edge {precision}" in engines]
        try:
            for kind in kinds:
                answering = open_llama_cpp(checkpoint, kind, tokens, threads, len(ids))
                opened.callback(answering.close)
                llamas[f"llama.cpp {kind} ({answering.version})"] = answering
        except EdgeError as error:
            left_out["llama.cpp"] = error.message
        for name, engine in engines.items():
            turns = itertools.cycle((NEXT, QUESTION))  # never the question that the cache holds
            calls[PICTURE][name] = partial(engine.first, QUESTION)
            calls[AGAIN][name] = partial(_again, engine, turns)
            calls[TEXT][name] = partial(engine.text, fill)
        for name, torch in torches.items():
            calls[PICTURE][name] = partial(torch.first, QUESTION)
            calls[TEXT][name] = partial(torch.text, fill)
        for name, llama in llamas.items():
            calls[TEXT][name] = partial(llama.text, ids)
        if genai is not None:
            calls[TEXT][f"onnxruntime-genai {genai.version} fp32"] = partial(genai.text, ids)
        answers: dict[str, dict[str, list[Answered]]] = {}
        for case, group in calls.items():
            step(case)
            answers[case] = take_turns(group, rounds)
        step("comparing")
        accuracy = compare(engines, torches, answers[TEXT])
        middle = length + tokens // 2
        bounds = [
            bound(bundle, e.precision, middle, bandwidth.bytes_per_second)
            for n, e in engines.items()
            if OPENED_BY not in n
        ]
    of = {f"pixano-edge {b.variant}": b.rate for b in bounds}
    of[REFERENCE] = of.get("pixano-edge fp32", 0.0)
    of |= {name: bandwidth.bytes_per_second / llama.weight_bytes for name, llama in llamas.items()}
    rows = [
        _row(case, name, found, group.get(REFERENCE), of.get(name) or None)
        for case, group in answers.items()
        for name, found in group.items()
    ]
    return Figures(rows, accuracy, bounds, bandwidth, left_out)


def open_engines(
    bundle: Bundle,
    picture: npt.NDArray[np.uint8],
    tokens: int,
    threads: int,
    precisions: Sequence[str],
    opened: ExitStack,
    left_out: dict[str, str],
) -> dict[str, EngineAnswers]:
    """The engine in each precision, and through OpenVINO where that runs here, by name; closed by `opened`. Where it
    does not, `left_out` gets the reason."""
    wanted = [(precision, ONNXRUNTIME) for precision in precisions]
    wanted += [(precision, OPENVINO) for precision in OPENVINO_PRECISIONS]
    engines: dict[str, EngineAnswers] = {}
    for precision, backend in wanted:
        try:
            one = EngineAnswers(bundle, picture, tokens, threads, precision, backend)
        except EdgeError as error:
            if backend != OPENVINO:
                raise
            left_out[f"pixano-edge {precision}{OPENED_BY}"] = error.message
            continue
        opened.callback(one.close)
        engines[f"pixano-edge {one.precision}{OPENED_BY if backend == OPENVINO else ''}"] = one
    return engines


def _again(engine: EngineAnswers, questions: Iterator[str]) -> Answered:
    return engine.again(next(questions))


def take_turns(calls: dict[str, Callable[[], Answered]], rounds: int, warmup: int = 1) -> dict[str, list[Answered]]:
    """Runs every call `rounds` times in turns, the order rotating, as `segment.interleave`; what each found."""
    names = list(calls)
    found: dict[str, list[Answered]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(SETTLE_SECONDS)
            answered = calls[name]()
            if turn >= 0:
                found[name].append(answered)
    return found


def compare(
    engines: dict[str, EngineAnswers], torches: dict[str, TorchAnswers], text: dict[str, list[Answered]]
) -> list[Accuracy]:
    """Everybody against transformers in fp32; nothing without it."""
    if REFERENCE not in torches:
        return []
    tokens, logits = torches[REFERENCE].answer(QUESTION)
    found = []
    for name, engine in engines.items():
        got = engine.logits(QUESTION, tokens)
        errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, logits)]
        equal = sum(int(a.argmax()) == token for a, token in zip(got, tokens))
        found.append(Accuracy(name, len(tokens), equal, max(errors)))
    want = text[REFERENCE][0].tokens
    for name, answered in text.items():
        if name != REFERENCE and answered[0].tokens:
            same = next((i for i, (a, b) in enumerate(zip(answered[0].tokens, want)) if a != b), len(want))
            found.append(Accuracy(f"{name} (text, up to the first difference)", len(want), same, None))
    return found


def bound(bundle: Bundle, precision: str, length: int, bytes_per_second: float) -> Bound:
    """What reading memory allows, for a variant, with so many tokens in the cache."""
    constants = DecoderConstants.from_dict(bundle.manifest.constants["decoder"])
    weights = step_bytes(bundle.graph_path(contract.DECODER, precision))
    cache = constants.cache_bytes(length, CACHE_DTYPES[precision])
    return Bound(precision, weights, cache, bytes_per_second / weights, bytes_per_second / (weights + cache))


def step_bytes(graph: Path) -> int:
    """Bytes of a decoder's weights that one token reads: all of them but the tables of the rotary embedding.

    Weights of an fp32 graph that are stored in half count in full: ONNX Runtime widens them when it loads the graph.
    """
    import onnx

    from pixano_edge.export.half_weights import drop_casts

    model = onnx.load(str(graph), load_external_data=False)
    halves = drop_casts(model)
    tables = {name for node in model.graph.node if node.op_type == "GroupQueryAttention" for name in node.input[7:9]}
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name not in tables:
            size = 4 if tensor.name in halves else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            total += int(np.prod(tensor.dims, dtype=np.int64)) * size
    return total


def _row(
    case: str, name: str, found: Sequence[Answered], reference: Sequence[Answered] | None, of: float | None
) -> Row:
    rate = _rate(found)
    shares = [a.graph / a.rest for a in found if a.graph is not None and a.rest]
    return Row(
        case,
        name,
        found[0].prompt,
        float(np.median([a.first for a in found])),
        rate,
        rate / _rate(reference) if reference else None,
        rate / of if of else None,
        float(np.median(shares)) if shares else None,
    )


def _rate(found: Sequence[Answered]) -> float:
    return float(np.median([(a.count - 1) / a.rest for a in found]))


COLUMNS = ("case", "contender", "prompt", "first token s", "tokens/s", "vs torch fp32", "of the bound", "in the graph")
ACCURACY_COLUMNS = ("contender", "tokens", "equal", "worst logits")


def table_rows(figures: Figures) -> list[tuple[str, ...]]:
    """Cells of the table of times."""

    def share(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.0f} %"

    return [
        (
            row.case,
            row.contender,
            f"{row.prompt}",
            f"{row.first:.2f}",
            f"{row.rate:.1f}",
            "n/a" if row.ratio is None else f"{row.ratio:.2f}x",
            share(row.of_bound),
            share(row.graph_share),
        )
        for row in figures.rows
    ]


def accuracy_rows(figures: Figures) -> list[tuple[str, ...]]:
    """Cells of the table of accuracy."""
    return [
        (a.contender, f"{a.tokens}", f"{a.equal}", "n/a" if a.max_rel is None else f"{a.max_rel:.1e}")
        for a in figures.accuracy
    ]


def bound_lines(figures: Figures) -> list[str]:
    """The bounds in words."""
    b = figures.bandwidth
    lines = [
        f"Memory: {b.bytes_per_second / 1e9:.1f} GB/s read by {b.threads} threads ({b.kernel}, "
        f"{b.read_bytes >> 20} MiB, last-level cache {b.cache_bytes >> 20} MiB)."
    ]
    return lines + [
        f"Bound of {x.variant}: {x.weight_bytes / 1e6:.0f} MB of weights per token, {x.rate:.1f} tokens/s; with "
        f"{x.cache_bytes / 1e6:.0f} MB of keys and values {x.rate_with_cache:.1f}."
        for x in figures.bounds
    ]
