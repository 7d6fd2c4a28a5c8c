"""Features that come back: Pixano's page sends the image embedding of an earlier answer along with every click, 22 MB
of base64 for a SAM 2 at 1024 pixels. A server that knows its own answer again need not decode it.

The text that was sent is kept, within a budget, and compared as a whole, which is cheaper than decoding or hashing it.
What falls out of the budget leaves
its SHA-256 behind. Anything else than exactly what was sent is the client's own, and is decoded and used as such.

With handles, the answer holds a few numbers that stand for the features instead (`seen.handle_of`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.sam2.cache import EmbeddingKey
from ..provider.seen import handle_of
from ..provider.types import NDArrayData
from .arrays import STEP, WireArray, encode, wire_array

if TYPE_CHECKING:
    from .schemas import WireNDArray

MAX_TEXT_BYTES = 128 << 20
"""Base64 that is kept: of the last 5 images of a SAM 2 at 1024 pixels."""
MOST = 4096
"""Answers that are known by their digest."""

_MAGIC = (20_512.0, 17_736.0)
"""First two numbers of a handle ("PH", "EH"); features are a few units large."""
HANDLE_SHAPE = (1, 1, 10)
_PROBE = 96

Texts = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class WireText(WireArray):
    """An array whose base64 is there already; `array` has no elements."""

    shape: tuple[int, ...] = ()
    text: str = ""

    def json(self) -> Iterator[bytes]:
        shape = ",".join(map(str, self.shape))
        yield f'{{"shape":[{shape}],"dtype":"float32","data":"'.encode()
        for start in range(0, len(self.text), STEP):
            yield self.text[start : start + STEP].encode("ascii")
        yield b'"}'


class _Sent:
    """One answer: image embedding and finer maps, in this order."""

    def __init__(self, key: EmbeddingKey, shapes: Sequence[tuple[int, ...]], texts: Texts) -> None:
        self.key = key
        self.shapes = tuple(shapes)
        self.probe = _probe(texts)
        self.texts: Texts | None = texts
        self.digest: bytes | None = None
        self.nbytes = sum(map(len, texts))

    def is_(self, texts: Texts) -> bool:
        """Whether these are exactly the texts that were sent."""
        mine = self.texts
        if mine is not None:
            return mine == texts
        return self.digest == _digest(texts)

    def shrink(self) -> None:
        """Keeps the digest alone."""
        if self.texts is not None:
            self.digest = _digest(self.texts)
            self.texts = None


class Echoes:
    """What this server sent. Thread-safe; not for the event loop, since texts are compared and encoded here.

    Args:
        handles: Answer with handles instead of features. They are understood in either case.
        max_text_bytes: Texts that are kept; 0 keeps digests alone.
        most: Answers that are known.

    Attributes:
        hits: Echoes that were recognised.
        misses: Features that were not.
    """

    def __init__(self, handles: bool = False, max_text_bytes: int = MAX_TEXT_BYTES, most: int = MOST) -> None:
        self.handles = handles
        self.hits = self.misses = 0
        self._max = max_text_bytes
        self._most = most
        self._lock = threading.Lock()
        self._sent: OrderedDict[EmbeddingKey, _Sent] = OrderedDict()
        self._probes: dict[Texts, _Sent] = {}

    # --- requests --------------------------------------------------------------------------------------------------

    def recognise(self, embedding: WireNDArray | None, finer: Sequence[WireNDArray] | None) -> EmbeddingKey | None:
        """The key of features that this server sent; None for any others."""
        if embedding is None or not finer:
            return None
        texts = (embedding.data, *(one.data for one in finer))
        shapes = tuple(tuple(one.shape) for one in (embedding, *finer))
        with self._lock:
            sent = self._probes.get(_probe(texts))
        if sent is not None and sent.shapes == shapes and sent.is_(texts):
            self.hits += 1
            with self._lock:
                if sent.key in self._sent:
                    self._sent.move_to_end(sent.key)
            return sent.key
        self.misses += 1
        return None

    # --- answers ---------------------------------------------------------------------------------------------------

    def answering(self) -> Answering:
        """For one request: what its answer holds of the features."""
        return Answering(self)

    def find(self, key: EmbeddingKey) -> tuple[tuple[tuple[int, ...], ...], Texts] | None:
        """Shapes and texts that were sent for a key, where they are kept."""
        with self._lock:
            sent = self._sent.get(key)
            return None if sent is None or sent.texts is None else (sent.shapes, sent.texts)

    def note(self, key: EmbeddingKey, arrays: Sequence[WireArray]) -> tuple[tuple[tuple[int, ...], ...], Texts]:
        """Writes features as text and remembers it; shapes and texts."""
        sent = _Sent(key, [one.array.shape for one in arrays], tuple(_text(one) for one in arrays))
        texts = sent.texts
        assert texts is not None
        self._note(sent)
        return sent.shapes, texts

    def _note(self, sent: _Sent) -> None:
        with self._lock:
            held = self._sent.pop(sent.key, None)
            if held is not None and self._probes.get(held.probe) is held:
                del self._probes[held.probe]
            self._sent[sent.key] = sent
            self._probes[sent.probe] = sent
            total, full = 0, []
            for one in reversed(self._sent.values()):
                if one.texts is not None:
                    total += one.nbytes
                    if total > self._max:
                        full.append(one)
            while len(self._sent) > self._most:
                gone = self._sent.popitem(last=False)[1]
                if self._probes.get(gone.probe) is gone:
                    del self._probes[gone.probe]
        for one in full:
            one.shrink()


class Answering:
    """One answer on its way: the provider asks `wanted`, the route `arrays`."""

    def __init__(self, echoes: Echoes) -> None:
        self._echoes = echoes
        self._found: tuple[tuple[tuple[int, ...], ...], Texts] | None = None

    def wanted(self, key: EmbeddingKey) -> bool:
        """Whether the provider has to hand out the features of a key; called on the model's thread."""
        # Held from here on: the table may drop them before the answer is written.
        self._found = self._echoes.find(key)
        return self._found is None and not self._echoes.handles

    def arrays(self, output: Any, asked: bool) -> tuple[WireArray | None, list[WireArray | None] | None]:
        """Image embedding and finer maps of an answer, for the wire. On a thread: it encodes megabytes.

        Args:
            output: `EdgeMaskGenerationOutput`.
            asked: Whether the request asked for them.
        """
        if not asked:
            return None, None
        key = output.embedding_key
        if key is not None and self._echoes.handles:
            handle = WireArray(write_handle(handle_of(key)))
            return handle, [handle]
        if self._found is None:
            arrays = [wire_array(one) for one in (output.image_embedding, *output.high_resolution_features)]
            given = [one for one in arrays if one is not None]
            if key is None or len(given) < len(arrays):
                return arrays[0], list(arrays[1:])
            self._found = self._echoes.note(key, given)
        nothing = np.empty(0, np.float32)
        wired: list[WireArray | None] = [WireText(nothing, s, t) for s, t in zip(*self._found, strict=True)]
        return wired[0], wired[1:]


