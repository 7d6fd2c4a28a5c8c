"""`pixano-edge describe`: text about images, streamed to the terminal, or captions of a folder as JSON Lines."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import EdgeError
from ..models.decoder.base import Generated, GenerationOptions, Piece
from ..models.images import decode_image
from ..models.text.messages import Conversation, read_conversation, read_text
from ..models.text.sampling import Sampling
from .describe_file import CaptionFile
from .options import BackendOption, DeviceOption, ForceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, milliseconds, note, print_json, progress
from .segment import list_images

if TYPE_CHECKING:
    from ..models.decoder.model import DecoderModel

app = typer.Typer(rich_markup_mode="markdown")

PROMPT = "Describe this image."
NEW_TOKENS = 256


def answer(
    model: DecoderModel, files: Sequence[Path], prompt: str, system: str | None, options: GenerationOptions, show: Any
) -> dict[str, Any]:
    """The answer to one prompt about some files.

    Args:
        model: The model.
        files: Images, in the order of the prompt.
        prompt: What is asked.
        system: The model's instructions.
        options: How the answer is made.
        show: Called with each piece of text.

    Returns:
        ``files`` and the fields of `Generated`; JSON-ready.

    Raises:
        EdgeError: An image cannot be read, the prompt does not fit, or the model failed.
    """
    images = [decode_image(file) for file in files]
    conversation: Conversation = read_conversation(prompt, [str(file) for file in files], system)
    started, first = time.perf_counter(), None
    with closing(model.stream(conversation, images, options)) as steps:
        for step in steps:
            if isinstance(step, Piece):
                first = time.perf_counter() - started if first is None else first
                show(step.text)
            elif isinstance(step, Generated):
                return {"files": [str(file) for file in files], **step.to_dict(), "first_token_seconds": first}
    raise AssertionError("a stream ends with its answer")


def settings_digest(bundle_hash: str, asked: dict[str, Any]) -> str:
    """What a caption depends on beside the image: the same bundle, prompt and options give the same digest."""
    return hashlib.sha256(repr((bundle_hash, sorted(asked.items()))).encode()).hexdigest()[:16]


def printable(text: str) -> str:
    """Text for a terminal: what a model writes must not move the cursor or change colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def _files(sources: Sequence[Path]) -> list[Path]:
    return [file for source in sources for file in list_images(source)]


def _speed(found: dict[str, Any]) -> str:
    made, seconds = found["usage"]["completion_tokens"], found["decode_seconds"]
    rate = f", {(made - 1) / seconds:.1f} tokens/s" if made > 1 and seconds > 0 else ""
    reused = found["usage"]["reused_tokens"]
    known = f" ({reused} known)" if reused else ""
    return (
        f"{found['usage']['prompt_tokens']} tokens of prompt{known}, {made} of answer, first after "
        f"{milliseconds(found['first_token_seconds'] or 0)}{rate}"
    )


@app.command()
def describe(
    source: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="Images, or folders of images.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "smolvlm-demo",
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask about each image.")] = PROMPT,
    system: Annotated[str | None, typer.Option(help="Instructions for the model, before the prompt.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.jsonl",
            help="Append a line for each image to this file. Started again, what is in it is not done again.",
        ),
    ] = None,
    together: Annotated[bool, typer.Option("--together", help="Ask once about all images.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = NEW_TOKENS,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0: always the most probable token. 1: as probable as they are.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="With --temperature: draw from the tokens that reach this together.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="With --temperature: makes the answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer. Repeatable.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; default: 4096, or what there is.")
    ] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe images, or answer a question about each of them or about all together.

    The answer appears as it is made. With -o each image becomes a line of a JSON Lines file, which may be stopped and
    started again. A file that cannot be read is named and skipped; the command then ends with 1.
    """
    if temperature == 0 and (seed is not None or top_p != 1):
        raise typer.BadParameter("--seed and --top-p have no meaning without --temperature above 0.")
    if together and out is not None:
        raise typer.BadParameter("--together gives one answer: it needs no file of lines (-o).")
    read_text(prompt, "--prompt")
    options = GenerationOptions(max_new_tokens, Sampling(temperature, top_p, seed), tuple(stop or ()))
    files = _files(source)
    opened = open_bundle(bundle)

    from ..models.decoder.opening import open_vlm

    asked: dict[str, Any] = {"device": device, "backend": backend, "precision": precision}
    asked |= {"threads": threads, "force": force, "context": context, "conversations": 1}
    with closing(open_vlm(opened, **asked)) as model:
        if out is not None:
            told = {
                "prompt": prompt,
                "system": system,
                "options": repr(options),
                "precision": model.info()["precision"],
            }
            batch = CaptionFile(out, settings_digest(opened.hash, told))
            results, failed = _write_lines(model, files, prompt, system, options, batch, as_json)
        else:
            groups = [files] if together else [[file] for file in files]
            results, failed = _print_answers(model, groups, prompt, system, options, as_json)
        info = model.info()
    for warning in info["warnings"]:
        note(f"Warning: {warning}")
    if as_json:
        print_json(
            {
                "bundle": opened.manifest.name,
                "engine": info,
                "prompt": prompt,
                "system": system,
                "out": None if out is None else str(out),
                "answers": results,
                "failed": failed,
            }
        )
    if failed:
        note(f"{len(failed)} of {len(files)} file(s) could not be described.")
        raise typer.Exit(1)


def _print_answers(
    model: DecoderModel,
    groups: Sequence[Sequence[Path]],
    prompt: str,
    system: str | None,
    options: GenerationOptions,
    as_json: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    results: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def show(text: str) -> None:
        if not as_json:
            typer.echo(printable(text), nl=False)

    for group in groups:
        names = ", ".join(file.name for file in group)
        if len(groups) > 1 and not as_json:
            typer.secho(f"{names}:", bold=True)
        try:
            found = answer(model, group, prompt, system, options, show)
        except EdgeError as error:
            if len(groups) == 1:
                raise
            failed.append({"file": names, "error": error.message, "action": error.action})
            note(f"Skipped {names}: {error}")
            continue
        results.append(found)
        if not as_json:
            typer.echo()
            note(_speed(found))
    return results, failed


def _write_lines(
    model: DecoderModel,
    files: Sequence[Path],
    prompt: str,
    system: str | None,
    options: GenerationOptions,
    batch: CaptionFile,
    as_json: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    results: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    known = 0
    with batch, progress("Describing", len(files), enabled=not as_json) as bar:
        if batch.repaired:
            note(f"The last line of {batch.path} was cut off and is done again.")
        for file in files:
            bar.label(file.name)
            try:
                digest = file_digest(file)
                if batch.has(file, digest):
                    known += 1
                elif (same := batch.same(digest)) is not None:
                    batch.append(file, digest, {**same, "same_as": same["file"]})
                else:
                    found = answer(model, [file], prompt, system, options, lambda text: None)
                    results.append(found)
                    batch.append(file, digest, {"prompt": prompt, **{k: v for k, v in found.items() if k != "files"}})
            except EdgeError as error:
                failed.append({"file": str(file), "error": error.message, "action": error.action})
                note(f"Skipped {file.name}: {error}")
            bar.step()
    if not as_json:
        typer.echo(
            f"{len(files) - known - len(failed)} of {len(files)} images described, {known} were; in {batch.path}"
        )
    return results, failed


def file_digest(file: Path) -> str:
    """SHA-256 of a file; raises EdgeError when it cannot be read."""
    found = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise EdgeError(f"'{file}' cannot be read: {error.strerror}.", "Check the file.") from error
    return found.hexdigest()
