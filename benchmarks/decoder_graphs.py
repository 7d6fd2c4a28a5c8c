"""What a decoder's graphs cost: memory of one session against two, and the speed of a step, by precision.

``python -m pixano_edge.benchmarks.decoder_graphs`` makes a seeded Llama of SmolLM2-135M's shape (the language model of
SmolVLM-256M), writes its graphs to a temporary folder and prints one line per measurement. Memory is anonymous
resident memory of a child process; speed is the median step against the bytes of weights that a step reads. Needs the
extras ``export`` and ``cpu``, and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.decoder import DecoderConstants

SHAPE = DecoderConstants(
    layers=30, heads=9, kv_heads=3, head_dim=64, hidden_size=576, vocab_size=49280, max_length=8192, rope="default",
    eos_ids=(2,),
)  # fmt: skip
SLOTS, FILLED, STEPS = 1024, 200, 40
VARIANTS = {
    "fp32": ("fp32", None), "fp16": ("fp16", None), "int4, fp32 head": ("int4", (4, 0)),
    "int4, int8 head": ("int4", (4, 8)), "int4, int4 head": ("int4", (4, 4)),
}  # fmt: skip


def make(folder: Path) -> dict[str, int]:
    """Writes the graphs; returns the bytes of weights that one step reads, by variant."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pixano_edge.export.decoder.graph import Bits, build_decoder
    from pixano_edge.export.decoder.store import WeightStore
    from pixano_edge.export.decoder.weights import DecoderWeights

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49280, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    weights = DecoderWeights(model.model, model.lm_head, SHAPE)
    sizes = {}
    for name, (precision, bits) in VARIANTS.items():
        file = folder / f"{name.replace(', ', '.').replace(' ', '-')}.onnx"
        with WeightStore(file.with_suffix(".bin")) as store:
            graph = build_decoder(weights, store, precision, bits=Bits(*bits) if bits else None)
        store.seal(graph)
        onnx.save(graph, file)
        sizes[str(file)] = file.with_suffix(".bin").stat().st_size
    return sizes


def child(file: Path, sessions: int, threads: int) -> dict[str, float]:
    """Opens the graph, prefills and steps; in a process of its own."""
    import onnxruntime as ort

    from pixano_edge.engine.runtime.memory import resident_bytes

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    before = resident_bytes() or 0
    opened = [ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]) for _ in range(sessions)]
    memory = (resident_bytes() or 0) - before
    types = {i.name: "float16" if "float16" in i.type else "float32" for i in opened[0].get_inputs()}
    caches = {
        past: (present, ort.OrtValue.ortvalue_from_numpy(np.zeros(SHAPE.cache_shape(SLOTS), types[past])))
        for past, present in SHAPE.cache_names
    }
    random = np.random.default_rng(0)

    def run(session: ort.InferenceSession, tokens: int, steps: int, filled: int) -> float:
        embeds = random.standard_normal((1, tokens, SHAPE.hidden_size)).astype(np.float32)
        last = np.array([filled + tokens - 1], np.int32)
        logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, SHAPE.vocab_size), np.float32))
        binding = session.io_binding()
        binding.bind_ortvalue_input(contract.INPUTS_EMBEDS, ort.OrtValue.ortvalue_from_numpy(embeds))
        binding.bind_ortvalue_input(contract.SEQLENS_K, ort.OrtValue.ortvalue_from_numpy(last))
        binding.bind_ortvalue_output(contract.LOGITS, logits)
        for past, (present, value) in caches.items():
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            times.append(time.perf_counter() - start)
            last += tokens == 1
        return float(np.median(times))

    prefill = run(opened[0], FILLED, 3, 0)
    step = run(opened[-1], 1, STEPS, FILLED)
    return {"memory": memory, "prefill": prefill, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "SESSIONS"))
    given = parser.parse_args()
    if given.child:
        sys.stdout.write(json.dumps(child(Path(given.child[0]), int(given.child[1]), given.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for file, size in make(Path(folder)).items():
            for sessions in (1, 2):
                command = [sys.executable, "-m", "pixano_edge.benchmarks.decoder_graphs", "--threads"]
                done = subprocess.run(
                    [*command, str(given.threads), "--child", file, str(sessions)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                got = json.loads(done.stdout)
                sys.stdout.write(
                    f"{Path(file).stem}: weights {size / 1e6:.0f} MB, {sessions} session(s)"
                    f" {got['memory'] / 1e6:.0f} MB,"
                    f" prefill of {FILLED} {1e3 * got['prefill']:.0f} ms, step {1e3 * got['step']:.1f} ms"
                    f" = {size / got['step'] / 1e9:.1f} GB/s\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
