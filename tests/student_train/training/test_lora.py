"""LoRA: an adapter is trained, gone on with and merged; its base stays as it was."""

import shutil
from pathlib import Path

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
    how = {"student": {"checkpoint": student, "lora": LORA}, "compile": "off"}
    run = config(cache, out, distillation={"type": "reverse_calm"}, **how)
    metrics = train_student(run)
    # 1. It learns; a checkpoint has the adapter alone.
    straight = curve(out)
    losses = [entry["denoise"] for entry in straight if "loss" in entry]
    assert losses[-1] < losses[0]
    last = out / "checkpoints" / "checkpoint-12"
    (file,) = last.glob("*.safetensors")
    adapter = load_file(file)
    assert len(adapter) == 4 and all("lora_" in name for name in adapter)
    # 2. Gone on with, it has the same bits.
    whole = (out / "model" / "model.safetensors").read_bytes()
    for gone in (last, out / "model"):
        shutil.rmtree(gone)
    train_student(run)
    assert (out / "model" / "model.safetensors").read_bytes() == whole
    assert curve(out) == straight
    # 3. Merged, it is a student as any other: the base, but for the layers that were adapted.
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(student).state_dict()
    other = {name for name, tensor in model.state_dict().items() if not tensor.equal(base[name])}
    assert {name.split(".")[-2] for name in other} == set(LORA["targets"])  # type: ignore[call-overload]
    assert "LoRA of rank 4" in (out / "model" / "README.md").read_text()
    manifest, data = load_manifest(cache), DataConfig(str(heldout_file()), limit=4)
    about, tokenizer = manifest.fingerprint, Tokenizer.load(out / "model")
    heldout = prepare_heldout(data, about.lengths, tokenizer, about.student.mask_id, 2)
    export_student(out / "model", tmp_path / "a2d", "a2d")
    for same in (model, load_for_use(str(tmp_path / "a2d"), "cpu").model):
        scores = masked_nll(same, heldout, student_predictor(same, about.lengths.block))
        assert scores["nll"] == pytest.approx(metrics["eval_heldout_nll"], rel=1e-5)


def test_an_adapter_needs_weights_that_it_adapts() -> None:
    for lora, named in (({}, "checkpoint"), ({"targets": ["lm_head"]}, "q_proj")):
        with pytest.raises(TideError, match=named):
            build(StudentConfig, {"lora": lora, **({"checkpoint": "x"} if lora else {})})
