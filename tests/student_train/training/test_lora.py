"""LoRA: an adapter is trained, gone on with and merged; its base stays as it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.cache.manifest import load_manifest
from shared.settings.build import build
from shared.settings.config import DataConfig, StudentConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.export import export_student
from student_train.training.heldout import masked_nll, prepare_heldout, student_predictor
from student_train.training.trainer import train_student
from student_train.using.student import load_for_use
from tests.conftest import heldout_file
from tests.student_train.training.test_trainer import config, curve

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}


def test_an_adapter_is_trained_resumed_and_merged(
    caches: dict[str, Path], tmp_path: Path, student: str
) -> None:
    cache, out = caches["tiny-cross"], tmp_path / "run"
    how: dict[str, Any] = {"student": {"checkpoint": student, "lora": LORA}, "max_steps": 6}
    run = config(cache, out, distillation={"type": "reverse_calm"}, checkpoint_steps=2, **how)
    metrics = train_student(run)
    # 1. A checkpoint has the adapter alone. Gone on with, it leads to the same bits.
    last, logged = out / "checkpoints" / "checkpoint-6", curve(out)
    (file,) = last.glob("*.safetensors")
    adapter = load_file(file)
    assert len(adapter) == 4 and all("lora_" in name for name in adapter)
    whole = (out / "model" / "model.safetensors").read_bytes()
    for gone in (last, out / "model"):
        shutil.rmtree(gone)
    train_student(run)
    assert (out / "model" / "model.safetensors").read_bytes() == whole and curve(out) == logged
    # 2. Merged, it is a student as any other: its base, but for the layers that were adapted.
    base, model = (AutoModelForCausalLM.from_pretrained(path) for path in (student, out / "model"))
    before = base.state_dict()
    other = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert {name.split(".")[-2] for name in other} == {"q_proj", "down_proj"}
    assert "LoRA of rank 4" in (out / "model" / "README.md").read_text()
    # 3. It has learnt, and scores as it did with its adapter, in another layout too.
    about, tokenizer = load_manifest(cache).fingerprint, Tokenizer.load(out / "model")
    data = DataConfig(str(heldout_file()), limit=4)
    heldout = prepare_heldout(data, about.lengths, tokenizer, about.student.mask_id, 2)
    export_student(out / "model", tmp_path / "a2d", "a2d")
    base, model, exported = (
        masked_nll(one, heldout, student_predictor(one, about.lengths.block))["nll"]
        for one in (base, model, load_for_use(str(tmp_path / "a2d"), "cpu").model)
    )
    assert model == exported == pytest.approx(metrics["eval_heldout_nll"], rel=1e-5)
    assert model < base - 0.01


def test_an_adapter_needs_weights_that_it_adapts() -> None:
    for lora, named in (({}, "checkpoint"), ({"targets": ["lm_head"]}, "q_proj")):
        with pytest.raises(TideError, match=named):
            build(StudentConfig, {"lora": lora, **({"checkpoint": "x"} if lora else {})})
