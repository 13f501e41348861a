import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.recipes.read import packaged_recipe
from shared.cache.ledger import LEDGER
from shared.cache.levels import half_steps
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units
from shared.cache.tail import LinearTail
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, files, small_cache_config, write_chats
from tests.reading import layout_of, rows_in


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_rows(caches: dict[str, Path], random_teacher: Path, teacher: str) -> None:
    """Chunk likelihoods and logits of a shard, recomputed pass by pass from the rows alone."""
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    checked, layout = 0, layout_of(caches[teacher])
    assert layout.tables is not None
    tail = LinearTail.of(layout.tables, (1.0, 2.0))
    for row in rows_in(caches[teacher], Unit(1, 0)):
        ids = row.student_ids if row.teacher_ids is None else row.teacher_ids
        positions = row.masked if row.teacher_masked is None else row.teacher_masked
        assert (
            row.topk_logp is not None and row.tail_level is not None and row.tail_code is not None
        )
        assert row.chunk_teacher is not None and row.chunk_logp is not None
        logp = np.zeros(len(ids))
        for part in (False, True):
            where = np.flatnonzero(row.split == part)
            read = positions[where]
            noised = torch.from_numpy(ids.astype(np.int64))[None].clone()
            noised[0, read] = 4095
            mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
            with torch.no_grad():
                logits = model(input_ids=noised, attention_mask=mask).logits[0].double()
            logsumexp = torch.logsumexp(logits[read], 1)
            np.testing.assert_allclose(row.logsumexp[where], logsumexp, atol=0.5 / 32 + 1e-4)
            truth = torch.log_softmax(logits[read], 1).topk(8).values.numpy().astype(np.float32)
            apart = np.abs(row.topk_logp.reshape(-1, 8)[where] - truth)
            assert (apart <= half_steps(truth, (1.0, 2.0)) + 1e-4).all()
            # What is outside has, by its code and level, the mass that it has in the logits.
            outside = torch.log_softmax(logits[read], 1)
            listed = outside.topk(8).indices
            outside.scatter_(1, listed, -torch.inf)
            code = torch.tensor(row.tail_code[where].astype(np.float32)) * layout.tables.step
            for i, t in enumerate((1.0, 2.0)):
                x = tail.at(code, t).scatter(1, listed, -torch.inf)
                level = torch.logsumexp(outside / t, 1) - torch.logsumexp(x, 1)
                apart = np.abs(row.tail_level[where, i] - level.numpy())
                assert apart.max(initial=0) <= 0.5 / 256 + 1e-3
            logp[read] = torch.log_softmax(logits, 1)[read, ids[read]].numpy()
        expected = [logp[a:b].sum() for a, b in row.chunk_teacher]
        np.testing.assert_allclose(row.chunk_logp, expected, rtol=1e-4, atol=1e-5)
        checked += len(expected)
    assert checked > 50


def test_more_draws(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """A second run computes nothing, one with more draws only the new ones."""
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))

    def build(draws: int) -> tuple[int, int]:
        noise = {"draws": draws}
        report = build_cache(small_cache_config("tiny-cross", random_teacher, cache, noise=noise))
        return report.computed, report.kept

    assert build(2) == (0, 6)
    rows = [row for part in range(3) for row in rows_in(cache, Unit(1, part))]
    assert {row.draw for row in rows} == {1}
    assert len({row.example_id for row in rows}) == len(rows) == 24
    assert build(3) == (3, 6)
    assert load_manifest(cache).draws == 3
    before, after = files(caches["tiny-cross"]), files(cache)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json", LEDGER}
    assert build(2) == (0, 9)  # fewer draws shrink nothing


