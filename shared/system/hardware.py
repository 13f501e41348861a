"""What this machine computes with: devices by name, the precision that suits them, and how to say so.

`auto` precision is bfloat16 where the device multiplies it in hardware (CUDA from Ampere on, CPUs with AVX-512-BF16,
AMX or their like) and float32 elsewhere: on other CPUs a bfloat16 product is computed by a fallback that is many times
slower than float32.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import time
import warnings
from functools import cache
from pathlib import Path

import torch

from shared.system.errors import TideError


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` is the accelerator where there is one. TideError where it is not on this machine."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if name == "auto":
        return accelerator or torch.device("cpu")
    here = "cpu" if accelerator is None else f"cpu or {accelerator.type}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TideError(f"device is {name!r}", expected=f"auto, {here}") from error
    missing = device.type != "cpu" and (accelerator is None or device.type != accelerator.type)
    if missing or (
        device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count()
    ):
        raise TideError(f"device {name} is not on this machine", expected=f"auto, {here}")
    return device


def bfloat16_in_hardware(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 without a fallback."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
    return False


def choose_precision(asked: str, device: torch.device, begun: str | None = None) -> str:
    """`asked`, with `auto` decided: as what is gone on with was begun (`begun`), else what suits `device`.

    Warns where the outcome is bfloat16 on a CPU without it, with the factor by which products are slower.
    """
    automatic = "bfloat16" if bfloat16_in_hardware(device) else "float32"
    chosen = (begun or automatic) if asked == "auto" else asked
    if chosen == "bfloat16" and device.type == "cpu" and not bfloat16_in_hardware(device):
        reason = "this was begun with it" if asked == "auto" else "asked for"
        warnings.warn(
            f"bfloat16 on a CPU that has none in hardware ({reason}): products take {slowdown():.0f} times as long as "
            "in float32",
            stacklevel=2,
        )
    return chosen


def explain_precision(chosen: str, device: torch.device, begun: str | None = None) -> str:
    """One line about what `auto` became, and why."""
    if begun is not None:
        return f"auto: {chosen}, as this was begun"
    has = "in hardware" if bfloat16_in_hardware(device) else "not in hardware"
    return f"auto: {chosen} (bfloat16 is {has} on {device.type})"


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of a decided precision."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return dtypes[precision]


@cache
def slowdown(shape: tuple[int, int, int] = (512, 128, 4096), rounds: int = 3) -> float:
    """How many times as long a bfloat16 matrix product takes as a float32 one on this CPU, measured once a process."""
    rows, inner, columns = shape
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def describe_hardware() -> list[tuple[str, str]]:
    """What numbers and speed depend on, as (name, value)."""
    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = (
        [_describe_gpu(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return [
        ("cpu", f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores"),
        ("bfloat16 on it", "in hardware" if bfloat16_in_hardware(cpu) else "by a slow fallback"),
        ("threads", str(torch.get_num_threads())),
        ("gpu", "; ".join(gpus) or _other_accelerator()),
        ("precision auto", choose_precision("auto", choose_device())),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    ]


def hardware_line() -> str:
    """`describe_hardware` in one line, for reports."""
    return "; ".join(f"{name}: {value}" for name, value in describe_hardware())


def _describe_gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    native = (
        "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
    )
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {native}"


def _other_accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "none" if found is None else found.type


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def high_water() -> int:
    """The most bytes that this process has held; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def largest_process() -> int:
    """The most bytes that this process, or one that it has started, has held."""
    return max(high_water(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
