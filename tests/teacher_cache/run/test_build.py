from __future__ import annotations

import json
import os
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
from shared.cache.levels import half_steps
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.system.errors import TideError
from teacher_cache.run.build import build_cache
from tests.conftest import STUDENT_TOKENIZER, chats_file, small_cache_config, write_chats
from tests.reading import rows_in


def contents(cache: Path) -> dict[str, bytes]:
    found = sorted([*cache.glob("draw=*/*.parquet"), *cache.glob("tables/*.parquet")])
    return {str(p.relative_to(cache)): p.read_bytes() for p in found}


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_rows_hold_what_the_teacher_says(
    caches: dict[str, Path], random_teacher: Path, teacher: str
) -> None:
    """Chunk likelihoods and logits of a whole shard, recomputed one pass at a time from the row alone."""
    cache = caches[teacher]
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    checked = 0
    for row in rows_in(cache, Unit(1, 0)):
        ids = row.student_ids if row.teacher_ids is None else row.teacher_ids
        positions = row.masked if row.teacher_masked is None else row.teacher_masked
        logp = np.zeros(len(ids))
        for part in (False, True):
            read = positions[row.split == part]
            noised = torch.from_numpy(ids.astype(np.int64))[None].clone()
            noised[0, read] = 4095
            mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
            with torch.no_grad():
                logits = model(input_ids=noised, attention_mask=mask).logits[0].double()
            where = np.flatnonzero(row.split == part)
            np.testing.assert_allclose(
                row.logsumexp[where], torch.logsumexp(logits[read], 1), atol=0.5 / 32 + 1e-4
            )
            assert (
                row.topk_logp is not None
                and row.topk_sizes is not None
                and row.tail_odds is not None
            )
            truth = torch.log_softmax(logits[read], 1).topk(8).values.numpy().astype(np.float32)
            apart = np.abs(row.topk_logp.reshape(-1, 8)[where] - truth)
            assert (apart <= half_steps(truth, (1.0, 2.0)) + 1e-4).all()
            for i, t in enumerate((1.0, 2.0)):
                p = torch.softmax(logits[read] / t, 1).topk(8).values.sum(1)
                np.testing.assert_allclose(
                    row.tail_odds[where, i], torch.log((1 - p) / p), atol=0.5 / 256 + 1e-4
                )
            logp[read] = torch.log_softmax(logits, 1)[read, ids[read]].numpy()
        assert row.chunk_teacher is not None
        assert row.chunk_logp is not None
        expected = [logp[a:b].sum() for a, b in row.chunk_teacher]
        np.testing.assert_allclose(row.chunk_logp, expected, rtol=1e-4, atol=1e-5)
        checked += len(expected)
    assert checked > 50


def test_draw_folders_hold_their_draw_and_every_example_once(caches: dict[str, Path]) -> None:
    cache = caches["tiny-cross"]
    assert len(finished_units(cache)) == 6
    ids = {}
    for draw in (0, 1):
        rows = [r for part in range(3) for r in rows_in(cache, Unit(draw, part))]
        assert {r.draw for r in rows} == {draw}
        ids[draw] = [r.example_id for r in rows]
        assert len(set(ids[draw])) == len(ids[draw]) > 10
    assert ids[0] == ids[1]


