"""Real vocabularies, texts and weights through the whole of stage one and into stage two."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipelines.plan import fidelity
from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from shared.aligned.alignment import align_bytes, token_boundaries
from shared.aligned.examples import Preparer
from shared.aligned.token_map import count_map
from shared.cache.levels import to_table
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import column_bytes, table_bytes
from shared.settings.config import CacheConfig, LengthConfig, StudentConfig
from shared.text.tokenizers import Tokenizer
from student_train.training.trainer import train_student
from teacher_cache.maintenance.derive import prune_cache
from teacher_cache.maintenance.inspect import inspect_cache
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file
from tests.reading import all_rows, layout_of
from tests.real_assets import qwen_tokenizer, smollm2
from tests.shared.aligned.test_examples import TEXTS, chat, check_chunks
from tests.shared.text.test_tokenizers import in_parts

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("TIDE_DATA", Path(__file__).parents[2] / "shared" / "data"))
MASK = "<empty_output>"  # of SmolLM2's vocabulary, in place of a mask token
TARGETS = ("topk_sizes", "topk_ranks", "topk_logp", "tail_code", "tail_level", "gold_logp",
           "logsumexp")  # fmt: skip


def test_real_tokenizers_reproduce_the_golden_tokens_and_chunks(golden: Path) -> None:
    teacher, student = Tokenizer.load(smollm2()), Tokenizer.load(qwen_tokenizer())
    for case in json.loads((golden / "alignment.json").read_text())["cases"]:
        t, s = (tokenizer.encode([case["text"]])[0] for tokenizer in (teacher, student))
        assert teacher.backend.convert_ids_to_tokens(t) == case["teacher_tokens"]
        assert student.backend.convert_ids_to_tokens(s) == case["student_tokens"]
        edges = token_boundaries(teacher.byte_lengths[t]), token_boundaries(student.byte_lengths[s])
        chunks = align_bytes(edges[0], edges[1], len(case["text"].encode()))
        assert chunks.tolist() == case["chunks"]


def test_hard_texts_between_real_vocabularies(tmp_path: Path) -> None:
    teacher, student = Tokenizer.load(smollm2()), Tokenizer.load(qwen_tokenizer())
    mask, lengths, every = teacher.special_id("mask", MASK), LengthConfig(256, 256), []
    for text in TEXTS.values():
        preparer = Preparer(student, teacher, lengths, len(student), mask)
        (prepared,) = preparer.usable([chat(text)])
        every.append(prepared)
        aligned, whole = check_chunks(prepared, text, student, teacher), text.encode()
        # Qwen's NFC changes a combining accent: aligned up to the change, the rest counted.
        changed = "\u0301" in text
        assert aligned == (whole[: len(aligned)] if changed else whole)
        assert (preparer.counts["unaligned_bytes"] > 0) == changed
    # What begins where a token begins spells the same as far as both go.
    words = count_map(every, teacher, student)
    for t, place, s in zip(words.token, words.place, words.student, strict=True):
        if place == 0 and t not in teacher.added_ids:
            both = teacher.token_bytes[t], student.token_bytes[s]
            assert both[0].startswith(both[1]) or both[1].startswith(both[0])
    assert len(np.unique(words.token)) > 49_000
    rendered = student.template.render(chat("x = 1").messages)  # the empty think block is prompt
    prompt, start = "<|im_start|>assistant\n<think>\n\n</think>\n\n", rendered.turns[-1].start
    assert rendered.text[:start].endswith(prompt) and rendered.text[start:] == "x = 1<|im_end|>\n"
    # The pattern is found from the 151,643 tokens alone where they lie in parts, as Dream's do.
    parts = Tokenizer.load(in_parts(qwen_tokenizer(), tmp_path / "dream"))
    texts = [*TEXTS.values(), "def f(x):\n    return x + 1  # it's 12345\r\n", "Été́ \t\n\n x"]
    assert parts.encode(texts) == student.encode(texts)
    assert parts.token_bytes == student.token_bytes


def real_config(folder: Path, *changes: str, student: Path | None = None) -> CacheConfig:
    """SmolLM2-135M, a causal model, stands in for a diffusion teacher: blocks of one, shifted.

    `student`: a checkpoint of the same vocabulary; else the student reads Qwen's.
    """
    mask_id = Tokenizer.load(smollm2()).special_id("mask", MASK)
    entries = folder / "teachers.toml"
    entries.write_text(
        f'[smollm2]\nmodel = "{smollm2()}"\narchitecture = "llama"\nmask_id = {mask_id}\n'
        f"student_tokens = {str(student is not None).lower()}\nlength = 512\n"
        f'student = "{student or qwen_tokenizer()}"\nshift = true\n'
        'attention = { type = "block_causal", block = 1 }\n'
    )
    overrides = ["data.limit=36", "noise.draws=1", "shard_examples=25", "lengths.student=256",
                 "lengths.teacher=512", "engine.dtype=float32", "engine.device=cpu"]  # fmt: skip
    source = DATA / "gsm8k_train_head1500.jsonl"
    if source.exists():
        overrides += ["data.prompt_field=question", "data.response_field=answer"]
    data, out = {"source": str(source if source.exists() else chats_file())}, folder / "cache"
    return cache_config("smollm2", None, [*overrides, *changes], entries, {"data": data}, out=out)


def test_a_real_model_through_both_stages(tmp_path: Path) -> None:
    changes = ["targets.k=16", "targets.rank=192", "targets.step=0.07", "targets.pilot=1500",
               'targets.signals=["topk","chunks"]']  # fmt: skip
    cache = tmp_path / "cache"
    assert build_cache(real_config(tmp_path, *changes)).rows >= 30
    # `<|mask|>` is added at the end of Qwen's vocabulary.
    assert load_manifest(cache).fingerprint.student.mask_id == 151_646
    likelihoods = np.concatenate([row.chunk_logp for row in all_rows(cache)])  # type: ignore
    # A language model finds answers, half of them at hand, likelier than chance (−10.8), and real
    # ones by far; those of the made-up chats are not what anybody would answer.
    least = -8.0 if (DATA / "gsm8k_train_head1500.jsonl").exists() else -10.0
    assert np.isfinite(likelihoods).all() and least < np.mean(likelihoods) < -0.5
    # Bytes a position by k and rank, two temperatures, 49,152 tokens; ids are kept by rank.
    goals = {(16, 192): 80, (8, 192): 70, (8, 96): 55, (8, 32): 40}
    for (k, rank), goal in goals.items():
        smaller = tmp_path / f"k{k}-r{rank}"
        prune_cache(cache, smaller, k=k, rank=rank)
        layout, rows, inspected = layout_of(smaller), all_rows(smaller), inspect_cache(smaller)
        assert 0.3 < inspected.mass / inspected.positions < 1  # of what it expects, k hold most
        sizes = column_bytes(table_bytes(to_table(rows, layout), layout, {}))
        taken = sum(sizes[name] for name in TARGETS) / sum(row.split.size for row in rows)
        print(f"k = {k}, rank {rank}: {taken:.1f} bytes a position that the teacher read")
        assert taken <= goal
    overrides = ["max_steps=3", "batch_size=4", "accumulation=1", "log_steps=1", "device=cpu",
                 "checkpoint_steps=3", "precision=float32", 'distillation={type="reverse_calm"}',
                 "student={hidden_size=64, layers=2, heads=2, kv_heads=1}"]  # fmt: skip
    recipe, run = packaged_recipe("cross"), tmp_path / "run"
    train_student(train_config(None, recipe, overrides, cache=cache, out=run))
    steps = json.loads((run / "history.json").read_text())["steps"]
    losses = [entry["loss"] for entry in steps if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()


def without_layers(folder: Path, out: Path, removed: slice) -> Path:
    """A Llama checkpoint less some of its layers."""
    shutil.copytree(folder, out)
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    del model.model.layers[removed]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def causal_states(
    model: Any, rows: list[CacheRow], _manifest: Manifest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a causal model predicts each masked token, from the same noised text as its teacher."""
    parts = []
    for row in rows:
        ids = torch.from_numpy(row.student_ids.astype(np.int64))[None].clone()
        masked, asked = (torch.from_numpy(x.astype(np.int64)) for x in (row.masked, row.asked))
        ids[0, masked] = model.config.mask_token_id
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        parts.append(hidden[0, asked - 1])
    return torch.cat(parts).float(), model.lm_head.weight.detach().float()


def test_what_a_cache_of_a_real_model_keeps_of_its_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 and itself less 6 of its 30 layers, both causal, under TIDAL."""
    monkeypatch.setattr(fidelity, "student_states", causal_states)
    student = without_layers(smollm2(), tmp_path / "student", slice(12, 18))
    changes = ["noise.comp_demo=false", f'student_mask_token="{MASK}"', "data.limit=48"]
    settings = real_config(tmp_path, *changes, student=student)
    grid = fidelity.Grid(ranks=(96, 304), steps=(0.05,), temperatures=(2.0,))
    points = fidelity.measure_fidelity(settings, StudentConfig(checkpoint=str(student)), grid, 48)
    print("\n".join(fidelity.table(points)))
    few, more = points
    assert few.apart > more.apart
    assert more.size <= 75 and more.hidden >= 0.99
