"""What a run will cost, of time, disk and memory, against published sizes, known sums, torch's
counts and real caches; what a smaller cache loses.
"""

import dataclasses
import gc
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.plan import costs, memory
from pipelines.plan.fidelity import Grid, measure_fidelity, table
from pipelines.plan.plan import CARDS, Assumptions, plan_from_statement
from pipelines.recipes.read import cache_config, train_config
from shared.cache.shards import finished_units
from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model, meta_model, random_model
from shared.settings import config as settings
from shared.settings.build import build
from shared.settings.config import CacheConfig, StudentConfig, TrainConfig
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.objective import LossSettings
from student_train.model import train_on_loss, with_adapter
from student_train.training.trainer import make_trainer
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.teachers.registry import find_teacher, known_shape
from tests.conftest import small_cache_config
from tests.student_train.training.test_trainer import config

GB = 10**9
DATA = memory.Conversations(128, 2 / 3)
CACHE = CacheConfig(teacher="tiny-shared")
STUDENT = StudentConfig(hidden_size=128, layers=3, heads=4, kv_heads=2, intermediate_size=256)
OBJECTIVE = settings.KL(tidal=settings.Tidal())
TRAIN = TrainConfig(batch_size=4, student=STUDENT, distillation=OBJECTIVE, accumulation=2)
NARROW = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)


@pytest.mark.parametrize(
    ("name", "published"),
    [("llada-8b", 8.0), ("llada2-mini", 16.3), ("sdar-30b", 30.5), ("llada2.1-flash", 102.9)],
)
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


def test_the_whole_vocabulary_loses_nothing_and_more_of_it_loses_less(
    random_teacher: Path, tmp_path: Path
) -> None:
    targets = {"values": "float32", "pilot": 200}
    config = small_cache_config("tiny-shared", random_teacher, tmp_path / "c", targets=targets)
    torch.manual_seed(0)
    grid = Grid(ks=[2, 64, 4096], ranks=[1, 8], objectives=["kl", "tidal"])
    points = measure_fidelity(config, NARROW, grid, 8)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert len(points) == 3 * 2 * 2 * 2
    for kind, temperature in itertools.product(("kl", "tidal"), (1.0, 2.0)):
        here = [p for p in points if (p.objective, p.temperature) == (kind, temperature)]
        two, some, all_ = (p for p in here if p.rank == 1)
        better = next(p for p in here if (p.k, p.rank) == (2, 8))
        assert two.apart > some.apart > all_.apart == pytest.approx(0, abs=1e-5)
        assert two.apart > better.apart and two.size < better.size
        assert two.size < some.size < all_.size
        assert two.logits < some.logits < 0.99999
        for value in (all_.logits, all_.hidden, all_.head, all_.norm):
            assert value == pytest.approx(1, abs=1e-5)
    assert len(table(points)) == 2 + len(points)
    few, more = Grid(ranks=[1], temperatures=[1.0]), Grid(ks=[5000], ranks=[1])
    for teacher, wrong in (("tiny-cross", few), ("tiny-shared", more)):
        config = small_cache_config(teacher, random_teacher, tmp_path / "c")
        with pytest.raises(TideError):
            measure_fidelity(config, NARROW, wrong, 4)


def student_step(gpu_memory: int = GB, **changes: Any) -> tuple[dict[str, int], float]:
    return memory.student_step(dataclasses.replace(TRAIN, **changes), CACHE, DATA, gpu_memory)


def parameters(raw: dict[str, Any]) -> int:
    return random_model("qwen3", raw, torch.float32).num_parameters()


def test_a_step_holds_weights_gradients_and_state_and_grows_with_the_batch() -> None:
    held, flops = student_step()
    n = parameters(memory.student_config(TRAIN, CACHE))
    for kind, floats in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert held[kind] == pytest.approx(4 * floats * n, rel=0.01)
    less, more_flops = student_step(gradient_checkpointing=True)
    assert less["activations"] < held["activations"] and more_flops > flops
    with pytest.raises(TideError):
        student_step(optimizer="adafactor")


def adapted(folder: Path) -> StudentConfig:
    """The student as a checkpoint, of which a step needs the sizes alone, with an adapter."""
    raw = json.dumps(memory.student_config(TRAIN, CACHE))
    (folder / "config.json").write_text(raw)
    return StudentConfig(checkpoint=str(folder), lora=settings.Lora(rank=4))


