from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shared.cache.manifest import load_manifest
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.settings.config import StudentConfig
from shared.system.errors import TideError
from student_train.batches.visible_rows import needed_places
from student_train.model.export import export_student
from student_train.model.student import load_student, masked_hidden
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER


def places_of(
    valid: torch.Tensor, row: torch.Tensor, column: torch.Tensor, block: int
) -> tuple[Any, Any]:
    lengths = valid.sum(dim=1).tolist()
    return needed_places([column[row == i].numpy() for i in range(len(lengths))], lengths, block)


def masked_logits(
    model: Any,
    noised: Any,
    clean: Any,
    valid: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """Logits at masked positions, from the needed rows alone."""
    places, place = places_of(valid, row, column, block)
    return model.lm_head(masked_hidden(model, noised, clean, places, row, place, block))


def test_golden_logits_at_masked_positions(golden: Path) -> None:
    model = load_model(open_checkpoint(str(golden / "a2d_qwen3")), "qwen3", torch.float32)
    expected = load_file(golden / "a2d_qwen3" / "expected.safetensors")
    noised, clean = expected["noised_ids"], expected["clean_ids"]
    row, column = (noised == 95).nonzero(as_tuple=True)
    with torch.no_grad():
        logits = masked_logits(
            model, noised, clean, torch.ones_like(noised, dtype=torch.bool), row, column, 4
        )
    torch.testing.assert_close(
        logits, expected["logits_bd3lm_block_4"][row, column], rtol=0, atol=1e-5
    )


def small() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def test_padding_changes_no_value() -> None:
    model = small()
    lengths, width = [8, 16, 12], 16
    clean = torch.randint(0, 49, (3, width))
    noised = torch.where(torch.rand(3, width) < 0.5, 49, clean)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    row, column = (valid & (noised == 49)).nonzero(as_tuple=True)
    with torch.no_grad():
        together = masked_logits(model, noised, clean, valid, row, column, 4)
        for i, n in enumerate(lengths):
            inside = column[row == i]
            alone = masked_logits(model, noised[i : i + 1, :n], clean[i : i + 1, :n], valid[i : i + 1, :n],
                                  torch.zeros_like(inside), inside, 4)  # fmt: skip
            torch.testing.assert_close(alone, together[row == i], rtol=0, atol=1e-6)


def test_a_prediction_sees_its_noised_block_and_earlier_clean_blocks_only() -> None:
    model = small()
    clean = torch.randint(0, 48, (1, 12))
    noised = clean.clone()
    noised[0, 5] = 49
    ask = (torch.tensor([0]), torch.tensor([5]), 4)
    valid = torch.ones(1, 12, dtype=torch.bool)

    def predict(noised: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return masked_logits(model, noised, clean, valid, *ask)

    base = predict(noised, clean)
    for position in range(12):
        changed_clean, changed_noised = clean.clone(), noised.clone()
        changed_clean[0, position] = 48
        changed_noised[0, position] = 48
        moved_by_clean = not torch.equal(predict(noised, changed_clean), base)
        moved_by_noised = not torch.equal(predict(changed_noised, clean), base)
        assert moved_by_clean == (
            position < 4
        )  # its own clean block, with the answer, is never seen
        assert moved_by_noised == (4 <= position < 8)


def test_a_new_student_and_one_from_a_checkpoint(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = caches["tiny-cross"]
    manifest = load_manifest(cache)
    settings = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)
    model, tokenizer = load_student(settings, cache, manifest)
    assert model.get_input_embeddings().weight.shape == (2048, 32)
    model.save_pretrained(tmp_path)
    tokenizer.backend.save_pretrained(tmp_path)
    again, _ = load_student(StudentConfig(checkpoint=str(tmp_path)), cache, manifest)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert all(p.requires_grad for p in again.parameters())


def test_a_student_of_another_tokenizer_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    for file in TEACHER_TOKENIZER.glob("*.js*"):
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copy(file, tmp_path / file.name)
    with pytest.raises(TideError, match="was built for another student tokenizer"):
        load_student(
            StudentConfig(checkpoint=str(tmp_path)),
            caches["tiny-cross"],
            load_manifest(caches["tiny-cross"]),
        )


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_without_a_row_for_the_mask_grows_only_when_told_to(
    caches: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=tied)  # fmt: skip
    before: Any = LlamaForCausalLM(config)
    before.save_pretrained(tmp_path)
    for file in STUDENT_TOKENIZER.iterdir():
        shutil.copy(file, tmp_path / file.name)
    cache, manifest = caches["tiny-cross"], load_manifest(caches["tiny-cross"])
    with pytest.raises(
        TideError, match="mask id 2047 lies outside the student's embedding of 2000 rows"
    ):
        load_student(StudentConfig(checkpoint=str(tmp_path)), cache, manifest)
    model, _ = load_student(
        StudentConfig(checkpoint=str(tmp_path), add_mask_row=True), cache, manifest
    )
    assert "grown from 2000 to 2048 rows" in caplog.text
    pairs = [
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.lm_head, model.lm_head),
    ]
    for old, new in pairs:
        assert torch.equal(new.weight[:2000], old.weight)
        torch.testing.assert_close(new.weight[2047], old.weight.mean(dim=0))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 2048


def test_a_llama_student(caches: dict[str, Path], tmp_path: Path) -> None:
    cache, manifest = caches["tiny-cross"], load_manifest(caches["tiny-cross"])
    settings = StudentConfig(
        architecture="llama", hidden_size=32, layers=1, heads=2, intermediate_size=32
    )
    model, tokenizer = load_student(settings, cache, manifest)
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "llama")
    tokenizer.backend.save_pretrained(tmp_path / "llama")
    again, _ = load_student(StudentConfig(checkpoint=str(tmp_path / "llama")), cache, manifest)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    export_student(tmp_path / "llama", tmp_path / "hf", "hf")
    with pytest.raises(TideError, match="a2d-qwen3 is a layout of Qwen3 only"):
        export_student(tmp_path / "llama", tmp_path / "a2d", "a2d")


def test_a_checkpoint_that_is_no_student_is_refused(
    caches: dict[str, Path], golden: Path, tmp_path: Path
) -> None:
    shutil.copytree(golden / "dream", tmp_path / "dream")
    for file in STUDENT_TOKENIZER.iterdir():
        shutil.copy(file, tmp_path / "dream" / file.name)
    with pytest.raises(TideError, match=r"model_type 'Dream'[\s\S]*qwen3, a2d-qwen3 or llama"):
        load_student(
            StudentConfig(checkpoint=str(tmp_path / "dream")),
            caches["tiny-cross"],
            load_manifest(caches["tiny-cross"]),
        )
