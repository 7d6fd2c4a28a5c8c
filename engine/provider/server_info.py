"""`ServerInfo`, from the table, the memory books and one look at the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..libraries import engine_versions
from ..runtime.memory import readable
from .budget import read_devices
from .hardware import Hardware
from .models import ModelTable
from .types import ModelInfo, ServerInfo


def server_info(
    infos: list[ModelInfo],
    faults: Mapping[str, str],
    table: ModelTable,
    hardware: Hardware,
    ready: bool,
    jobs: list[dict[str, Any]],
) -> ServerInfo:
    """State of the machine and the models now; see `ServerInfo` for the layout of `gpu_info`."""
    slots = table.slots()
    loaded = [(slot.name, model) for slot in slots if (model := slot.model) is not None]
    accounts = table.budget.snapshot(read_devices(hardware))
    on_gpu: dict[str, list[str]] = {}
    warnings = [*faults.values(), *hardware.notes]
    for name, model in loaded:
        warnings.extend(f"Model '{name}': {warning}" for warning in model.warnings)
        if model.device.startswith("cuda"):
            on_gpu.setdefault(model.device.partition(":")[2] or "0", []).append(name)
        elif hardware.gpus:
            warnings.append(f"Model '{name}' runs on the CPU although {len(hardware.gpus)} CUDA device(s) are there.")
    warnings.extend(gone.describe() for gone in table.unloaded())
    warnings.extend(_over(account) for account in accounts if account["over"] > 0 and account["models"])
    versions = engine_versions()
    return ServerInfo(
        version=versions["pixano-edge"],
        models_loaded=len(loaded),
        num_gpus=len(hardware.gpus),
        gpu_info={
            "devices": hardware.gpu_dicts(),
            "reason": hardware.reason,
            "model_to_device": {name: model.device for name, model in loaded},
            "warm_up": {name: model.warmed_in for name, model in loaded},
            "placement": {slot.name: slot.placement for slot in slots if slot.placement},
            "memory_total": hardware.memory_total,
            "memory_available": hardware.memory_available,
            "memory": accounts,
            "unloaded": [
                {"model": u.name, "device": u.device, "bytes": u.nbytes, "idle_s": u.idle_s, "reason": u.reason}
                for u in table.unloaded()
            ],
        },
        models=[info.name for info in infos],
        models_to_task={info.name: info.task for info in infos},
        ready=ready,
        app_name="Pixano Edge",
        app_version=versions["pixano-edge"],
        app_description="Torch-free inference for Pixano on this machine",
        num_cpus=hardware.num_cpus,
        num_nodes=1,
        gpus_used=sorted(int(index) for index in on_gpu),
        gpu_to_model={index: ", ".join(names) for index, names in sorted(on_gpu.items())},
        versions=versions,
        warnings=warnings,
        jobs=jobs,
    )


def _over(account: Mapping[str, Any]) -> str:
    return (
        f"Models on {account['device']} take {readable(account['over'])} more than its budget of "
        f"{readable(account['budget'])}: requests made them grow and none was idle. Unload one, or raise the limit."
    )
