"""Which run of a session ONNX Runtime may capture in a CUDA graph, and under which number.

ONNX Runtime replays the graph stored under the run option ``gpu_graph_id`` without looking at the binding again
(core/session/inference_session.cc, core/providers/cuda/cuda_graph.cc): a number used with other addresses would read
and write the old ones. So a number stands for one set of shapes and addresses, and is never used for another one.
"""

from __future__ import annotations

from collections.abc import Hashable

EAGER = -1
"""Value of ``gpu_graph_id`` that neither captures nor replays."""

RECORDED = -2
"""Our own mark of a run that `Device.capture` records; ONNX Runtime is told `EAGER`."""

_REMEMBERED = 64
"""Sets of addresses that ran once and are remembered for a second run."""


class GraphNumbers:
    """Numbers of captured graphs by what they were captured with.

    The first run with a set of addresses is eager: buffers borrowed for one call would otherwise each leave a graph
    behind. The second one is captured (ONNX Runtime warms up within that call), later ones replay. When `limit`
    graphs exist, further sets stay eager: ONNX Runtime cannot be relied on to free a graph before its session
    (``release_captured_graph`` does nothing where the provider does not implement it).

    Args:
        limit: Most graphs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.refused = 0
        """Runs that stayed eager because of the limit."""
        self._numbers: dict[Hashable, int] = {}
        self._seen: dict[Hashable, None] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, state: Hashable) -> int:
        """The value of ``gpu_graph_id`` for a run with these shapes and addresses."""
        number = self._numbers.get(state)
        if number is not None:
            return number
        if state not in self._seen:
            self._seen[state] = None
            if len(self._seen) > _REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
            return EAGER
        if len(self._numbers) >= self.limit:
            self.refused += 1
            return EAGER
        del self._seen[state]
        self._numbers[state] = len(self._numbers) + 1
        return self._numbers[state]
