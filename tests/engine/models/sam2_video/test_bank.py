"""Which memories and pointers a frame attends to: upstream's rules, against transformers' own functions and by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.models.sam2_video.bank import Memory, ObjectBank, Selection, closest


def constants(max_cond_frames: int = -1) -> Sam2VideoConstants:
    return Sam2VideoConstants(
        memory_dim=4,
        num_memories=7,
        max_pointers=16,
        max_cond_frames=max_cond_frames,
        multimask_min_points=0,
        multimask_max_points=1,
        multimask_in_sam=True,
        multimask_for_tracking=True,
        mask_kernel=(0.0,) * 17,
    )


def filled(conditioning: list[int], tracked: list[int], max_cond_frames: int = -1) -> ObjectBank[str]:
    bank: ObjectBank[str] = ObjectBank(constants(max_cond_frames))
    for frame in conditioning:
        bank.store(Memory(frame, f"c{frame}"), True)
    for frame in tracked:
        bank.store(Memory(frame, f"t{frame}"), False)
    return bank


def names(selection: Selection[str]) -> tuple[list[tuple[str, int]], list[tuple[str, float]]]:
    return (
        [(m.slot, row) for m, row in zip(selection.memories, selection.rows)],
        [(m.slot, time) for m, time in zip(selection.pointers, selection.times)],
    )


def test_second_frame_sees_the_first() -> None:
    memories, pointers = names(filled([0], []).select(1, False, 100))
    assert memories == [("c0", 6)]
    assert pointers == [("c0", pytest.approx(1 / 15))]


def test_full_bank_in_upstreams_order() -> None:
    memories, pointers = names(filled([0], list(range(1, 40))).select(30, False, 100))
    assert memories == [("c0", 6), *[(f"t{30 - back}", back - 1) for back in range(6, 0, -1)]]
    assert [name for name, _ in pointers] == ["c0", *[f"t{30 - back}" for back in range(1, 16)]]
    assert [time for _, time in pointers] == pytest.approx([2.0, *[back / 15 for back in range(1, 16)]])


def test_backwards_looks_at_later_frames() -> None:
    memories, pointers = names(filled([20], list(range(10, 20))).select(9, True, 40))
    assert memories[:2] == [("c20", 6), ("t15", 5)]
    assert memories[-1] == ("t10", 0)
    assert [name for name, _ in pointers] == ["c20", *[f"t{f}" for f in range(10, 20)]]


def test_a_prompt_ahead_gives_its_memory_and_no_pointer() -> None:
    memories, pointers = names(filled([10], []).select(3, False, 40))
    assert memories == [("c10", 6)]
    assert pointers == []


def test_a_short_clip_allows_fewer_pointers_and_another_divisor() -> None:
    _, pointers = names(filled([0], [1, 2, 3]).select(4, False, 5))
    assert pointers == [("c0", 1.0), ("t3", 0.25), ("t2", 0.5), ("t1", 0.75)]
    _, streamed = names(filled([0], [1, 2, 3]).select(4, False, None))
    assert streamed[0][1] == pytest.approx(4 / 15)


def test_cap_takes_the_closest_and_the_rest_may_return_as_recent_frames() -> None:
    bank = filled([0, 10, 18, 30], [19], max_cond_frames=2)
    memories, _ = names(bank.select(20, False, 100))
    assert memories == [("c18", 6), ("c30", 6), ("t19", 0)]
    capped = filled([10, 17, 18, 19], [], max_cond_frames=2)
    memories, _ = names(capped.select(20, False, 100))
    assert memories == [("c19", 6), ("c18", 6), ("c17", 2)]


def test_storing_replaces_and_says_what_went() -> None:
    bank = filled([0], [1])
    assert [m.slot for m in bank.store(Memory(1, "new"), True)] == ["t1"]
    assert not bank.tracked
    assert list(bank.conditioning) == [0, 1]
    with pytest.raises(KeyError):
        filled([], [3]).select(4, False, 10)


def test_out_of_reach_keeps_what_a_later_pass_needs() -> None:
    bank = filled([50], list(range(100)))
    far = bank.out_of_reach(99)
    for memory in far:
        bank.drop(memory)
    gone = {m.frame for m in far}
    assert gone == {f for f in range(100) if abs(f - 99) > 15 and abs(f - 50) > 15}
    assert set(bank.tracked) == set(range(100)) - gone


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cap", [-1, 1, 3])
@pytest.mark.parametrize("frame", [0, 7, 21, 39])
def test_equals_transformers(frame: int, cap: int, reverse: bool) -> None:
    pytest.importorskip("transformers", reason="the reference")
    from transformers import Sam2VideoModel

    conditioning, tracked, frames = [5, 21, 33], [f for f in range(40) if f % 3], 40
    bank = filled([f for f in conditioning if f != frame], [f for f in tracked if f != frame], cap)
    outputs: dict[str, dict[int, Any]] = {
        "cond_frame_outputs": dict(bank.conditioning),
        "non_cond_frame_outputs": dict(bank.tracked),
    }

    class Session:
        def __init__(self) -> None:
            self.output_dict_per_obj = {0: outputs}

    class Model:
        num_maskmem = 7
        training = False
        _select_closest_cond_frames = Sam2VideoModel._select_closest_cond_frames

        class config:
            max_cond_frame_num = cap
            max_object_pointers_in_encoder = 16

    class Pointer(dict[str, Any]):
        def __init__(self, memory: Memory[str]) -> None:
            super().__init__(object_pointer=self)
            self.memory = memory

        def to(self, device: str) -> Memory[str]:
            return self.memory

    gathered = Sam2VideoModel._gather_memory_frame_outputs(Model(), Session(), 0, frame, reverse)
    want = [(m.slot, (offset - 1) % 7) for offset, m in gathered if m is not None]
    wrapped = {kind: {f: Pointer(m) for f, m in held.items()} for kind, held in outputs.items()}
    outputs.update(wrapped)
    offsets, pointers, allowed = Sam2VideoModel._get_object_pointers(
        Model(), Session(), 0, frame, frames, "cpu", reverse
    )
    memories, got = names(bank.select(frame, reverse, frames))
    assert memories == want
    assert got == [(m.slot, pytest.approx(o / (allowed - 1))) for m, o in zip(pointers, offsets)]


def test_closest_as_upstream() -> None:
    chosen, rest = closest(10, {1: "a", 8: "b", 12: "c", 30: "d"}, 3)
    assert list(chosen) == [8, 12, 1]
    assert list(rest) == [30]
    assert closest(10, {1: "a"}, -1) == ({1: "a"}, {})
