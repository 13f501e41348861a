"""Can a run write where it is told to, and run where it is told to? Tried before anything is computed."""

from __future__ import annotations

import os

import torch

from shared.cache.stores import Store
from shared.settings.config import CacheConfig, EngineConfig
from shared.system.errors import TideError
from shared.system.files import refuse_unwritable
from shared.system.hardware import choose_device


def check_places(config: CacheConfig) -> None:
    """TideError for the first of device, GPUs, folders and store that is not there."""
    check_devices(config.engine)
    refuse_unwritable(config.out)
    if config.metrics_file is not None:
        if not config.metrics_file.parent.is_dir():
            raise TideError(
                f"metrics_file is {config.metrics_file}, and there is no folder {config.metrics_file.parent}",
                fix="make the folder, or name a file in another one",
            )
        refuse_unwritable(config.metrics_file.parent)
    if config.store is not None:
        Store.open(config.store).sizes()


def check_devices(engine: EngineConfig) -> None:
    """TideError where the device is not there, or copies of the teacher would have no GPU."""
    if engine.workers == "ray":
        return
    choose_device(engine.device)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(named.split(",")) if named else torch.cuda.device_count()
    wanted = engine.data_parallel * engine.tensor_parallel
    if there and engine.data_parallel > 1 and wanted > there and engine.device in ("auto", "cuda"):
        raise TideError(
            f"engine.data_parallel is {engine.data_parallel} with {engine.tensor_parallel} GPUs each, and "
            f"{there} GPUs are visible" + (f" (CUDA_VISIBLE_DEVICES={named})" if named else ""),
            expected=f"at most {there // engine.tensor_parallel} copies",
            fix=f"lower it: --data-parallel {max(1, there // engine.tensor_parallel)}, or --set engine.device=cpu",
        )
