"""What a run will cost, against published sizes, torch's counts and real caches."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.plan import costs
from shared.cache.shards import finished_units
from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model, meta_model
from shared.settings.build import build
from shared.settings.config import CacheConfig
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.teachers.registry import find_teacher, known_shape
from tests.conftest import small_cache_config


@pytest.mark.parametrize(("name", "published"), [("llada-8b", 8.0), ("llada2-mini", 16.3)])
def test_the_sizes_on_record_add_up_to_the_published_ones(name: str, published: float) -> None:
    """In billions of parameters; no weight is made."""
    entry = find_teacher(name)
    shape = known_shape(entry)
    assert shape is not None
    assert shape["model_type"] in ARCHITECTURES[entry.architecture].model_types
    model = meta_model(entry.architecture, shape)
    assert costs.size_of(model).parameters / 1e9 == pytest.approx(published, abs=0.06)
    assert entry.mask_id < model.config.vocab_size == entry.vocabulary


def test_flops_are_those_that_torch_counts(golden: Path) -> None:
    """Every expert runs on its own tokens only; attention and head are counted too."""
    model = load_model(open_checkpoint(str(golden / "llada2_moe")), "llada2_moe", torch.float32)
    model.set_attn_implementation("eager")  # torch counts matrix products, not the fused kernels
    model.set_experts_implementation("eager")
    ids, mask = torch.randint(0, 90, (1, 64)), torch.zeros(1, 1, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    flops = costs.size_of(model).flops(costs.Workload(1, 1, 64, 64, 64, 0, ""), 64)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_bytes_of_a_draw_bound_those_of_a_real_cache(
    random_teacher: Path, tmp_path: Path
) -> None:
    for teacher in ("tiny-cross", "tiny-shared"):
        config = small_cache_config(teacher, random_teacher, tmp_path / teacher, shard_examples=24)
        build_cache(config)
        plan = open_or_begin(config)
        load = costs.sampled_workload(plan)
        assert load.examples == 24
        rows = [unit.path(config.out).stat().st_size / 24 for unit in finished_units(config.out)]
        estimate = costs.bytes_per_draw(load, config, 4096, not plan.entry.student_tokens)
        assert 0.5 * estimate < sum(rows) / len(rows) < 1.15 * estimate


def test_stated_workloads_count_copies_and_passes() -> None:
    for teacher, tokens in (("llada-8b", 200), ("wedlm-8b", 150), ("sdar-8b", 125)):
        config = build(CacheConfig, {"teacher": teacher})  # two draws
        load = costs.assumed_workload(find_teacher(teacher), config, 10, 100, 0.5)
        assert (load.passes, load.tokens, load.masked) == (2, tokens, 25)
    one = build(CacheConfig, {"teacher": "llada-8b", "noise": {"comp_demo": False}})
    assert costs.assumed_workload(find_teacher("llada-8b"), one, 10, 100, 0.5).tokens == 100