def test_a_step_with_an_adapter_holds_gradients_and_state_of_the_adapter(tmp_path: Path) -> None:
    held, flops = student_step(student=adapted(tmp_path))
    n, shape = parameters(memory.student_config(TRAIN, CACHE)), STUDENT
    size, wide = shape.hidden_size, shape.intermediate_size
    own = 4 * shape.layers * (2 * 2 * size + 2 * (size + size // 2) + 3 * (size + wide))
    for kind, numbers in (("weights", n + own), ("gradients", own), ("optimizer", 2 * own)):
        assert held[kind] == pytest.approx(4 * numbers, rel=0.01)
    assert flops < student_step()[1]


def test_passes_are_halved_until_a_step_fits(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stated card, and before a run on the GPU at hand, which is made up here."""
    monkeypatch.setattr(memory, "on_gpu", lambda _: True)
    free = [GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], GB))
    run = config(caches["tiny-cross"], tmp_path)
    assert memory.halvings_here(run) == 0

    def counted(train: TrainConfig, *_: Any) -> tuple[dict[str, int], float]:
        return {"activations": 100 * train.batch_size - 50 * train.gradient_checkpointing}, 0.0

    monkeypatch.setattr(memory, "student_step", counted)
    train = dataclasses.replace(TRAIN, batch_size=8, global_batch=16, accumulation=1)
    for room, expected in ((800, (0, 8)), (799, (1, 4)), (60, (4, 1)), (10, (4, 1))):
        times, way, held, _ = memory.fitted(train, CACHE, DATA, GB, room, 1)
        assert (times, way.batch_size) == expected
        assert way.gradient_checkpointing == (room < 100) and (
            held["activations"] <= room or room < 50
        )
    free[0] = 300  # of which 0.92 are taken
    assert memory.halvings_here(run) == 1
    monkeypatch.setattr(memory, "student_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    assert memory.halvings_here(run) == 0  # no training ends for what counts it


def real_step(train: TrainConfig, device: str) -> Any:
    """The very step with content: its loss, and its model."""
    raw = memory.student_config(train, CACHE)
    rows, manifest = memory.student_rows(train, CACHE, DATA, raw["vocab_size"])
    model: Any = random_model("qwen3", raw, torch.float32, device).train()
    model.requires_grad_(True)
    with_adapter(model, train.student.lora)
    layout = costs.even_layout(CACHE.targets, raw["vocab_size"])
    train_on_loss(model, CACHE.lengths.block, TargetReader(layout, model.config.vocab_size))
    batch = collate(rows, manifest)
    counts = counts_of(batch["counts"])
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    given = LossSettings(train.distillation, 1.0, counts, 0.5)
    return lambda: model(batch=batch, settings=given)[0], model


@pytest.mark.parametrize("lora", [False, True])
def test_flops_of_a_step_are_those_that_torch_counts(lora: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"accumulation": 1, "distillation": settings.NoDistillation()}
    changes["student"] = adapted(tmp_path) if lora else STUDENT
    loss, _ = real_step(dataclasses.replace(TRAIN, **changes), "cpu")
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    attention = 0.15  # torch does not count the CPU's kernel of it
    counted = counter.get_total_flops()
    assert counted <= student_step(**changes)[1] <= (1 + attention) * counted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_what_a_gpu_takes() -> None:
    changes: dict[str, Any] = {"batch_size": 64, "accumulation": 1, "precision": "bfloat16"}
    changes["student"] = StudentConfig("qwen3", 1024, 8, 16, 8, 3072)
    loss, model = real_step(dataclasses.replace(TRAIN, **changes), "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gc.collect()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    card = torch.cuda.get_device_properties(0).total_memory
    predicted = sum(student_step(card, **changes)[0].values())
    print(predicted, torch.cuda.max_memory_allocated())
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.mark.parametrize("name", ["llada-8b", "wedlm-8b-x0_xt"])  # full attention, and x0_xt
def test_a_teachers_batch_holds_its_weights_and_grows_with_its_rows(name: str) -> None:
    entry = find_teacher(name)
    raw = memory.student_config(TRAIN, CACHE)
    held = []
    for tokens in (1024, 4096):
        engine = settings.EngineConfig(dtype="float32", tokens_per_batch=tokens)
        entry = dataclasses.replace(entry, architecture="qwen3")
        held.append(memory.teacher_memory(CacheConfig(engine=engine), entry, raw, DATA))
    for kinds in held:
        assert kinds["weights"] == pytest.approx(4 * parameters(raw), rel=0.01)
        assert kinds["gradients"] == kinds["optimizer"] == 0
    assert held[1]["activations"] > 1.5 * held[0]["activations"]


class CountValues(TorchDispatchMode):
    """How often a value is asked of a tensor, for which a GPU would be waited for."""

    asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self.asked += func.overloadpacket in names
        return func(*args, **(kwargs or {}))


def test_no_step_of_training_waits(caches: dict[str, Path], tmp_path: Path) -> None:
    seldom: dict[str, Any] = {"heldout": None, "log_steps": 50, "checkpoint_steps": 50}
    kinds = {"tiny-shared": {"type": "kl", "tidal": {}}, "tiny-cross": {"type": "reverse_calm"}}
    for teacher, kind in kinds.items():
        asked = []
        for steps in (3, 8):
            changes = {**seldom, "max_steps": steps, "distillation": kind}
            run = config(caches[teacher], tmp_path / f"{teacher}{steps}", **changes)
            trainer, _ = make_trainer(run)
            with CountValues() as values:
                trainer.train_resuming()
            asked.append(values.asked)
        assert asked[0] == asked[1]  # at the beginning, at the first log and at the end


def test_the_plan_has_both_stages_and_the_money_of_what_is_stated() -> None:
    caching = cache_config("tiny-shared", None, [])
    training = train_config("tiny-shared", None, ["batch_size=4"])
    given = Assumptions(CARDS["4090"], 0.5, tokens_per_second=1000)
    data = memory.Conversations(128, 0.5)
    text = plan_from_statement(caching, 1000, data, given, training)
    assert "stage one" in text and "stage two" in text and "of an RTX 4090" in text
    twice = cache_config("tiny-shared", None, ["noise.draws=2", "noise.comp_demo=true"])
    hundred = memory.Conversations(100, 0.5)  # 2 draws × 2 passes × 100,000 tokens
    text = plan_from_statement(twice, 1000, hundred, given, training)
    assert "GPU hours 0.1 at 1,000 tokens/s" in " ".join(text.split())
    assert Assumptions(CARDS["4090"], 0.5).hours(297e15) == pytest.approx(1)
    unknown = train_config("tiny-shared", None, ["student.checkpoint=nobody/nothing"])
    with pytest.raises(TideError):
        plan_from_statement(caching, 1000, data, given, unknown)
