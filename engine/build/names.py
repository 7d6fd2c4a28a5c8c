"""The names that building uses of TensorRT's Python API, checked when the child has loaded it.

The same calls build with 10.3, 10.16, 11.x and TensorRT for RTX 1.7, as weakly typed flags and calibrators are never
used. Looked up where they are used, because not every release has them: ``NetworkDefinitionCreationFlag``
(``STRONGLY_TYPED``; later releases know no other networks), ``HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY``
(not in 10.3), ``ILayer.metadata``. The tests compare the table with the RTX 1.7 package; 10.x and 11.x are from
NVIDIA's API reference and were not checked against those wheels.
"""

from __future__ import annotations

from collections.abc import Mapping

BUILD_CALLS: Mapping[str, tuple[str, ...]] = {
    "Builder": (
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ),
    "BuilderFlag": ("TF32", "VERSION_COMPATIBLE"),
    "EngineInspector": ("get_engine_information",),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS",),
    "IActivationLayer": ("type",),
    "IBuilderConfig": (
        "add_optimization_profile",
        "clear_flag",
        "create_timing_cache",
        "get_timing_cache",
        "hardware_compatibility_level",
        "profiling_verbosity",
        "progress_monitor",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    ),
    "ICudaEngine": ("create_engine_inspector",),
    "IElementWiseLayer": ("op",),
    "ILayer": ("get_input", "get_output", "name", "num_inputs", "num_outputs", "type"),
    "INetworkDefinition": (
        "get_input",
        "get_layer",
        "get_output",
        "num_inputs",
        "num_layers",
        "num_outputs",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IPoolingLayer": ("type",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "IReduceLayer": ("op",),
    "ITensor": ("dtype", "is_shape_tensor", "name", "shape"),
    "ITimingCache": ("serialize",),
    "IUnaryLayer": ("op",),
    "LayerInformationFormat": ("JSON",),
    "MemoryPoolType": ("WORKSPACE",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ProfilingVerbosity": ("DETAILED",),
}

RTX_BUILD_CALLS: Mapping[str, tuple[str, ...]] = {
    "BuilderFlag": ("REQUIRE_USER_ALLOCATION",),
    "ComputeCapability": (),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
}
"""In addition, where engines are built for listed GPUs."""
