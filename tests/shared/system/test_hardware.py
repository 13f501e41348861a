from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from shared.system import hardware
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision, explain_precision, slowdown

CPU = torch.device("cpu")


def cpu_with(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: bfloat16)


def test_auto_follows_the_hardware_and_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, True)
    assert choose_precision("auto", CPU) == "bfloat16"
    assert choose_precision("auto", CPU, "float32") == "float32"
    assert choose_precision("float32", CPU) == "float32"
    assert (
        choose_precision("bfloat16", CPU) == "bfloat16"
    )  # and no warning, which would be an error here
    cpu_with(monkeypatch, False)
    assert choose_precision("auto", CPU) == "float32"
    assert (
        choose_precision("float32", CPU, "bfloat16") == "float32"
    )  # asked for: the fingerprint refuses it
    assert "float32 (bfloat16 is not in hardware on cpu)" in explain_precision("float32", CPU)
    assert "as this was begun" in explain_precision("float32", CPU, "float32")


@pytest.mark.parametrize(("asked", "begun"), [("bfloat16", None), ("auto", "bfloat16")])
def test_bfloat16_on_a_cpu_without_it_warns_with_the_factor(
    asked: str, begun: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_with(monkeypatch, False)
    monkeypatch.setattr(hardware, "slowdown", lambda: 9.4)
    with pytest.warns(
        UserWarning, match=r"bfloat16 on a CPU that has none in hardware .*9 times as long"
    ):
        assert choose_precision(asked, CPU, begun) == "bfloat16"


def test_the_factor_is_measured() -> None:
    assert slowdown((64, 32, 64), 2) > 0


def test_a_device_that_is_not_there_is_explained() -> None:
    assert choose_device("cpu") == CPU
    for name in ("gpu", "nonsense:x", "xpu:7", "cuda:99"):
        with pytest.raises(TideError, match="device"):
            choose_device(name)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86 are held back"
)
def test_a_process_held_to_avx2_takes_float32() -> None:
    """What most laptops are, also where this runs on something better."""
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "env"],
        capture_output=True,
        text=True,
        check=True,
        env=held,
    )
    facts = {line[:16].strip(): line[16:] for line in done.stdout.splitlines()}
    assert "AVX2" in facts["cpu"]
    assert facts["bfloat16 on it"] == "by a slow fallback"
    assert facts["precision auto"] == ("float32" if facts["gpu"] == "none" else "bfloat16")
    assert facts["torch"] == torch.__version__