def write_handle(token: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """16 bytes as whole numbers that float32, JSON and Python's floats all hold exactly."""
    numbers = np.frombuffer(token, "<u2").astype(np.float32)
    return np.concatenate([np.array(_MAGIC, np.float32), numbers]).reshape(HANDLE_SHAPE)


def read_handle(value: NDArrayData | None) -> bytes | None:
    """The bytes of a handle; None for any other array."""
    if value is None or list(value.shape) != list(HANDLE_SHAPE):
        return None
    numbers = np.asarray(value.values, np.float32)
    whole = numbers[2:]
    if len(numbers) != HANDLE_SHAPE[-1] or tuple(numbers[:2]) != _MAGIC:
        return None
    if not np.array_equal(whole, np.clip(np.rint(whole), 0, 65535)):
        return None
    return whole.astype("<u2").tobytes()


def is_handle(embedding: WireNDArray | None) -> bool:
    """Whether an array of a request has a handle's shape."""
    return embedding is not None and tuple(embedding.shape) == HANDLE_SHAPE


def _text(value: WireArray) -> str:
    content = value.array.reshape(-1).view(np.uint8).data
    return b"".join(encode(content[i : i + STEP]) for i in range(0, len(content), STEP)).decode("ascii")


def _probe(texts: Texts) -> Texts:
    """A few characters of each text, to find the one answer that is worth comparing."""
    parts: list[str] = []
    for text in texts:
        middle = len(text) // 2
        parts += (str(len(text)), text[middle : middle + _PROBE], text[len(text) // 3 :][:_PROBE], text[-_PROBE:])
    return tuple(parts)


def _digest(texts: Texts) -> bytes:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode())
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()
