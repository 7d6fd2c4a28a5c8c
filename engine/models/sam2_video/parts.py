"""Parts of buffers: one object's row of a batched tensor, so that tensors move from graph to graph row by row."""

from __future__ import annotations

import weakref

from ...runtime.base import Array, Binding, Buffer


def part_of(buffer: Buffer, *index: int) -> Buffer:
    """A contiguous part of a buffer, the first dimensions fixed; borrowed, keeps the whole alive."""
    size, offset = buffer.nbytes, 0
    for extent, at in zip(buffer.shape, index):
        size //= extent
        offset += at * size
    array: Array | None = None if buffer.array is None else buffer.array[index]
    shape = buffer.shape[len(index) :]
    return Buffer(buffer.device, shape, buffer.dtype, buffer.pointer + offset, array, owned=False, owner=buffer)


class Parts:
    """Parts of the tensors that bindings own, each made once. Not thread-safe."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Binding, dict[tuple[str, tuple[int, ...]], Buffer]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, binding: Binding, name: str, *index: int) -> Buffer:
        """A part of an input or output of a binding; not of a borrowed one, which may be another buffer next time."""
        known = self._known.setdefault(binding, {})
        found = known.get((name, index))
        if found is None:
            whole = binding.inputs[name] if name in binding.inputs else binding.outputs[name]
            found = known[name, index] = part_of(whole, *index)
        return found