def test_a_second_run_computes_nothing_and_more_draws_only_the_new_ones(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    before = contents(cache)
    report = build_cache(small_cache_config("tiny-cross", random_teacher, cache))
    assert (report.computed, report.kept) == (0, 6)
    grown = build_cache(small_cache_config("tiny-cross", random_teacher, cache, noise={"draws": 3}))
    assert (grown.computed, grown.kept) == (3, 6)
    assert load_manifest(cache).draws == 3
    after = contents(cache)
    assert {k: after[k] for k in before} == before
    again = build_cache(
        small_cache_config("tiny-cross", random_teacher, cache)
    )  # fewer draws shrink nothing
    assert (again.computed, again.kept) == (0, 9)


def test_a_lost_shard_is_computed_again_bit_for_bit(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    before = contents(cache)
    Unit(1, 1).path(cache).unlink()
    half = cache / "draw=01" / ".part-00001.parquet.host-77-0.tide-tmp"
    half.write_bytes(b"half a shard")
    own = cache / "draw=01" / "chapter.tmp"  # not ours
    own.write_bytes(b"a thesis")
    assert build_cache(small_cache_config("tiny-shared", random_teacher, cache)).computed == 1
    assert contents(cache) == before
    assert not half.exists() and own.exists()


@pytest.mark.faults("kill -9 at random moments")
def test_killed_at_random_moments_and_restarted_the_cache_is_the_same(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    """kill -9, again and again, until a run gets through."""
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "cache",
        "--config",
        str(packaged_recipe("empty")),
        "--teacher",
        "tiny-shared",
        "--model",
        str(random_teacher),
    ]
    settings = ["shard_examples=8", f"data.source={chats_file()}", "data.limit=24", "lengths.student=128",
                "lengths.teacher=128", "targets.k=8", "targets.classes=5", "targets.pilot=200", "engine.device=cpu",
                "engine.dtype=float32"]  # fmt: skip
    command += [part for s in settings for part in ("--set", s)] + ["--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    chance = random.Random(0)
    kills = 0
    for attempt in range(12):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            started, had = time.monotonic(), len(finished_units(out))
            # Wait for the run's first new shard, then a random moment more: kills fall on work, not on imports.
            while (
                process.poll() is None
                and len(finished_units(out)) == had
                and time.monotonic() - started < 120
            ):
                time.sleep(0.01)
            if attempt < 4:
                process.wait(chance.uniform(0, 0.1))
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 1
    assert contents(out) == contents(caches["tiny-shared"])


def refused(message: str, config: Any) -> None:
    with pytest.raises(TideError, match=message):
        build_cache(config)


def test_other_settings_are_refused_with_a_diff_and_touch_nothing(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    before = contents(cache)

    def config(**changes: Any) -> Any:
        return small_cache_config("tiny-shared", random_teacher, cache, **changes)

    refused(r"targets.k: 8 → 4", config(targets={"k": 4}))
    refused(r"noise.seed: 0 → 5", config(noise={"seed": 5}))
    refused(
        r"data.content: [\s\S]*data.examples: 24 → 20",
        config(data={"source": str(chats_file()), "limit": 20}),
    )
    refused(r'engine.dtype: "float32" → "float16"', config(engine={"dtype": "float16"}))
    other = Path(shutil.copytree(random_teacher, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {k: v + 1e-3 for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"}
    )
    refused("teacher.weights: ", small_cache_config("tiny-shared", other, cache))
    assert contents(cache) == before


def test_bad_input_is_refused_before_the_teacher_is_loaded(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "teacher_cache.run.build.load_engine", lambda _plan: pytest.fail("the teacher was loaded")
    )

    def config(teacher: str = "tiny-shared", model: Path = random_teacher, **changes: Any) -> Any:
        return small_cache_config(teacher, model, tmp_path / "c", **changes)

    refused("unknown teacher 'tiny'", config("tiny"))
    refused(
        r"targets.k is 4097, but the teacher tiny-shared has 4096 logits",
        config(targets={"k": 4097}),
    )
    refused("has no examples", config(data={"source": str(empty_file(tmp_path))}))
    refused("differ in .* tokens", config(student_tokenizer=str(STUDENT_TOKENIZER)))
    refused(
        "would read 640 tokens, but knows 512", config(lengths={"student": 640, "teacher": 640})
    )
    edited = Path(shutil.copytree(random_teacher, tmp_path / "m"))
    values = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**values, "mask_token_id": 7}))
    refused(
        r"has mask_token_id 7 \('\('\), its tokenizer names '<\|mask\|>' \(4095\)",
        config(model=edited),
    )
    (edited / "config.json").write_text(json.dumps({**values, "vocab_size": 4090}))
    refused("tokenizer has 4096 tokens, its embedding 4090", config(model=edited))


def empty_file(folder: Path) -> Path:
    (folder / "empty.jsonl").write_text("\n")
    return folder / "empty.jsonl"


def test_data_whose_prompts_never_fit(random_teacher: Path, tmp_path: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": "word " * 400},
                {"role": "assistant", "content": "a"},
            ]
        }
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps(chats[0]) + "\n")
    data = {"source": str(tmp_path / "d.jsonl")}
    refused(
        "no example of .* fits",
        small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=data),
    )


