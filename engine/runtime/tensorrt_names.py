"""The names that we use of TensorRT's Python API, and how they differ between releases.

| name                                            | 10.3 | 10.16 | 11.x | RTX 1.7 |
|-------------------------------------------------|------|-------|------|---------|
| Runtime, deserialize_cuda_engine                | yes  | yes   | yes  | yes     |
| Runtime.engine_host_code_allowed                | yes  | yes   | yes  | yes     |
| set_tensor_address, execute_async_v3            | yes  | yes   | yes  | yes     |
| set_optimization_profile_async, set_input_shape | yes  | yes   | yes  | yes     |
| IOutputAllocator.reallocate_output_async        | yes  | yes   | yes  | yes     |
| ExecutionContextAllocationStrategy.USER_MANAGED | yes  | yes   | yes  | yes     |
| get_device_memory_size_for_profile_v2           | yes  | yes   | yes  | yes     |
| get_device_memory_size_for_profile              | old  | old   | gone | gone    |
| device_memory_size                              | old  | old   | gone | gone    |
| set_device_memory(memory, size)                 | yes  | yes   | yes  | yes     |
| create_execution_context_without_device_memory  | old  | old   | gone | gone    |
| get_engine_stat, EngineStat (weights)           | no   | yes   | yes  | yes     |
| create_runtime_config, IRuntimeConfig           | no   | yes   | yes  | yes     |
| IRuntimeCache, is_stream_capturable             | no   | no    | no   | yes     |
| BuilderFlag FP16, BF16, INT8 (weak typing)      | old  | old   | gone | gone    |

"old" is deprecated and not used here. The column RTX 1.7 is checked against the real package by a test; 10.3, 10.16
and 11.x are from NVIDIA's API reference, its guide "Migrating Python Code from TensorRT 10.x to 11.x" and the 10.x
source of the bindings, and were not checked against those wheels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SCRATCH_SIZE = ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile")
SET_SCRATCH = ("set_device_memory_v2", "set_device_memory")

CALLS: Mapping[str, tuple[str | tuple[str, ...], ...]] = {
    "DataType": ("FLOAT", "HALF", "INT8", "INT32", "INT64", "UINT8", "BOOL"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "ICudaEngine": (
        "create_execution_context",
        "get_tensor_dtype",
        "get_tensor_format",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "is_shape_inference_io",
        "num_io_tensors",
        "num_optimization_profiles",
        SCRATCH_SIZE,
    ),
    "IErrorRecorder": (),
    "IExecutionContext": (
        "error_recorder",
        "execute_async_v3",
        "get_tensor_shape",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_output_allocator",
        "set_tensor_address",
        SET_SCRATCH,
    ),
    "ILogger": ("Severity",),
    "IOutputAllocator": (),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed", "error_recorder"),
    "TensorFormat": ("LINEAR",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TensorLocation": ("DEVICE",),
}
"""What is used of each class in every release; of names in brackets the first that exists. Dynamic attributes of the
callback classes (`IErrorRecorder`, `IOutputAllocator`) are ours to define and not listed."""

RTX_CALLS: Mapping[str, tuple[str, ...]] = {
    "DynamicShapesKernelSpecializationStrategy": ("LAZY", "EAGER", "NONE"),
    "ICudaEngine": ("create_runtime_config",),
    "IExecutionContext": ("is_stream_capturable",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        "create_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    ),
}
"""What is used in addition where kernels are compiled on the user's machine (TensorRT for RTX)."""


def missing_calls(module: Any, calls: Mapping[str, Iterable[str | tuple[str, ...]]]) -> list[str]:
    """The ``Class.name`` of `calls` that `module` does not have; of alternatives all must be missing."""
    missing = []
    for owner, names in calls.items():
        found = getattr(module, owner, None)
        if found is None:
            missing.append(owner)
            continue
        for name in names:
            options = (name,) if isinstance(name, str) else name
            if not any(hasattr(found, option) for option in options):
                missing.append(f"{owner}.{'/'.join(options)}")
    return missing


def first_of(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of `names` that `owner` has; `TensorRt` made sure that there is one."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))
