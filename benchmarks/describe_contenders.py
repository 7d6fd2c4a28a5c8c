"""Who answers in `bench describe`: the engine, transformers with its processor, and onnxruntime-genai."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.decoder.base import GenerationOptions, Piece
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.runtime.base import Binding

Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Answered:
    """One timed answer.

    Attributes:
        first: Seconds from the picture's pixels to the first token.
        rest: Seconds from the first token to the last.
        tokens: Ids, where the contender tells them.
        prompt: Tokens of the prompt.
        count: Tokens of the answer.
        graph: Of `rest`, what the decoder's graph took; None where it is not known.
    """

    first: float
    rest: float
    count: int
    prompt: int = 0
    tokens: tuple[int, ...] = ()
    graph: float | None = None


class EngineAnswers:
    """The engine's model of a bundle, on the CPU.

    Args:
        bundle: The bundle.
        picture: Asked about.
        tokens: Of each answer.
        threads: CPU threads.
        precision: Variant.
        backend: Of the engine; it is not checked before, since answers are compared in the run that times them.

    Raises:
        EdgeError: It does not run here.
    """

    def __init__(
        self, bundle: Bundle, picture: Rgb, tokens: int, threads: int, precision: str, backend: str = "onnxruntime"
    ) -> None:
        self.model: Any = open_vlm(
            bundle,
            device="cpu",
            backend=backend,
            precision=precision,
            threads=threads,
            conversations=1,
            prove=False,
        )
        self.precision = str(self.model.info()["precision"])
        self._picture = picture
        self._options = GenerationOptions(tokens, go_on=True)

    def first(self, question: str) -> Answered:
        """With everything that was kept dropped before."""
        self.model.shrink()
        return self.again(question)

    def again(self, question: str) -> Answered:
        """With the picture known, where the last question was about it."""
        return self._timed(question, [self._picture])

    def text(self, question: str) -> Answered:
        """Without the picture."""
        self.model.shrink()
        return self._timed(question, [])

    def logits(self, question: str, answer: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """After the prompt and after each token of an answer but the last."""
        conversation = read_conversation(question, [self._picture])
        return list(self.model.logits(conversation, [self._picture], list(answer)[:-1]))

    def prompt_ids(self, question: str) -> list[int]:
        """Of the question without the picture."""
        return [int(i) for i in self.model.prepare(read_conversation(question), []).ids]

    def close(self) -> None:
        self.model.close()

    def _timed(self, question: str, images: list[Rgb]) -> Answered:
        conversation = read_conversation(question, images)
        decoder, real, graph = self.model._decoder.decoder, Binding.run, 0.0

        def run(binding: Binding) -> None:
            nonlocal graph
            begun = time.perf_counter()
            real(binding)
            if binding.session is decoder and first:
                graph += time.perf_counter() - begun

        started, first = time.perf_counter(), 0.0
        Binding.run = run  # type: ignore[method-assign,assignment]
        try:
            with closing(self.model.stream(conversation, images, self._options)) as steps:
                for step in steps:
                    if isinstance(step, Piece) and not first:
                        first = time.perf_counter()
                ended = time.perf_counter()
        finally:
            Binding.run = real  # type: ignore[method-assign]
        usage = step.usage
        return Answered(first - started, ended - first, usage.completion, usage.prompt, graph=graph)


class TorchAnswers:
    """transformers' model and processor, from the picture's pixels; it keeps nothing between questions.

    Args:
        checkpoint: Folder in transformers' format.
        picture: Asked about.
        tokens: Of each answer.
        threads: CPU threads.
        dtype: ``float32`` or ``bfloat16``.
    """

    def __init__(self, checkpoint: Path, picture: Rgb, tokens: int, threads: int, dtype: str) -> None:
        import torch
        import transformers
        from PIL import Image
        from transformers import Idefics3Processor

        from pixano_edge.export.smolvlm.checkpoint import MODELS, load

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self._torch = torch
        self._kind = getattr(torch, dtype)
        self._tokens = tokens
        loaded = load(checkpoint)
        kind: Any = MODELS[loaded.model.config.model_type]
        self._model: Any = kind.from_pretrained(checkpoint, dtype=self._kind, local_files_only=True).eval()
        # For images it is SmolVLM's processor, which asks for packages that only videos need.
        self._processor = Idefics3Processor(
            loaded.images, loaded.text, image_seq_len=loaded.constants.image_seq_len, chat_template=loaded.template
        )
        self._picture = Image.fromarray(picture)

    def first(self, question: str) -> Answered:
        """The answer, timed token by token."""
        return self._timed(question, True)[0]

    def text(self, question: str) -> Answered:
        """Without the picture."""
        return self._timed(question, False)[0]

    def answer(self, question: str) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Ids and the logits of each step."""
        found, logits = self._timed(question, True, logits=True)
        return list(found.tokens), logits

    def _timed(self, question: str, picture: bool, logits: bool = False) -> tuple[Answered, Any]:
        from transformers.generation.streamers import BaseStreamer

        times: list[float] = []

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                """Nothing is left."""

        started = time.perf_counter()
        parts = [{"type": "image"}] if picture else []
        said: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        text = self._processor.apply_chat_template(said, add_generation_prompt=True)
        inputs = dict(self._processor(text=text, images=[[self._picture]] if picture else None, return_tensors="pt"))
        inputs.pop("mm_token_type_ids", None)
        if picture:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._kind)
        with self._torch.inference_mode():
            made = self._model.generate(
                **inputs, max_new_tokens=self._tokens, min_new_tokens=self._tokens, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=logits, streamer=Clock(),
            )  # fmt: skip
        _, first, *rest = times  # the prompt comes first
        prompt = int(inputs["input_ids"].shape[1])
        ids = tuple(int(i) for i in made.sequences[0, -self._tokens :])
        last = rest[-1] if rest else first
        answered = Answered(first - started, last - first, self._tokens, prompt, ids)
        return answered, self._torch.cat(made.logits).float().numpy() if logits else None


