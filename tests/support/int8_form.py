"""The decoder of a language model in int8, in ONNX Runtime's form and in TensorRT's, observed while it answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.int4_variant import decoder_constants
from pixano_edge.calibration.spool import Spool
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.tasks.text import TextTask
from pixano_edge.calibration.tensorrt_form import Comparison, compare, quantise_form, read_form
from pixano_edge.calibration.variant import Source, VariantFiles, read_source
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts.decoder import DECODER


@dataclass
class Case:
    """Both forms with all blocks in int8, and what they were observed on.

    Attributes:
        bundle: Where the fp32 graphs are.
        source: ONNX Runtime's fp32 graph, observed.
        feeds: Recorded inputs of it.
        folder: For files.
        theirs: ONNX Runtime's form.
        ours: TensorRT's.
    """

    bundle: Bundle
    source: Source
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]]
    folder: Path
    theirs: onnx.ModelProto
    ours: onnx.ModelProto

    def compare(self, ours: onnx.ModelProto) -> Comparison:
        """Another graph in the place of `ours`."""
        files = {"ours": ours, "theirs": self.theirs}
        for name, model in files.items():
            (self.folder / name).write_bytes(model.SerializeToString())
        constants = decoder_constants(self.bundle)
        found = compare(*(self.folder / name for name in files), self.source.path, self.feeds, constants, 1)
        assert not list(self.folder.glob(".*"))  # what it wrote for a while is gone
        return found


def int8_forms(bundle: Bundle, folder: Path, question: str = "What color is the star?", tokens: int = 3) -> Case:
    """Asks about the bundle's golden pictures and quantises the whole decoder twice.

    Args:
        bundle: Of a language model, with fp32.
        folder: For recorded inputs.
        question: About each picture.
        tokens: Of an answer, at most.
    """
    task = TextTask(bundle, TaskOptions(threads=1, questions=(question,), max_new_tokens=tokens))
    samples = task.refer(list(open_data(bundle.root / "golden", allow_few=True).samples))
    spool = Spool(folder / "spool", "key", limit=6, max_bytes=1 << 28)
    task.collect(samples, spool)
    feeds = spool.feeds(DECODER)
    source = read_source(DECODER, bundle.graph_path(DECODER, "fp32"), feeds, folder / "seen.npz", 1)
    theirs, _ = VariantFiles({DECODER: source}, folder, "auto", "search").quantise(DECODER, source.blocks)
    form = read_form(bundle, source)
    assert form is not None
    assert not form.absent
    ours, _ = quantise_form(form, source, source.blocks, "auto", "search")
    return Case(bundle, source, feeds, folder, theirs, ours)
