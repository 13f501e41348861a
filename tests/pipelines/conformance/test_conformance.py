from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.conformance import PARTS, run_conformance
from shared.system.errors import TideError
from student_train.losses.calm import bound_probability


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "golden"
    shutil.copytree(golden, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return folder


def test_the_golden_folder_passes_whole(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_conformance(golden)
    lines = capsys.readouterr().out.splitlines()
    assert ", 0 failed" in lines[-1]
    models = ("a2d_qwen3", "dream", "llada ", "llada2_moe", "llada_moe", "wedlm")
    for name in (
        "losses",
        "masks",
        "alignment",
        "step",
        *(f"models     {model}" for model in models),
    ):
        assert any(line.startswith(name) and " ok " in line for line in lines), name


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_number_anywhere_fails(
    copy: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def nudge(path: Path, key: str, amount: float) -> None:
        tensors = load_file(path)
        flat = tensors[key].flatten()
        flat[flat.numel() // 2] += amount
        save_file(tensors, path)

    if part == "losses":
        nudge(copy / "losses.safetensors", "grad/kl-T2.0", 1e-4)
    elif part == "masks":
        nudge(copy / "bd3lm_masks.safetensors", "n10-block4-x0_xt", 1)
    elif part == "alignment":
        document = json.loads((copy / "alignment.json").read_text())
        document["cases"][3]["chunks"][0][1] += 1
        (copy / "alignment.json").write_text(json.dumps(document))
    elif part == "sampler":
        nudge(copy / "a2d_qwen3" / "expected.safetensors", "sample/steps8-block4-new8", 1)
    elif part == "step":
        document = json.loads((copy / "step" / "step.json").read_text())
        document["shared_kl"]["distillation_value"] *= 1.0003
        (copy / "step" / "step.json").write_text(json.dumps({"shared_kl": document["shared_kl"]}))
        assert not run_conformance(copy, part)
        assert "2 failed" in capsys.readouterr().out  # in memory, and through a shard
        return
    else:
        nudge(copy / "llada" / "expected.safetensors", "logits", 3e-5)
    assert not run_conformance(copy, part)
    output = capsys.readouterr().out
    assert "1 failed" in output
    assert "FAILED" in output


def test_a_wrong_loss_value_fails(copy: Path) -> None:
    document = json.loads((copy / "losses.json").read_text())
    document["cases"][0]["loss"] *= 1 + 1e-4
    (copy / "losses.json").write_text(json.dumps(document))
    assert not run_conformance(copy, "losses")


def chunk_case(folder: Path, scale: float, clamp: bool) -> None:
    """A folder with one forward-CALM case whose student is sure of wrong tokens, as the reference computes it."""
    torch.manual_seed(0)
    logits = (torch.randn(1, 4, 9) * scale).requires_grad_()
    ids = logits.detach().argmin(-1)
    logp = torch.log_softmax(logits, -1).gather(2, ids[..., None])[0, :, 0]
    chunks = torch.stack([logp[0] + logp[1], logp[2] + logp[3]]) / 2.0
    p = chunks.exp()
    if clamp:
        p = bound_probability(p)
    target = bound_probability((torch.tensor([-0.5, -3.0]) / 2.0).exp())
    loss = -(target * p.log() + (1 - target) * torch.log1p(-p)).mean()
    loss.backward()
    assert logits.grad is not None
    case: dict[str, Any] = {
        "name": "calm-T2",
        "loss": float(loss.detach()),
        "objective": "calm",
        "temperature": 2.0,
    }
    spans = [[[0, 2], [2, 4]]]
    (folder / "losses.json").write_text(
        json.dumps({"spans_student": spans, "spans_teacher": spans, "cases": [case]})
    )
    save_file(
        {
            "chunk/student_logits": logits.detach(),
            "chunk/student_ids": ids,
            "chunk/active": torch.ones(1, 2, dtype=torch.bool),
            "chunk/teacher_chunk_logp": torch.tensor([[-0.5, -3.0]]),
            "chunk/t": torch.tensor([0.5]),
            "grad/calm-T2": logits.grad,
        },
        folder / "losses.safetensors",
    )


def test_where_the_references_clamp_is_active_it_is_put_back_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk_case(tmp_path, scale=15.0, clamp=True)
    assert run_conformance(tmp_path, "losses")
    assert "the reference's clamp is active" in capsys.readouterr().out
    chunk_case(
        tmp_path, scale=1.0, clamp=True
    )  # the same objective in the usual range needs no such thing
    assert run_conformance(tmp_path, "losses")
    assert "clamp" not in capsys.readouterr().out


def test_folders_that_hold_nothing_or_something_else(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(TideError, match="there is no folder"):
        run_conformance(tmp_path / "none")
    with pytest.raises(TideError, match="unknown part 'loss'"):
        run_conformance(tmp_path, "loss")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TideError, match="holds nothing to check"):
        run_conformance(tmp_path / "empty")
    (copy / "losses.json").write_text("{}")
    with pytest.raises(TideError, match="has another layout"):
        run_conformance(copy, "losses")
    (copy / "losses.safetensors").write_bytes(b"x")
    with pytest.raises(TideError, match="no whole safetensors file"):
        run_conformance(copy, "losses")


def test_a_folder_with_one_part_only(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(golden / "bd3lm_masks.safetensors", tmp_path / "bd3lm_masks.safetensors")
    assert run_conformance(tmp_path)
    assert "8 passed, 0 failed, 5 skipped" in capsys.readouterr().out
