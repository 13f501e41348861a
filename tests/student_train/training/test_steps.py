"""What one step sees: the same rows and the same gradient, however it is divided over passes and
processes; and switches that change memory and speed, and no value that is trained.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainingArguments

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.settings.build import to_plain
from shared.settings.config import KL, Calm, NoDistillation, ReverseCalm, Tidal, TrainConfig
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.losses.objective import LossSettings
from student_train.model import train_on_loss
from student_train.training import preflight
from student_train.training.preflight import halved, recorded_run, settle_batch
from student_train.training.trainer import StudentTrainer, make_trainer, train_student
from tests.reading import layout_of, rows_in
from tests.student_train.places import in_float64, small
from tests.student_train.training.test_trainer import config, curve

OBJECTIVES: dict[str, list[Any]] = {
    "tiny-shared": [NoDistillation(), KL(tidal=Tidal()), Calm()],
    "tiny-cross": [ReverseCalm(), KL()],
}  # fmt: skip
TWO = [("tiny-shared", {"type": "kl", "tidal": {}}), ("tiny-cross", {"type": "reverse_calm"})]


def test_a_step_is_divided_over_processes_and_passes_or_refused() -> None:
    for whole, draws, processes, expected in (
        (64, 1, 1, (8, 8)), (80, 1, 8, (5, 2)), (64, 4, 2, (8, 4))
    ):  # fmt: skip
        given = TrainConfig(global_batch=whole, batch_size=8, draws_per_step=draws)
        settled = settle_batch(given, processes)
        assert (settled.batch_size, settled.accumulation) == expected
        assert settle_batch(settled, processes) == settled
        most = settled
        while (smaller := halved(settled, processes)) is not None:
            assert smaller.batch_size * smaller.accumulation == most.batch_size * most.accumulation
            settled = smaller
        assert settled.batch_size == draws and settled.gradient_checkpointing
    for changes, named in (
        ({"global_batch": 64}, "66"),  # a number that three processes share
        ({"global_batch": 60, "accumulation": 7}, "accumulation"),
        ({"batch_size": 4, "draws_per_step": 3}, "draws_per_step"),
    ):
        with pytest.raises(TideError, match=named):
            settle_batch(TrainConfig(**changes), 3)  # type: ignore


def steps(cache: Path, processes: int, **changes: Any) -> list[list[tuple[str, int]]]:
    """The rows of every step of a run, and a check that its counts are theirs."""
    own = settle_batch(TrainConfig(cache=cache, epochs=2.0, **changes), processes)
    data = BatchDataset(OpenCache(own), own, processes)
    parts = processes * (own.accumulation if own.global_batch else 1)
    assert len(data) % parts == 0
    every = []
    for start in range(0, len(data), parts):
        rows = [row for i in range(start, start + parts) for row in data.rows(i)]
        counts = sum(data[i]["counts"] for i in range(start, start + parts))
        assert counts[0] == sum(row.maskable for row in rows)  # type: ignore
        every.append(sorted((row.example_id, row.draw) for row in rows if row.maskable))
    return every


def test_every_division_sees_the_same_rows_in_every_step(caches: dict[str, Path]) -> None:
    cache = caches["tiny-shared"]
    whole = steps(cache, 1, global_batch=12, batch_size=12)
    assert steps(cache, 1, global_batch=12, batch_size=4) == whole
    assert steps(cache, 3, global_batch=12, batch_size=2) == whole
    assert steps(cache, 1, batch_size=10) == steps(cache, 2, batch_size=5)  # the last one is ragged
    several = steps(cache, 1, batch_size=8, draws_per_step=2)
    assert several == steps(cache, 2, batch_size=4, draws_per_step=2)


@settings(max_examples=12)
@given(st.data())
def test_several_draws_give_the_gradient_of_each_alone(caches: dict[str, Path], data: Any) -> None:
    """And several examples in one row."""
    teacher = data.draw(st.sampled_from(sorted(OBJECTIVES)))
    distillation = data.draw(st.sampled_from(OBJECTIVES[teacher]))
    cache, manifest = caches[teacher], load_manifest(caches[teacher])
    examples = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    draws = [rows_in(cache, Unit(draw, 0)) for draw in (0, 1)]
    rows = [draws[draw][i] for i in examples for draw in data.draw(st.permutations((0, 1)))]
    model = in_float64(small(manifest.fingerprint.student.vocabulary))
    block = manifest.fingerprint.lengths.block
    train_on_loss(model, block, TargetReader(layout_of(cache), model.config.vocab_size))
    tables: Any = layout_of(cache).tables
    words = tables.token_map if isinstance(distillation, KL) else None
    whole = collate(rows, manifest, words, data.draw(st.sampled_from([None, 0, 4096])))
    counts = counts_of(whole["counts"])
    assert len(whole["clean"]) == len(examples)

    def gradient(parts: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss, _ = model(batch=part, settings=LossSettings(distillation, 1.0, counts, 0.4))
            loss.backward()
            total += float(loss.detach())
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = gradient([whole])
    alone = gradient([collate([row], manifest, words) for row in rows])
    assert together[0] == pytest.approx(alone[0], rel=1e-10)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-9, atol=1e-12)


def test_how_a_step_is_made_changes_nothing(caches: dict[str, Path], tmp_path: Path) -> None:
    """With checkpointing, by a loader's process, in several passes."""
    whole = {"global_batch": 12, "max_steps": 3, "distillation": {"type": "kl"}}
    ahead = {"gradient_checkpointing": True, "loader_workers": 1}
    left: list[Any] = []
    for i, way in enumerate(({"batch_size": 12}, {"batch_size": 12, **ahead}, {"batch_size": 3})):
        run = config(caches["tiny-shared"], tmp_path / str(i), **whole, **way)
        train_student(run)
        left.append((curve(run.out), load_file(run.out / "model" / "model.safetensors")))
        recorded = recorded_run(run.out)["config"]
        assert recorded["global_batch"] == 12 and "batch_size" not in recorded
    assert left[1][0] == left[0][0]
    for name, tensor in left[0][1].items():
        assert left[1][1][name].equal(tensor)
        torch.testing.assert_close(left[2][1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_in_smaller_passes_where_memory_runs_out(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its last step, twice in passes of half the rows, then with checkpointing; to the weights
    of an undisturbed run, and on record as that run.
    """
    how: dict[str, Any] = {"distillation": {"type": "kl"}, "heldout": None, "max_steps": 8}
    whole, disturbed = (config(caches["tiny-shared"], tmp_path / name, **how) for name in "ab")
    train_student(whole)
    compute, seen = StudentTrainer.compute_loss, []

    def short(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step, rows = self.state.global_step, len(inputs["clean"])
        most = 4 if step < 3 else 2 if step < 5 else 1
        if rows > most or (step == 6 and not self.config.gradient_checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append((step, rows))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "compute_loss", short)
    with pytest.warns(UserWarning, match="fit into memory"):
        train_student(disturbed)
    rows = [4] * 3 + [2] * 4 + [1] * 12
    assert [count for _, count in seen] == rows and [step for step, _ in seen] == [
        0, 1, 2, 3, 3, 4, 4, *(step for step in (5, 6, 7) for _ in range(4))
    ]  # fmt: skip
    weights = [load_file(run.out / "model" / "model.safetensors") for run in (whole, disturbed)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)
    records = [recorded_run(run.out) for run in (whole, disturbed)]
    assert records[0] == records[1]


def test_a_run_of_several_processes_ends_where_memory_runs_out_and_goes_on_in_smaller_passes(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them, whose others would wait for it. Only how many there are is made up."""
    how: dict[str, Any] = {"distillation": {"type": "kl"}, "heldout": None, "max_steps": 4}
    run = config(caches["tiny-shared"], tmp_path, **how, checkpoint_steps=2)
    compute, seen = StudentTrainer.compute_loss, []

    def short(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((self.state.global_step, len(inputs["clean"])))
        if seen[-1] == (3, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "compute_loss", short)
    with monkeypatch.context() as several:
        several.setattr(TrainingArguments, "world_size", property(lambda _: 2))
        with pytest.raises(TideError, match="process 0"):
            train_student(run)
    with pytest.warns(UserWarning, match="fit into memory"):
        train_student(run)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), *[(2, 2)] * 2, *[(3, 2)] * 2]


def test_one_process_uses_one_of_several_gpus(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(preflight, "on_gpu", lambda _: True)
    run = config(caches["tiny-shared"], tmp_path, student={"attention": "sdpa"})
    trainer, _ = make_trainer(run)
    model: Any = trainer.model
    assert not isinstance(trainer._wrap_model(model), torch.nn.DataParallel)
    assert trainer.args.train_batch_size == 1 and "torchrun" in caplog.text


def test_what_a_loader_process_meets_is_said(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    trainer, _ = make_trainer(config(cache, tmp_path / "r", loader_workers=1, heldout=None))
    for part in range(3):
        Unit(0, part).path(cache).unlink()
    with pytest.raises(TideError, match="part-0000") as caught:
        trainer.train_resuming()
    assert "Traceback" not in str(caught.value)


def program(
    settings: TrainConfig, *more: str, processes: int = 1, accelerate: bool = False, **env: str
) -> str:
    """What `tests.student_train.training.program` prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", **env}
    launch = f"-m torch.distributed.run --nproc-per-node={processes} --master-port=29611"
    if accelerate:  # which is told of another precision than the settings have
        launch = f"-m accelerate.commands.launch --multi_gpu --num_processes={processes}"
        launch += " --mixed_precision=bf16 --main_process_port=29611"
    command = [sys.executable, *(launch.split() if processes > 1 else [])]
    command += ["-m", "tests.student_train.training.program", json.dumps(to_plain(settings)), *more]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "objective"), TWO)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    caches: dict[str, Path], tmp_path: Path, teacher: str, objective: dict
) -> None:
    """And compiles nothing anew over batches of other lengths."""
    shape = {"hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 96}
    how = {"student": shape, "distillation": objective, "heldout": None, "log_steps": 1}
    run = config(caches[teacher], tmp_path / "r", **how)
    said = program(
        run, "compiled", OMP_NUM_THREADS="2", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor")
    )
    runs = json.loads(said.splitlines()[-1])
    assert runs["on"]["losses"] == pytest.approx(runs["off"]["losses"], rel=2e-5)
    assert runs["off"]["graphs"][-1] == 0
    graphs = runs["on"]["graphs"]
    assert graphs[1] == 2  # one for all layers, one for the loss
    assert graphs[-1] <= 3  # the loss once more where shapes met by chance
    assert graphs[-1] == graphs[6]  # the second epoch compiles nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "objective", "parallel"),
    [(*TWO[0], "ddp"), (*TWO[1], "ddp by accelerate"), (*TWO[1], "fsdp")],
)
def test_two_processes_of_two_passes_make_the_gradient_of_one(
    caches: dict[str, Path],
    tmp_path: Path,
    teacher: str,
    objective: Any,
    parallel: str,
    student: str,
) -> None:
    """16 examples at once, and 4 of them in each pass of each process."""
    how: dict[str, Any] = {"learning_rate": 1.0, "schedule": "constant_with_warmup"}
    how |= {
        "warmup_ratio": 0.0,
        "max_grad_norm": 1e9,
        "log_steps": 1,
        "checkpoint_steps": 1,
        "eval_steps": 2,
    }
    how |= {"distillation": objective, "global_batch": 16, "max_steps": 2}
    weights, curves = [], []
    way, _, accelerate = parallel.partition(" by ")
    if accelerate:  # of an adapter, by the way
        how["student"] = {"checkpoint": student, "lora": {"rank": 4}}
    for processes, batch, how["parallel"] in ((1, 16, "ddp"), (2, 4, way)):
        out = tmp_path / str(processes)
        run = config(caches[teacher], out, batch_size=batch, **how)
        program(run, "sgd", processes=processes, accelerate=bool(accelerate))
        weights.append(load_file(out / "model" / "model.safetensors"))
        curves.append(curve(out))
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-6)
    for a, b in zip(*curves, strict=True):
        assert b == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in a.items()}


@pytest.mark.slow
def test_processes_stop_at_one_step(caches: dict[str, Path], tmp_path: Path) -> None:
    """Whichever of them is told; the curve is that of a run that nobody told."""
    how = {"log_steps": 3, "checkpoint_steps": 6, "distillation": {"type": "kl"}, "max_steps": 6}
    straight, told = (config(caches["tiny-shared"], tmp_path / name, **how) for name in "st")
    program(straight, "adamw_torch", processes=2)
    said = program(told, "stop", processes=2)
    assert sorted(re.findall("process . stopped at .", said)) == [
        f"process {rank} stopped at 4" for rank in (0, 1)
    ]
    program(told, "adamw_torch", processes=2)
    for a, b in zip(curve(told.out), curve(straight.out), strict=True):
        assert b == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in a.items()}


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(caches: dict[str, Path], tmp_path: Path) -> None:
    how = {"log_steps": 1, "checkpoint_steps": 2, "eval_steps": 2, "parallel": "fsdp"}
    how |= {"distillation": {"type": "reverse_calm"}, "max_steps": 4}
    settings = config(caches["tiny-cross"], tmp_path / "run", **how)
    program(settings, "adamw_torch", processes=2)
    before = load_file(settings.out / "model" / "model.safetensors")
    shutil.rmtree(settings.out / "checkpoints" / "checkpoint-4")
    shutil.rmtree(settings.out / "model")
    program(settings, "adamw_torch", processes=2)
    after = load_file(settings.out / "model" / "model.safetensors")
    assert all(after[name].equal(value) for name, value in before.items())
