"""The reference's numbers hold, a wrong one is found, a step agrees with plain definitions."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conformance.__main__ import PARTS, run_conformance
from tests.plain_masks import block_diffusion

BLOCK, SIZE, MASK, WEIGHT, TEMPERATURE = 4, 61, 60, 0.7, 1.5


@pytest.mark.parametrize("part", PARTS)
def test_the_references_numbers(golden: Path, tmp_path: Path, part: str) -> None:
    assert run_conformance(golden, part)
    with pytest.raises(ValueError, match="nothing to check"):
        run_conformance(tmp_path, part)


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_number_is_found(golden: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(golden, tmp_path / "golden", copy_function=shutil.copyfile)

    def nudge(name: str, key: str, amount: float) -> None:
        tensors = load_file(copy / name)
        flat = tensors[key].flatten()
        flat[flat.numel() // 2] += amount
        save_file(tensors, copy / name)

    nudge("losses.safetensors", "grad/kl-T2.0", 1e-4)
    nudge("bd3lm_masks.safetensors", "n10-block4-x0_xt", 1)
    nudge("a2d_qwen3/expected.safetensors", "sample/steps8-block4-new8", 1)
    nudge("llada/expected.safetensors", "logits", 3e-5)
    alignment = json.loads((copy / "alignment.json").read_text())
    alignment["cases"][3]["chunks"][0][1] += 1
    (copy / "alignment.json").write_text(json.dumps(alignment))
    steps = json.loads((copy / "step" / "step.json").read_text())
    for case in steps.values():
        case["distillation_value"] *= 1.0003
    (copy / "step" / "step.json").write_text(json.dumps(steps))
    assert not run_conformance(copy, part)


def small_model(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
        "max_position_embeddings": 64, "mask_token_id": MASK,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**shape, **changes))


def test_a_step_by_the_plainest_computation(tmp_path: Path) -> None:
    """CompDemo, KL and CE by their definitions on one vocabulary, one teacher pass at a time."""
    folder = tmp_path / "step"
    teacher, student = small_model(5, tie_word_embeddings=False), small_model(6)
    random = np.random.default_rng(3)
    rows = [(random.integers(2, 59, 12), [5, 6, 9, 10], [1, 0, 0, 1], 4, 0.4),
            (random.integers(2, 59, 8), [4, 7], [0, 1], 3, 0.7)]  # fmt: skip
    ce, terms, maskable = torch.zeros(()), [], 0
    for ids, masked, in_a, prompt, t in rows:
        clean, places, length = torch.from_numpy(ids), torch.tensor(masked), len(ids)
        noised = clean.clone()
        noised[places] = MASK
        both = torch.cat([noised, clean])[None]  # [x_t ; x_0]
        mask, positions = block_diffusion(length, BLOCK)[None, None], torch.arange(length).repeat(2)
        out = student(input_ids=both, attention_mask=mask, position_ids=positions[None])
        logits = out.logits[0, places]
        ce = ce + F.cross_entropy(logits, clean[places], reduction="sum") / (t + 1e-6)
        maskable += length - prompt
        full = torch.ones(1, 1, length, length, dtype=torch.bool)
        for part in (torch.tensor(in_a) == 0, torch.tensor(in_a) == 1):
            shown = clean.clone()
            shown[places[part]] = MASK
            with torch.no_grad():
                theirs = teacher(input_ids=shown[None], attention_mask=full).logits[0, places[part]]
            target = torch.softmax(theirs / TEMPERATURE, 1)
            own = torch.log_softmax(logits[part] / TEMPERATURE, 1)
            terms.append(TEMPERATURE**2 * F.kl_div(own, target, reduction="none").sum(1))
    ce, distilled = ce / maskable, torch.cat(terms).mean()
    loss = ce + WEIGHT * distilled
    loss.backward()

    tensors = {f"grad/{name}": p.grad for name, p in student.named_parameters()}
    lists = zip(("student_ids", "masked", "in_a"), zip(*rows, strict=True), strict=False)
    for name, values in lists:
        sizes = torch.tensor([len(own) for own in values], dtype=torch.int32)  # type: ignore
        flat = np.concatenate(values).astype(np.int32)  # type: ignore
        tensors |= {name: torch.from_numpy(flat), f"{name}_sizes": sizes}
    tensors |= {"prompt_length": torch.tensor([4, 3]), "t": torch.tensor([0.4, 0.7])}
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    save_file(tensors, folder / "kl.safetensors")
    case = {
        "teacher": "teacher", "student": "student", "teacher_attention": "full", "comp_demo": True,
        "distillation": {"type": "kl", "temperature": TEMPERATURE}, "weight": WEIGHT,
        "block": BLOCK, "step": 1, "max_steps": 4, "student_mask_id": MASK, "teacher_mask_id": MASK,
        "ce": ce.item(), "distillation_value": distilled.item(), "loss": loss.item(),
    }  # fmt: skip
    (folder / "step.json").write_text(json.dumps({"kl": case}))
    assert run_conformance(tmp_path, "step")
    (folder / "step.json").write_text(json.dumps({"kl": {**case, "comp_demo": False}}))
    assert not run_conformance(tmp_path, "step")
