"""Objects that TensorRT calls back: log, error recorder, output allocator.

TensorRT's bindings call methods of subclasses of their own classes, so the classes are made once the module is there
(it is an argument here, never imported). They run on whatever thread TensorRT is in, holding the GIL, and must not
raise: the bindings print exceptions and go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Shape

Allocate = Callable[[str, int, int], int]
"""(tensor, bytes, alignment) to the address of device memory, 0 if there is none."""


def make_logger(trt: Any, errors: list[str], warnings: list[str]) -> Any:
    """Errors come here only where no recorder is set (TensorRT asks the recorder first)."""
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                errors.append(message.strip())
            elif level == severity.WARNING and len(warnings) < 20:
                warnings.append(message.strip())

    return Log()


def make_recorder(trt: Any, errors: list[str]) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._codes: list[Any] = []

        def report_error(self, code: Any, description: str) -> bool:
            self._codes.append(code)
            errors.append(f"{code.name}: {description.strip()}")
            return False  # let TensorRT go on: it returns False or None itself

        def num_errors(self) -> int:
            return len(self._codes)

        def get_error_code(self, index: int) -> Any:
            return self._codes[index]

        def get_error_desc(self, index: int) -> str:
            return errors[index] if index < len(errors) else ""

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> bool:
            self._codes.clear()
            errors.clear()
            return True

    return Recorder()


def make_allocator(trt: Any, allocate: Allocate, notify: Callable[[str, Shape], None]) -> Any:
    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return allocate(tensor_name, size, alignment)

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return allocate(tensor_name, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            notify(tensor_name, tuple(int(size) for size in shape))

    return Allocator()