GENAI_CHILD = """
import json, sys, time
import numpy as np
import onnxruntime_genai as genai
folder, threads = sys.argv[1], int(sys.argv[2])
config = genai.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = genai.Model(config)
print(json.dumps({"version": genai.__version__}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    ids, count = asked["ids"], asked["tokens"]
    started = time.perf_counter()
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + count, min_length=len(ids) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    made, first = [], 0.0
    while len(made) < count and not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
        first = first or time.perf_counter()
    ended = time.perf_counter()
    print(json.dumps({"first": first - started, "rest": ended - first, "made": made}), flush=True)
"""


class Child:
    """A program of another contender that answers each line of JSON with one; other lines that it prints are left out.

    Args:
        name: Who it is, for errors.
        command: Starts it.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question; raises as `reply`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            EdgeError: It ended; the message has the last line that it wrote to stderr.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._process.wait(60)
        self._messages.seek(0)
        last = (self._messages.read().strip().splitlines() or ["no message"])[-1]
        raise EdgeError(f"{self._name} ended without an answer: {last}", "Run the benchmark without it.")

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._messages.close()


class GenaiAnswers:
    """onnxruntime-genai with the language model alone: its builder takes decoders, not SmolVLM with its images.

    Args:
        python: Interpreter that has onnxruntime-genai; it runs in a process of its own.
        folder: Made by `build_genai`.
        tokens: Of each answer.
        threads: CPU threads.
    """

    def __init__(self, python: Path, folder: Path, tokens: int, threads: int) -> None:
        self._tokens = tokens
        self._child = Child("onnxruntime-genai", [str(python), "-c", GENAI_CHILD, str(folder), str(threads)])
        self.close = self._child.close
        self.version = str(self._child.reply()["version"])

    def text(self, ids: Sequence[int]) -> Answered:
        """The answer to these tokens."""
        found = self._child.ask({"ids": list(ids), "tokens": self._tokens})
        made = tuple(found["made"])
        return Answered(found["first"], found["rest"], len(made), len(ids), made)


def build_genai(python: Path, checkpoint: Path, folder: Path) -> Path:
    """The language model of a checkpoint as onnxruntime-genai's own builder makes it, fp32 for the CPU.

    Raises:
        EdgeError: The builder failed.
    """
    if (folder / "genai_config.json").is_file():
        return folder
    from transformers import LlamaForCausalLM

    from pixano_edge.export.smolvlm.checkpoint import load

    loaded = load(checkpoint)
    source = folder.with_name(f"{folder.name}.llama")
    text = loaded.model.model.text_model
    model = LlamaForCausalLM(text.config)
    model.model.load_state_dict(text.state_dict())
    model.lm_head.load_state_dict(loaded.model.lm_head.state_dict())
    model.save_pretrained(source)
    loaded.text.save_pretrained(source)
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    done = subprocess.run([*command, "-p", "fp32", "-e", "cpu"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EdgeError(f"onnxruntime-genai's builder failed: {last}", "Leave --genai-python out.")
    return folder
