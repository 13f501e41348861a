"""A teacher of the student's tokens, read at the words: from settings to shard and loss."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.tools.tiny_models import CHATML_TEMPLATE
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units, read_table
from shared.cache.value_checks import problem_in
from shared.settings.config import KL, CacheConfig, Distillation, ReverseCalm, Tidal
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.objective import LossSettings, fused_loss, objective, total
from student_train.losses.targets import Targets
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.run.build import build_cache
from tests.conftest import small_cache_config
from tests.reading import all_rows, change_column, layout_of, plain_table, same_values


@pytest.fixture(scope="module", params=["student", "own"])
def config(request: Any, random_teacher: Path, tmp_path_factory: Any) -> CacheConfig:
    """A cache of the teacher under another chat template."""
    folder = tmp_path_factory.mktemp("positions")
    teacher = Path(shutil.copytree(random_teacher, folder / "teacher"))
    backend = Tokenizer.load(teacher).backend
    other = CHATML_TEMPLATE.replace("<|im_start|>", "[").replace("<|im_end|>", "<|eot_id|>")
    backend.chat_template = other
    backend.save_pretrained(teacher)
    targets = {"positions": "content", "teacher_text": request.param, "values": "float32"}
    made = small_cache_config("tiny-shared", teacher, folder / "c", targets=targets)
    build_cache(made)
    return made


def test_the_teacher_is_asked_at_masked_words_and_sees_the_rest(config: CacheConfig) -> None:
    tokenizer = Tokenizer.load(config.out / "student_tokenizer")
    special = {tokenizer.special_id("eos"), tokenizer.special_id("x", "<|eot_id|>")}
    fewer = 0
    for row in all_rows(config.out):
        assert row.read is not None
        assert set(row.read.tolist()) <= set(row.masked.tolist())
        assert row.split.size == row.gold_logp.size == row.read.size
        assert not special & set(row.student_ids[row.read].tolist())
        left = set(row.masked.tolist()) - set(row.read.tolist())
        assert set(row.student_ids[sorted(left)].tolist()) <= special
        fewer += bool(left)
        if row.teacher_ids is not None:
            assert row.teacher_masked is not None
            assert np.array_equal(row.teacher_ids[row.teacher_masked], row.student_ids[row.read])
    assert fewer > 0


def test_the_same_draws_as_with_all_positions(config: CacheConfig, tmp_path: Path) -> None:
    """Neither t, nor the masks, nor how CompDemo splits what is asked changes."""
    own = dataclasses.replace(config.targets, positions="response", teacher_text="student")
    places = {"out": tmp_path / "all", "prepared": tmp_path / "p"}
    every = dataclasses.replace(config, targets=own, **places)
    build_cache(every)
    for some, whole in zip(all_rows(config.out), all_rows(every.out), strict=True):
        assert some.t == whole.t and np.array_equal(some.masked, whole.masked)
        assert some.read is not None
        assert np.array_equal(some.split, whole.split[np.searchsorted(whole.masked, some.read)])


def test_verify_scores_the_same_and_sees_damage(config: CacheConfig, tmp_path: Path) -> None:
    assert verify_cache(config, 8).largest < 1e-4
    manifest, layout = load_manifest(config.out), layout_of(config.out)
    for unit in finished_units(config.out):
        assert not problem_in(read_table(unit.path(config.out), layout).table, layout, manifest)
    cache = Path(shutil.copytree(config.out, tmp_path / "c"))
    column = plain_table(Unit(0, 0).path(cache)).column("read").combine_chunks()
    values = column.values.to_numpy().copy()
    values[0] = 0  # a position that is not masked
    change_column(cache, Unit(0, 0), "read", same_values(column, pa.array(values)))
    table = read_table(Unit(0, 0).path(cache), layout_of(cache)).table
    assert problem_in(table, layout_of(cache), manifest)


OBJECTIVES = [KL(), KL(tidal=Tidal(timestep_weight="midrange")), ReverseCalm()]


@pytest.mark.parametrize("distillation", OBJECTIVES)
def test_the_loss_distils_at_the_words(config: CacheConfig, distillation: Distillation) -> None:
    """And is cross-entropy everywhere."""
    rows, manifest = all_rows(config.out)[:6], load_manifest(config.out)
    batch = collate(rows, manifest)
    targets: Any = TargetReader(layout_of(config.out), 4096)(batch)
    read = sum(row.read.size for row in rows if row.read is not None)
    assert targets.topk.ids.shape[0] == read < len(targets.gold)
    torch.manual_seed(0)
    hidden = torch.randn(len(targets.gold), 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4096, 16, dtype=torch.float64)
    counts = counts_of(batch["counts"])
    assert int(counts.read) == read
    logits = hidden @ head.T
    loss = total(objective(logits, targets, distillation, 0.3), counts, distillation, 1.0)
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)

    # By hand: CE of all rows, and the distillation of a batch that has no others than those that
    # were read.
    words = Targets(targets.gold[:read], targets.t[:read], targets.topk, targets.chunks)
    ce = torch.nn.functional.cross_entropy(logits, targets.gold, reduction="none") / targets.t
    alone = objective(logits[:read], words, distillation, 0.3).distillation
    own = counts.chunks if isinstance(distillation, ReverseCalm) else counts.read
    (by_hand,) = torch.autograd.grad(ce.sum() / counts.maskable + alone / own, hidden)
    torch.testing.assert_close(by_hand, expected, rtol=1e-9, atol=1e-12)

    settings = LossSettings(distillation, 1.0, counts, 0.3)
    for size in (3, 7, 1000):  # slices end before, at and behind the last row that was read
        again, _ = fused_loss(hidden, head, targets, settings, size)
        torch.testing.assert_close(again, loss, rtol=1e-9, atol=1e-12)
        (gradient,) = torch.autograd.grad(again, hidden)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