def test_a_lost_shard(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """It is computed again bit for bit."""
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    Unit(1, 1).path(cache).unlink()
    half = cache / "shards" / "draw=01" / ".part-00001.parquet.host-77-0.tide-tmp"
    half.write_bytes(b"half a shard")
    (cache / "shards" / "draw=01" / "chapter.tmp").write_bytes(b"a thesis")  # not ours
    assert build_cache(small_cache_config("tiny-shared", random_teacher, cache)).computed == 1
    assert files(cache) == files(caches["tiny-shared"]) | {
        "shards/draw=01/chapter.tmp": b"a thesis"
    }


def test_kill_minus_9(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Again and again at random moments, until a run gets through."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "pipelines.cli", "cache", "--teacher", "tiny-shared"]
    command += ["--config", str(packaged_recipe("empty")), "--model", str(random_teacher)]
    settings = f"shard_examples=8 data.source={chats_file()} data.limit=24 lengths.student=128"
    settings += " lengths.teacher=128 targets.k=8 targets.rank=6 targets.pilot=200"
    settings += " engine.device=cpu engine.dtype=float32"
    command += [part for s in settings.split() for part in ("--set", s)] + ["--out", str(out)]
    chance, kills = random.Random(0), 0
    for attempt in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            # Wait for the run's first new shard: kills fall on work, not on imports.
            had, started = len(finished_units(out)), time.monotonic()
            while process.poll() is None and len(finished_units(out)) == had:
                assert time.monotonic() - started < 120
                time.sleep(0.01)
            if attempt < 3:
                process.wait(chance.uniform(0, 0.1))
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 1
    assert files(out) == files(caches["tiny-shared"])


def test_nan_stops_the_run_and_keeps_finished_shards(random_teacher: Path, tmp_path: Path) -> None:
    """A row of NaN in the embedding, for a token that only the third example has."""
    broken = Path(shutil.copytree(random_teacher, tmp_path / "m"))
    tensors = load_file(broken / "model.safetensors")
    third, first, second = Tokenizer.load(broken).encode(["zebra quartz", "x = 1", "y = 2"])
    rare = (set(third) - {*first, *second}).pop()
    tensors["model.embed_tokens.weight"][rare] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    data = write_chats(tmp_path / "d.jsonl", ["x = 1", "y = 2", "zebra quartz " * 6])
    changes: Any = {"data": data, "shard_examples": 1, "noise": {"draws": 1, "seed": 1}}
    chunks = {"targets": {"signals": ["chunks"]}, **changes}
    cases = ("tiny-cross", chunks, [Unit(0, 0), Unit(0, 1)]), ("tiny-shared", changes, [])
    for teacher, own, finished in cases:
        config = small_cache_config(teacher, broken, tmp_path / teacher, **own)
        with pytest.raises(TideError):
            build_cache(config)
        assert finished_units(config.out) == finished


def test_a_lost_manifest(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """It is made again from the shards."""
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))

    def config(**changes: Any) -> Any:
        return small_cache_config("tiny-shared", random_teacher, cache, **changes)

    (cache / "manifest.json").write_text("{")
    with pytest.raises(TideError, match=r"manifest\.json"):
        build_cache(config())
    (cache / "manifest.json").unlink()
    with pytest.raises(TideError, match=r"part-00000\.parquet"):
        build_cache(config(targets={"k": 9, "rank": 6, "pilot": 200}))
    report = build_cache(config(noise={"draws": 1}))
    assert (report.computed, report.kept) == (0, 6)
    assert load_manifest(cache) == load_manifest(caches["tiny-shared"])


def test_one_pass_and_lists_of_adaptive_length(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"k": 64, "mass": 0.03, "signals": ["topk"]}
    changes = {"noise": {"draws": 1, "comp_demo": False}, "targets": targets}
    build_cache(small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes))
    sizes = []
    for row in rows_in(tmp_path / "c", Unit(0, 0)):
        assert not row.split.any() and row.chunk_logp is None
        assert row.topk_sizes is not None and row.topk_ids is not None
        assert row.topk_sizes.sum() == row.topk_ids.size
        sizes += row.topk_sizes.tolist()
    assert min(sizes) < 64
