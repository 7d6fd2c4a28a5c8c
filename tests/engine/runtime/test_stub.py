"""The recording device: order of calls, and that forgetting to wait shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ContractError, DeviceError
from pixano_edge.engine.runtime import Array, CpuDevice, StubDevice, StubSession
from tests.engine.runtime.graphs import spec

ONES = np.ones((2, 4), np.float32)


def double(inputs: dict[str, Array]) -> Mapping[str, Array]:
    return {"y": inputs["x"] * 2}


def test_order_of_calls() -> None:
    device = StubDevice()
    session = StubSession(spec(), device, double)
    binding = session.prepare({"P": 2})
    assert device.calls == [("empty", (2, 4), "float32"), ("empty", (2, 4), "float32")]
    device.calls.clear()
    for _ in range(2):
        binding.write("x", ONES)
        binding.run()
        assert (binding.read("y") == 2).all()
    x = binding.inputs["x"].pointer
    assert device.calls == [("copy", x, 0), ("launch", "twice"), ("synchronize",)] * 2
    assert session.prepare({"P": 2}) is binding
    assert "empty" not in device.ops, "nothing is allocated after the first prepare"


def test_two_chained_sessions_never_touch_the_host_between() -> None:
    device = StubDevice(deferred=True)
    first = StubSession(spec("first"), device, double).prepare({"P": 2})
    second_session = StubSession(spec("second", source="a", target="b"), device, lambda i: {"b": i["a"] + 1})
    second = second_session.prepare({"P": 2})
    second.bind("a", first.outputs["y"])
    device.calls.clear()
    first.write("x", ONES)
    first.run()
    second.run()
    assert device.ops == ["copy", "launch", "launch"]
    assert device.pending == 3
    assert (second.read("b") == 3).all()
    assert device.ops[3:] == ["synchronize"]


def test_deferred_device_shows_a_missing_wait() -> None:
    device = StubDevice(deferred=True)
    binding = StubSession(spec(), device, double).prepare({"P": 2})
    binding.outputs["y"].host()[:] = -1
    source = ONES.copy()
    binding.write("x", source)
    source[:] = 7  # the caller may reuse its array at once
    binding.run()
    assert (binding.outputs["y"].host() == -1).all(), "not computed yet: reading without waiting gives old data"
    assert (binding.read("y") == 2).all()


def test_every_call_is_recorded() -> None:
    device = StubDevice("cuda:7")
    a = device.host_empty((2,), "int32")
    b = device.wrap(np.zeros(2, np.int32))
    device.copy(b, a)
    event = device.record()
    device.wait(event)
    device.synchronize()
    device.close()
    assert device.name == "cuda:7"
    assert device.stream != 0
    assert device.ops == ["host_empty", "wrap", "copy", "record", "wait", "synchronize", "close"]
    assert device.calls[2:5] == [("copy", b.pointer, a.pointer), ("record", 1), ("wait", 1)]
    assert device.info().kind == "stub"


def test_refused_calls_are_not_recorded() -> None:
    device = StubDevice()
    with pytest.raises(ContractError):
        device.wrap([1])
    with pytest.raises(ContractError):
        device.copy(device.empty((1,), "int32"), device.empty((2,), "int32"))
    assert device.ops == ["empty", "empty"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda i: {}, "returned"),
        (lambda i: {"y": i["x"], "z": i["x"]}, "'z'"),
        (lambda i: {"y": i["x"][:1]}, "bound is"),
        (lambda i: {"y": i["x"].astype(np.float64)}, "float64"),
    ],
)
def test_stub_graph_must_keep_the_contract(function: object, words: str) -> None:
    binding = StubSession(spec(), StubDevice(), function).prepare({"P": 2})  # type: ignore[arg-type]
    binding.write("x", ONES)
    with pytest.raises(ContractError, match=words):
        binding.run()


def test_closed_session() -> None:
    session = StubSession(spec(), StubDevice(), double)
    binding = session.prepare({"P": 1})
    session.close()
    with pytest.raises(DeviceError, match="closed"):
        binding.run()


def test_session_bookkeeping() -> None:
    graph = GraphSpec(
        "g", (TensorSpec("x", "float32", ("P", "N")),), (TensorSpec("y", "float32", ("P",)),), {"P": (1, 1, 64)}
    )
    session = StubSession(graph, StubDevice(), lambda i: {"y": i["x"].sum(1)})
    session.max_bindings = 2
    with pytest.raises(ContractError, match=r"needs sizes for \['N'\]"):
        session.prepare({"P": 1})
    with pytest.raises(ContractError, match="P from 1 to 64, got 65"):
        session.prepare({"P": 65, "N": 1})
    with pytest.raises(ContractError, match="got 0"):
        session.prepare({"P": 0, "N": 1})
    one, two = session.prepare({"P": 1, "N": 1}), session.prepare({"P": 2, "N": 1})
    assert session.prepare({"P": 1, "N": 1}) is one
    session.prepare({"P": 3, "N": 1})  # pushes out P=2, used longest ago
    assert session.prepare({"P": 1, "N": 1}) is one
    assert session.prepare({"P": 2, "N": 1}) is not two
    two.write("x", np.ones((2, 1), np.float32))
    two.run()  # who still holds an old binding can use it
    assert two.read("y").tolist() == [1, 1]
    assert session.runs == 1
    with pytest.raises(ContractError, match="lives on cpu"):
        two.bind("x", CpuDevice().empty((2, 1), "float32"))


def test_kept_bindings_are_bounded_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StubSession(spec(), StubDevice(), double)
    assert session.prepare({"P": 2}).nbytes == 2 * 2 * 4 * 4  # input and output of 2 x 4 floats
    monkeypatch.setattr(StubSession, "max_binding_bytes", 200)
    two, three = session.prepare({"P": 2}), session.prepare({"P": 3})
    assert session.prepare({"P": 2}) is two  # 64 + 96 bytes fit
    session.prepare({"P": 4})  # 128 more do not: P=3, used longest ago, goes, and then P=2
    assert session.prepare({"P": 3}) is not three
    huge = session.prepare({"P": 7})
    assert session.prepare({"P": 7}) is huge, "the newest is kept whatever its size"
    assert sum(b.nbytes for b in session._bindings.values()) == huge.nbytes


def test_room_is_made_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StubSession, "max_binding_bytes", 200)
    session = StubSession(spec(), StubDevice(), double)
    session.prepare({"P": 5})
    held: list[int] = []
    real = StubDevice.empty

    def empty(self: StubDevice, *args: object) -> object:
        held.append(len(session._bindings))
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StubDevice, "empty", empty)
    session.prepare({"P": 4})
    assert held == [0, 0]


def test_borrowed_tensors_get_no_memory_and_must_be_bound() -> None:
    device = StubDevice()
    session = StubSession(spec(), device, double)
    binding = session.prepare({"P": 2}, borrowed=("x",))
    assert device.ops == ["empty"]
    assert binding.nbytes == 32
    with pytest.raises(ContractError, match=r"no memory: \['x'\]"):
        binding.run()
    with pytest.raises(ContractError, match="no bound input 'x'"):
        binding.write("x", ONES)
    binding.bind("x", device.wrap(ONES))
    binding.run()
    assert (binding.read("y") == 2).all()
    binding.release("x")
    with pytest.raises(ContractError, match="no memory"):
        binding.run()
    # Asked for without borrowing, the same binding gets memory of its own.
    assert session.prepare({"P": 2}) is binding
    binding.write("x", ONES * 3)
    binding.run()
    assert (binding.read("y") == 6).all()


def test_release_gives_back_the_own_buffer() -> None:
    device = StubDevice()
    binding = StubSession(spec(), device, double).prepare({"P": 2})
    own = dict(binding.inputs), dict(binding.outputs)
    binding.bind("x", device.wrap(ONES))
    binding.bind("y", device.wrap(np.zeros((2, 4), np.float32)))
    binding.release("x", "y")
    assert (binding.inputs, binding.outputs) == own
    binding.release("x")  # nothing borrowed: nothing happens
    assert device.ops.count("empty") == 2


def test_a_released_output_cannot_be_read() -> None:
    device = StubDevice()
    binding = StubSession(spec(), device, double).prepare({"P": 2}, borrowed=("y",))
    with pytest.raises(ContractError, match="no bound output 'y'"):
        binding.read("y")