def test_a_teacher_that_returns_nan_stops_the_run_and_keeps_finished_shards(
    random_teacher: Path, tmp_path: Path
) -> None:
    """A row of NaN in the embedding, for a token that only the third example has. Where there is a pilot sample, it
    meets the token there.
    """
    broken = Path(shutil.copytree(random_teacher, tmp_path / "m"))
    tensors = load_file(broken / "model.safetensors")
    from shared.text.tokenizers import Tokenizer

    tokenizer = Tokenizer.load(broken)
    rare = (
        set(tokenizer.encode(["zebra quartz"])[0]) - set(tokenizer.encode(["x = 1", "y = 2"])[0])
    ).pop()
    tensors["model.embed_tokens.weight"][rare] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    data = write_chats(tmp_path / "d.jsonl", ["x = 1", "y = 2", "zebra quartz " * 6])
    noise = {"draws": 1, "seed": 1}
    changes: dict[str, Any] = {"data": data, "shard_examples": 1, "noise": noise}
    config = small_cache_config(
        "tiny-cross", broken, tmp_path / "c", targets={"signals": ["chunks"]}, **changes
    )
    refused(r"the teacher returned \d+ non-finite rows", config)
    assert finished_units(tmp_path / "c") == [Unit(0, 0), Unit(0, 1)]
    config = small_cache_config("tiny-shared", broken, tmp_path / "d", **changes)
    refused(r"non-finite rows of \d+ for example of the pilot sample", config)


def test_a_full_disk_stops_the_run_and_keeps_finished_shards(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third shard's temporary file is a link to /dev/full, which answers writes as a full disk does."""
    from shared.system import atomic

    config = small_cache_config("tiny-shared", random_teacher, tmp_path / "c")
    target = Unit(0, 2).path(config.out)
    target.parent.mkdir(parents=True)
    monkeypatch.setattr("teacher_cache.run.build.remove_leftovers", lambda _folder: None)
    full = target.with_name("full")
    full.symlink_to("/dev/full")
    name = atomic.temporary_path
    monkeypatch.setattr(atomic, "temporary_path", lambda path: full if path == target else name(path))
    refused("the disk is full", config)
    finished = finished_units(config.out)  # what was scored while the write failed is kept too
    assert finished[:2] == [Unit(0, 0), Unit(0, 1)]
    assert Unit(0, 2) not in finished
    monkeypatch.undo()
    assert build_cache(config).computed == 6 - len(finished)


def test_two_writers_on_one_cache(random_teacher: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "c").mkdir()
    with (tmp_path / "c" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        refused("is in use by", small_cache_config("tiny-shared", random_teacher, tmp_path / "c"))


def test_a_damaged_manifest(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    (cache / "manifest.json").write_text("{")
    refused("is damaged", small_cache_config("tiny-shared", random_teacher, cache))
    (cache / "manifest.json").unlink()
    other = {"k": 9, "classes": 5, "pilot": 200}
    refused(
        "belongs to another cache",
        small_cache_config("tiny-shared", random_teacher, cache, targets=other),
    )
    report = build_cache(
        small_cache_config("tiny-shared", random_teacher, cache, noise={"draws": 1})
    )
    assert (report.computed, report.kept) == (0, 6)
    assert load_manifest(cache) == load_manifest(caches["tiny-shared"])


def test_a_manifest_that_says_something_else_is_damaged(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace('"mask_id": 4095', '"mask_id": 4094', 1))
    with pytest.raises(TideError, match="checksum does not hold"):
        load_manifest(cache)


def test_without_comp_demo_all_is_masked_in_one_pass(random_teacher: Path, tmp_path: Path) -> None:
    config = small_cache_config(
        "tiny-shared", random_teacher, tmp_path / "c", noise={"draws": 1, "comp_demo": False}
    )
    build_cache(config)
    rows = rows_in(config.out, Unit(0, 0))
    assert not any(row.split.any() for row in rows)


def test_adaptive_length_keeps_fewer_logits(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"k": 64, "mass": 0.03, "signals": ["topk"]}
    config = small_cache_config(
        "tiny-shared", random_teacher, tmp_path / "c", noise={"draws": 1}, targets=targets
    )
    build_cache(config)
    rows = [r for r in rows_in(config.out, Unit(0, 0)) if r.masked.size]
    sizes = np.concatenate([r.topk_sizes for r in rows if r.topk_sizes is not None])
    assert sizes.min() < 64
    for row in rows:
        assert row.topk_sizes is not None
        assert row.topk_ids is not None
        assert row.topk_sizes.sum() == row.topk_ids.size
        assert row.chunk_logp is None
