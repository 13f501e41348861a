"""Real vocabularies, real texts and real weights through the whole of stage one and into stage two."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from shared.alignment import Region, align_tokens
from shared.config import CacheConfig, DataConfig, LengthConfig
from shared.examples import Preparer
from shared.manifest import load_manifest
from shared.shards import Unit, read_table
from shared.tokenizers import Tokenizer
from student_train.training.trainer import train_student
from teacher_cache.build import build_cache
from teacher_cache.maintenance.inspect import inspect_cache
from teacher_cache.maintenance.sizes import size_steps
from tests.conftest import chats_file
from tests.reading import rows_in
from tests.real_assets import qwen_tokenizer, smollm2
from tests.shared.models.test_configs import in_parts
from tests.shared.test_examples import TEXTS, chat, check_chunks

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("TIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def test_real_tokenizers_reproduce_the_golden_tokens_and_chunks(golden: Path) -> None:
    teacher, student = Tokenizer.load(smollm2()), Tokenizer.load(qwen_tokenizer())
    document = json.loads((golden / "alignment.json").read_text())
    assert len(document["cases"]) >= 10
    for case in document["cases"]:
        t, s = (tokenizer.encode([case["text"]])[0] for tokenizer in (teacher, student))
        assert teacher.backend.convert_ids_to_tokens(t) == case["teacher_tokens"]
        assert student.backend.convert_ids_to_tokens(s) == case["student_tokens"]
        region = Region(0, 0, len(case["text"].encode()))
        chunks = align_tokens(teacher.byte_lengths[t], student.byte_lengths[s], [region])
        assert chunks.tolist() == case["chunks"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_hard_texts_between_real_vocabularies(text: str) -> None:
    teacher, student = Tokenizer.load(smollm2()), Tokenizer.load(qwen_tokenizer())
    preparer = Preparer(
        student, teacher, LengthConfig(256, 256), len(student), teacher.special_id("mask", "<empty_output>")
    )
    (p,) = preparer.usable([chat(text)])
    aligned = check_chunks(p, text, student, teacher)
    whole = text.encode()
    if "\u0301" in text:  # Qwen's NFC changes it: aligned up to the change, the rest counted
        assert aligned == whole[: len(aligned)]
        assert preparer.counts["unaligned_bytes"] > 0
    else:
        assert aligned == whole
        assert preparer.counts["unaligned_bytes"] == 0


def test_the_empty_think_block_is_prompt() -> None:
    student = Tokenizer.load(qwen_tokenizer())
    rendered = student.render(chat("x = 1").messages)
    assert rendered.text[: rendered.response_start].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert rendered.text[rendered.response_start :] == "x = 1<|im_end|>\n"


def gsm8k() -> DataConfig:
    path = DATA / "gsm8k_train_head1500.jsonl"
    if path.exists():
        return DataConfig(str(path), limit=50, prompt_field="question", response_field="answer")
    return DataConfig(str(chats_file()))


def real_config(folder: Path, *changes: str) -> CacheConfig:
    """SmolLM2-135M, a causal model, stands in for a diffusion teacher: block-causal with blocks of one, shifted."""
    teacher = smollm2()
    mask_id = Tokenizer.load(teacher).special_id("mask", "<empty_output>")
    entries = folder / "teachers.toml"
    entries.write_text(
        f'[smollm2]\nmodel = "{teacher}"\narchitecture = "llama"\nmask_id = {mask_id}\nstudent_tokens = false\n'
        f'length = 512\nstudent = "{qwen_tokenizer()}"\nattention = {{ type = "block_causal", block = 1 }}\n'
        "shift = true\n"
    )
    data = gsm8k()
    overrides = [f"data.limit={data.limit or 36}", "noise.draws=1", "shard_examples=25",
                 "lengths.student=256", "lengths.teacher=512", 'targets.signals=["topk","chunks"]',
                 "engine.dtype=float32", "engine.device=cpu"]  # fmt: skip
    if data.prompt_field:
        overrides += ["data.prompt_field=question", "data.response_field=answer"]
    flags = {"out": folder / "cache", "data": data.source}
    return cache_config("smollm2", None, [*overrides, *changes], entries, **flags)


def test_a_real_model_through_both_stages(tmp_path: Path) -> None:
    report = build_cache(real_config(tmp_path, "targets.k=16"))
    assert report.rows >= 30
    manifest = load_manifest(tmp_path / "cache")
    assert manifest.fingerprint["student"]["mask_id"] == 151_646  # added at the end of Qwen's vocabulary
    tokenizer = Tokenizer.load(smollm2())
    likelihoods = []
    for part in range(manifest.parts):
        for row in rows_in(tmp_path / "cache", Unit(0, part)):
            assert row.teacher_ids is not None
            assert row.chunk_logp is not None
            likelihoods += row.chunk_logp.tolist()
            assert row.teacher_ids.max() < len(tokenizer)
    assert np.isfinite(likelihoods).all()
    # A language model finds real answers, half of them at hand, far likelier than chance (log 1/49152 = −10.8).
    assert -8 < np.mean(likelihoods) < -0.5
    found = inspect_cache(tmp_path / "cache")
    assert found.rows == report.rows
    assert 0.3 < found.mass[1.0] < 1  # of 49,152 tokens, 16 hold most of what a real model expects
    assert (1, 1) in dict(found.chunk_tokens.most_common(1))
    overrides = ["max_steps=3", "batch_size=4", "log_steps=1", "checkpoint_steps=3", "device=cpu",
                 "precision=float32", "learning_rate=1e-3", 'distillation={type="reverse_calm"}',
                 "student={hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=128}"]  # fmt: skip
    recipe = packaged_recipe("cross")
    config = train_config(None, recipe, [*overrides, "accumulation=1"], cache=tmp_path / "cache", out=tmp_path / "run")
    metrics = train_student(config)
    assert metrics["seconds"] > 0
    logged = [e for e in json.loads((tmp_path / "run" / "history.json").read_text())["steps"] if "loss" in e]
    assert len(logged) == 3
    assert all(np.isfinite(entry["loss"]) and entry["distillation"] > 0 for entry in logged)


TARGETS = ("topk_sizes", "topk_ids", "topk_logp", "gold_logit", "logsumexp", "chunk_logp")


def bytes_of_targets(table: pa.Table) -> dict[str, float]:
    """Bytes a position that the teacher read, by column, as they would be written."""
    sizes = list(size_steps(table).values())[-1]
    positions = sum(len(chunk.values) for chunk in table.column("split").chunks)
    return {name: sizes[name] / positions for name in TARGETS}


def in_a_vocabulary_of(table: pa.Table, vocabulary: int) -> pa.Table:
    """The same lists with every id at another, random place of a larger vocabulary: the worst case for the ids."""
    place = table.schema.get_field_index("topk_ids")
    column = table.column(place).combine_chunks()
    moved = np.random.default_rng(0).permutation(vocabulary).astype(np.int32)[np.asarray(column.values)]
    made = pa.ListArray.from_arrays(column.offsets, pa.array(moved)).cast(table.schema.field(place).type)
    return table.set_column(place, table.schema.field(place), made)


def test_what_a_masked_position_takes_on_disk(tmp_path: Path) -> None:
    """k = 64 in a vocabulary of 151,936, real logits: at most 220 bytes. Adaptive length is reported (`pytest -s`)."""
    build_cache(real_config(tmp_path, "targets.k=64", "data.limit=24", "shard_examples=24"))
    table = in_a_vocabulary_of(read_table(Unit(0, 0).path(tmp_path / "cache")), 151_936)
    fixed = bytes_of_targets(table)
    print({name: round(size, 1) for name, size in fixed.items()}, round(sum(fixed.values()), 1))
    assert sum(fixed.values()) <= 220
    (tmp_path / "a").mkdir()
    config = real_config(tmp_path / "a", "targets.k=64", "data.limit=24", "shard_examples=24", "targets.mass=0.999",
                         "targets.temperatures=[1.0]")  # fmt: skip
    build_cache(config)
    table = in_a_vocabulary_of(read_table(Unit(0, 0).path(config.out)), 151_936)
    adaptive = bytes_of_targets(table)
    kept = inspect_cache(config.out).kept
    print({name: round(size, 1) for name, size in adaptive.items()}, round(sum(adaptive.values()), 1), round(kept, 1))
    assert sum(adaptive.values()) < sum(fixed.values())


@pytest.mark.slow
def test_qwens_vocabulary_in_parts_as_dreams_lies_on_the_hub(tmp_path: Path) -> None:
    """151,643 real tokens: the pattern is found from the vocabulary alone, and every hard text gets the same ids."""
    whole = qwen_tokenizer()
    parts = Tokenizer.load(in_parts(whole, tmp_path / "dream"))
    expected = Tokenizer.load(whole)
    texts = [*TEXTS.values(), "def f(x):\n    return x + 1  # it's 12345\r\n", "\u00c9te\u0301 \t\n\n x"]
    assert parts.encode(texts) == expected.encode(texts)
    assert parts.token_bytes == expected.token_bytes
