"""What this machine computes with: devices, and the precision that suits them.

`auto` precision is bfloat16 where the device multiplies it in hardware (CUDA from Ampere on, CPUs
with AVX-512-BF16, AMX or their like) and float32 elsewhere: other CPUs compute a bfloat16 product
by a fallback that is many times slower.
"""

import os
import platform
import re
import shutil
import warnings
from pathlib import Path

import torch

from shared.system.files import TideError


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` is the accelerator where there is one. TideError where it is not."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        if not (accelerator or hidden) and shutil.which("nvidia-smi"):
            why = f"torch {torch.__version__} sees no NVIDIA card, and `nvidia-smi` is here"
            warnings.warn(
                f"{why}: is the driver as new as CUDA {torch.version.cuda}?", stacklevel=2
            )
        return accelerator or torch.device("cpu")
    expected = "auto or cpu" if accelerator is None else f"auto, cpu or {accelerator.type}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TideError(f"device is {name!r}", expected=expected) from error
    if device.type == "cpu":
        return device
    of_kind = accelerator is not None and device.type == accelerator.type
    if not of_kind or (device.index or 0) >= torch.accelerator.device_count():
        raise TideError(f"device {name} is not on this machine", expected=expected)
    return device


def bfloat16_in_hardware(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 without a fallback."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        available = torch.backends.mkldnn.is_available()
        return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def choose_precision(asked: str, device: torch.device, begun: str | None = None) -> str:
    """`asked`, with `auto` decided: as a run was begun (`begun`), else what suits `device`.

    Warns where the outcome is bfloat16 on a CPU that has none in hardware.
    """
    native = bfloat16_in_hardware(device)
    chosen = (begun or ("bfloat16" if native else "float32")) if asked == "auto" else asked
    if chosen == "bfloat16" and device.type == "cpu" and not native:
        reason = "this was begun with it" if asked == "auto" else "asked for"
        slow = "is many times slower than float32 on a CPU that has none in hardware"
        warnings.warn(f"bfloat16 ({reason}) {slow}", stacklevel=2)
    return chosen


def explain_precision(chosen: str, device: torch.device, begun: str | None = None) -> str:
    """One line about what `auto` became, and why."""
    if begun is not None:
        return f"auto: {chosen}, as this was begun"
    has = "in hardware" if bfloat16_in_hardware(device) else "not in hardware"
    return f"auto: {chosen} (bfloat16 is {has} on {device.type})"


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of a decided precision."""
    return getattr(torch, precision)


def describe_hardware() -> list[tuple[str, str]]:
    """What numbers and speed depend on, as (name, value)."""
    information, device = Path("/proc/cpuinfo"), choose_device()
    said = information.read_text(errors="replace") if information.exists() else ""
    named = re.search(r"model name\s*:\s*(.+)", said)
    cpu = named[1].strip() if named else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    native = bfloat16_in_hardware(torch.device("cpu"))
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        half = "bfloat16" if bfloat16_in_hardware(torch.device("cuda")) else "no bfloat16"
        gpus.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {half}")
    other = "none" if device.type == "cpu" else device.type
    return [
        ("cpu", f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores"),
        ("bfloat16 on it", "in hardware" if native else "by a slow fallback"),
        ("threads", str(torch.get_num_threads())),
        ("gpu", "; ".join(gpus) or other),
        ("precision auto", choose_precision("auto", device)),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    ]


def hardware_line() -> str:
    """`describe_hardware` in one line, for reports."""
    return "; ".join(f"{name}: {value}" for name, value in describe_hardware())


def high_water() -> int:
    """The most bytes that this process has held; 0 where the system does not say."""
    status = Path("/proc/self/status")  # getrusage would count the parent's before the fork too
    held = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(held[1]) if held else 0


def shut_down_process_group() -> None:
    """Wait for every rank, then destroy the group: a rank that leaves early makes others abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
