"""Where a teacher's parts go when one GPU is too small: accelerate's device maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory

from shared.system.errors import TideError

DeviceMap = Literal["auto", "balanced", "sequential"]
"""`auto` and `balanced` spread layers evenly over the GPUs, `sequential` fills one after the other."""


def plan_devices(model: Any, kind: DeviceMap, dtype: torch.dtype) -> dict[str, Any]:
    """A device for every part of `model` (which may be on the meta device), layers whole.

    Parts that fit no GPU stay in host memory and visit the first GPU when they run. TideError where host memory
    is too small as well.
    """
    whole = list(model._no_split_modules or [])
    memory = get_max_memory()
    if kind != "sequential":
        memory = get_balanced_memory(model, memory, no_split_module_classes=whole, dtype=dtype)
    found = infer_auto_device_map(
        model, memory, no_split_module_classes=whole, dtype=dtype, offload_buffers=True
    )
    mapping: dict[str, Any] = dict(found)
    homeless = sorted(name for name, device in mapping.items() if device == "disk")
    if homeless:
        raise TideError(
            f"GPUs and host memory together are too small for the teacher: {len(homeless)} parts have no place, "
            f"from {homeless[0]} on",
            expected="room for every layer",
            fix="use engine.quantization=int4, a machine with more memory, or a smaller teacher",
        )
    return mapping


def device_of(mapping: dict[str, Any], name: str) -> torch.device:
    """The device of the parameter `name`: that of the longest prefix in the map."""
    while name not in mapping:
        if not name:
            raise KeyError("the device map has no place for a parameter")
        name = name.rpartition(".")[0]
    return torch.device(mapping[name])


def spread(model: Any, mapping: dict[str, Any], force_hooks: bool = False) -> Any:
    """Let activations travel between the devices of `mapping`, on which the weights already lie."""
    return dispatch_model(model, mapping, offload_buffers=True, force_hooks=force_hooks)
