"""What 4 bits cost a bundle's language model, by method, on questions that nothing was fitted to.

``python -m pixano_edge.calibration.int4_report BUNDLE PICTURES``
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pixano_edge.calibration.grams import TappedDecoder
from pixano_edge.calibration.int4_variant import decoder_constants, make_int4
from pixano_edge.calibration.turns import TOKENS, Floats, Question, Turns, record_turns
from pixano_edge.calibration.weight_only import AUTO, METHODS, RTN
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.options import ThreadsOption, open_bundle
from pixano_edge.engine.cli.output import JsonOption, bytes_text, note, print_error, print_json, print_table, progress
from pixano_edge.engine.cli.segment import list_images
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.images import decode_image

QUESTIONS = ("Describe this image.", "What is on this image, and how many of it?")
COLUMNS = ("method", "layers", "worst layer", "logits", "same tokens", "exact answers", "size")


@dataclass(frozen=True)
class MethodCost:
    """One method, against fp32.

    Attributes:
        method: See `weight_only`.
        layers: Mean over the matrices of the output's error relative to the output, on activations kept for judging.
        worst: The largest of them.
        logits: Error of all logits relative to their size, on held-out questions.
        tokens: Share of fp32's tokens that have the largest logit, each after fp32's tokens before it.
        exact: Share of the held-out questions whose greedy answer is fp32's, token by token.
        questions: Held out.
        bytes: Graph and weights of the decoder.
    """

    method: str
    layers: float
    worst: float
    logits: float
    tokens: float
    exact: float
    questions: int
    bytes: int


def compare_methods(
    bundle: Bundle,
    questions: Sequence[Question],
    folder: Path,
    methods: Sequence[str] = (RTN, AUTO),
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[MethodCost]:
    """Quantises the decoder by each method and asks held-out questions.

    Args:
        bundle: A vision-language model with fp32.
        questions: The last quarter, one at least, is held out.
        folder: For what is collected and made.
        methods: To compare.
        tokens: Most tokens of an answer.
        threads: Threads of one call.
        on_step: Called after each method.

    Raises:
        EdgeError: Fewer than three questions, or as `make_int4`.
    """
    if len(questions) < 3:
        raise EdgeError(f"{len(questions)} question(s) are too few.", "Two to fit to and one to be asked at least.")
    held = max(1, len(questions) // 4)
    asked = record_turns(bundle, questions[-held:], folder / "held-out", tokens=tokens, threads=threads)
    constants = decoder_constants(bundle)
    plain = bundle.graph_path(contract.DECODER, "fp32")
    want = _logits(TappedDecoder(plain, constants, [contract.LOGITS], threads), asked)
    found = []
    for method in methods:
        made = make_int4(bundle, questions[:-held], folder, method=method, tokens=tokens, threads=threads)
        got = _logits(TappedDecoder(made.graph, constants, [contract.LOGITS], threads), asked)
        same = [g.argmax(axis=1) == w.argmax(axis=1) for g, w in zip(got, want)]
        wrong = sum(float(np.square(g - w).sum()) for g, w in zip(got, want))
        found.append(
            MethodCost(
                method=method,
                layers=float(np.mean([layer.chosen for layer in made.layers])),
                worst=max(layer.chosen for layer in made.layers),
                logits=float(np.sqrt(wrong / sum(float(np.square(w).sum()) for w in want))),
                tokens=float(np.concatenate(same).mean()),
                exact=float(np.mean([s.all() for s in same])),
                questions=held,
                bytes=made.graph.stat().st_size + made.weights.stat().st_size,
            )
        )
        on_step()
    return found


def _logits(decoder: TappedDecoder, turns: Turns) -> list[Floats]:
    """(steps, V) of each turn."""
    return [np.concatenate([values[0] for values in decoder.run(turn)]) for turn in turns]


app = typer.Typer()


@app.command()
def main(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")],
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures to ask about.")],
    question: Annotated[list[str] | None, typer.Option(help="Asked about each picture. Repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{', '.join((*METHODS, AUTO))}. Repeatable.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = TOKENS,
    threads: ThreadsOption = None,
    work: Annotated[Path | None, typer.Option(help="Keep what is collected here, for a later run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What 4 bits cost a language model's decoder, by method, on questions that nothing was fitted to."""
    methods = method or [*METHODS, AUTO]
    try:
        images = [decode_image(file) for file in list_images(pictures)]
        asked = [Question(image, text) for image in images for text in (question or QUESTIONS)]
        with tempfile.TemporaryDirectory() as scratch, progress("Methods", len(methods), enabled=not as_json) as bar:
            found = compare_methods(
                open_bundle(bundle), asked, work or Path(scratch), methods,
                tokens=tokens, threads=threads, on_step=bar.step,
            )  # fmt: skip
    except EdgeError as error:
        print_error(error, as_json)
        raise typer.Exit(1) from error
    if as_json:
        print_json([asdict(cost) for cost in found])
        return
    rows = [
        (
            cost.method,
            f"{cost.layers:.4f}",
            f"{cost.worst:.4f}",
            f"{cost.logits:.4f}",
            f"{100 * cost.tokens:.1f} %",
            f"{100 * cost.exact:.1f} %",
            bytes_text(cost.bytes),
        )
        for cost in found
    ]
    print_table(COLUMNS, rows, right=COLUMNS[1:])
    note(f"{found[0].questions} of {len(asked)} questions were held out.")


if __name__ == "__main__":
    app()
