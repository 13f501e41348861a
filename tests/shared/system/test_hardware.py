import os
import platform
import subprocess
import sys

import pytest
import torch

from shared.system import hardware
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision

CPU = torch.device("cpu")
X86 = platform.machine() in ("x86_64", "AMD64")


def test_auto_follows_the_hardware_and_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: True)
    assert choose_precision("auto", CPU) == "bfloat16"
    assert choose_precision("auto", CPU, "float32") == "float32"
    assert choose_precision("float32", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"  # and no warning: it would be an error
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: False)
    assert choose_precision("auto", CPU) == "float32"
    # What was asked for stays; the fingerprint refuses it.
    assert choose_precision("float32", CPU, "bfloat16") == "float32"
    for asked, begun in (("bfloat16", None), ("auto", "bfloat16")):
        with pytest.warns(UserWarning, match="bfloat16"):
            assert choose_precision(asked, CPU, begun) == "bfloat16"


def test_a_device_that_is_not_there_is_explained() -> None:
    assert choose_device("cpu") == CPU
    for name in ("nonsense:x", "xpu:7", "cuda:99"):
        with pytest.raises(TideError):
            choose_device(name)


@pytest.mark.skipif(not X86, reason="instruction sets of x86 are held back")
def test_a_process_held_to_avx2_takes_float32() -> None:
    """What most laptops are, also where this runs on something better."""
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = "from shared.system.hardware import *; cpu = choose_device('cpu')\n"
    code += "print(choose_precision('auto', cpu))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=held)
    assert done.stdout.strip() == b"float32"
