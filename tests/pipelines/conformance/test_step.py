"""`tide conformance --only step` on a folder that is not the golden one: written here by the plainest computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pipelines.conformance import run_conformance
from shared.diffusion.attention import block_diffusion

BLOCK, SIZE, MASK = 4, 61, 60
SHAPE: dict[str, Any] = {
    "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.4,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "mask_token_id": MASK,
}  # fmt: skip


def rows(shared: bool) -> dict[str, Any]:
    """Two rows: student ids, masks, splits and, across tokenizers, chunks of one student and two teacher tokens."""
    rng = np.random.default_rng(3)
    student = [rng.integers(2, 59, n) for n in (12, 8)]
    masked = [np.array([5, 6, 9, 10]), np.array([4, 7])]
    found: dict[str, Any] = {
        "student_ids": student,
        "masked": masked,
        "prompt_length": [4, 3],
        "t": [0.4, 0.7],
    }
    if shared:
        return found | {"in_a": [np.array([1, 0, 0, 1]), np.array([0, 1])]}
    teacher = [rng.integers(2, 59, 20), rng.integers(2, 59, 15)]
    own = [np.array([[5, 6], [6, 7], [9, 11]]), np.array([[4, 5], [7, 8]])]
    theirs = [np.array([[7, 9], [9, 11], [14, 16]]), np.array([[5, 7], [10, 12]])]
    places = [np.concatenate([np.arange(a, b) for a, b in spans]) for spans in theirs]
    split = [np.array([1, 1, 0, 0, 1, 1]), np.array([0, 0, 1, 1])]
    return found | {"teacher_ids": teacher, "teacher_masked": places, "in_a": split,
                    "chunk_student": own, "chunk_teacher": theirs}  # fmt: skip


def teacher_logits(teacher: Any, found: dict[str, Any], i: int, comp_demo: bool) -> torch.Tensor:
    """At the masked positions of row `i`, under full attention, one pass at a time."""
    ids = torch.tensor(found.get("teacher_ids", found["student_ids"])[i])
    places = torch.tensor(found.get("teacher_masked", found["masked"])[i])
    in_a = torch.tensor(found["in_a"][i]).bool()
    result = torch.zeros(len(places), SIZE)
    for part in [in_a, ~in_a] if comp_demo else [torch.ones_like(in_a)]:
        noised = ids.clone()
        noised[places[part]] = MASK
        full = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
        result[part] = teacher(noised[None], attention_mask=full).logits[0, places[part]]
    return result


def plain_step(
    teacher: Any, student: Any, found: dict[str, Any], case: dict[str, Any]
) -> dict[str, float]:
    """CE and distillation by their definitions (DESIGN §3); the gradient goes to the student's parameters."""
    T, shared = case["distillation"]["temperature"], "teacher_ids" not in found
    ce, terms, maskable = torch.zeros(()), [], 0
    for i, ids in enumerate(found["student_ids"]):
        clean, places, t = torch.tensor(ids), torch.tensor(found["masked"][i]), found["t"][i]
        noised = clean.clone()
        noised[places] = MASK
        n = len(ids)
        mask = block_diffusion(n, BLOCK)[None, None]
        positions = torch.arange(n).repeat(2)[None]
        both = student(
            torch.cat([noised, clean])[None], attention_mask=mask, position_ids=positions
        ).logits[0, places]
        ce = ce + F.cross_entropy(both, clean[places], reduction="sum") / (t + 1e-6)
        maskable += n - found["prompt_length"][i]
        with torch.no_grad():
            theirs = teacher_logits(teacher, found, i, case["comp_demo"])
        if shared:
            target = torch.softmax(theirs / T, 1)
            terms += (
                T**2 * F.kl_div(torch.log_softmax(both / T, 1), target, reduction="none").sum(1)
            ).unbind()
            continue
        logp = torch.log_softmax(both, 1).gather(1, clean[places][:, None])[:, 0]
        gold = torch.tensor(found["teacher_ids"][i])[torch.tensor(found["teacher_masked"][i])]
        other = torch.log_softmax(theirs, 1).gather(1, gold[:, None])[:, 0]
        for (a, b), (c, d) in zip(
            found["chunk_student"][i], found["chunk_teacher"][i], strict=True
        ):
            own = torch.from_numpy(np.isin(found["masked"][i], np.arange(a, b)))
            at = torch.from_numpy(np.isin(found["teacher_masked"][i], np.arange(c, d)))
            p, q = (logp[own].sum() / T).exp(), (other[at].sum() / T).exp().clamp(1e-7, 1 - 1e-7)
            terms.append(-(p * q.log() + (1 - p) * (1 - q).log()))
    ce, extra = ce / maskable, torch.stack(terms).mean()
    loss = ce + case["weight"] * extra
    loss.backward()
    return {"ce": ce.item(), "distillation_value": extra.item(), "loss": loss.item()}


def flat(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, values in found.items():
        if name in ("t", "prompt_length"):
            tensors[name] = torch.tensor(
                values, dtype=torch.float32 if name == "t" else torch.int32
            )
            continue
        parts = [np.asarray(v).reshape(-1) for v in values]
        tensors[name] = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        tensors[f"{name}_sizes"] = torch.tensor([p.size for p in parts], dtype=torch.int32)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("other") / "step"
    torch.manual_seed(5)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    student = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
    document = {}
    cases = {
        "kl": (True, {"type": "kl", "temperature": 1.5}, False),
        "kl-split": (True, {"type": "kl", "temperature": 1.0}, True),
        "reverse": (False, {"type": "reverse_calm", "temperature": 3.0}, True),
    }
    for name, (shared, distillation, comp_demo) in cases.items():
        case = {
            "distillation": distillation,
            "comp_demo": comp_demo,
            "weight": 0.7,
            "step": 1,
            "max_steps": 4,
        }
        case |= {"block": BLOCK, "teacher": "t", "student": "s", "teacher_attention": "full"}
        case |= {"student_mask_id": MASK, "teacher_mask_id": MASK}
        found = rows(shared)
        student.zero_grad()
        document[name] = case | plain_step(teacher, student, found, case)
        grads = {
            f"grad/{n}": p.grad.clone() for n, p in student.named_parameters() if p.grad is not None
        }
        made.mkdir(exist_ok=True)
        save_file(flat(found) | grads, made / f"{name}.safetensors")
    teacher.save_pretrained(made / "t")
    student.save_pretrained(made / "s")
    (made / "step.json").write_text(json.dumps(document))
    return made.parent


def test_another_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_conformance(folder, "step"), capsys.readouterr().out
    assert "30 passed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient", "split"])
def test_what_is_wrong_fails(
    folder: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "step"
    copy.mkdir()
    for name in ("t", "s", "reverse.safetensors"):
        (copy / name).symlink_to(folder / "step" / name)
    document = json.loads((folder / "step" / "step.json").read_text())
    if what == "loss":
        document["reverse"]["ce"] *= 1.0003
    else:
        tensors = load_file(copy / "reverse.safetensors")
        if what == "gradient":
            tensors["grad/model.norm.weight"] *= 1.1
        else:
            tensors["in_a"][:2] = 1 - tensors["in_a"][:2]  # one chunk in the other pass
        (copy / "reverse.safetensors").unlink()
        save_file(tensors, copy / "reverse.safetensors")
    (copy / "step.json").write_text(json.dumps({"reverse": document["reverse"]}))
    assert not run_conformance(tmp_path, "step")
    assert "FAILED" in capsys.readouterr().out
