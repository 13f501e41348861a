"""vLLM against transformers on random checkpoints in the hub's layouts. Run by `make test-vllm`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from shared.cache.shards import finished_units
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.settings.config import EngineConfig
from shared.system.files import TideError
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.engines.vllm_engine import VllmEngine
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.method import Request, Scores, TargetSpec
from teacher_cache.run.build import build_cache
from teacher_cache.teachers.registry import TeacherEntry
from tests.conftest import TEACHER_TOKENIZER, small_cache_config
from tests.hub_layouts import ARCHITECTURE_OF, wide_checkpoint
from tests.reading import random_tables

pytest.importorskip("vllm", reason="`make test-vllm` installs vLLM's CPU build and runs this file")
pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own warnings

SPEC = TargetSpec(8, 1.0, (1.0, 2.0))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM inside this process, which starts in a second; its groups are taken down afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    cleanup_dist_env_and_memory()


def entry(architecture: Any, **more: Any) -> TeacherEntry:
    own = {"mask_id": 159, "student_tokens": False, "length": 512, "student": "x", **more}
    return TeacherEntry(model="x", architecture=architecture, **own)


def mixed_requests() -> list[Request]:
    random, requests = np.random.default_rng(0), []
    for length in (5, 17, 300, 33, 64, 2, 129):
        ids = random.integers(0, 150, length, np.int32)
        some = random.choice(np.arange(1, length), max(1, length // 3), replace=False)
        read = np.sort(some).astype(np.int32)
        gold = ids[read]
        ids[read] = 159
        requests.append(Request(ids, read, gold))
    return requests


def furthest(a: list[Scores], b: list[Scores]) -> float:
    """The largest difference in any value, by rank: ids may change places at near ties."""
    pairs = [(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x if n != "topk_ids"]
    return max(float(np.abs(x - y).max()) for x, y in pairs)


@pytest.mark.parametrize("name", list(ARCHITECTURE_OF))
@pytest.mark.usefixtures("in_process")
def test_float32_values_are_those_of_transformers(golden: Path, tmp_path: Path, name: str) -> None:
    from teacher_cache.engines.vllm_engine_models import ScorePooler

    architecture, requests = ARCHITECTURE_OF[name], mixed_requests()
    checkpoint = open_checkpoint(str(wide_checkpoint(golden, name, tmp_path / name, seed=1)))
    teacher = entry(architecture, shift=name == "dream")
    # ids that the student does not share never enter the top-k
    shared = np.arange(160) < 120 if name == "wedlm" else None
    sizes: Any = {"tokens_per_batch": 512, "head_rows": 100}
    settings = EngineConfig(type="vllm", device="cpu", dtype="float32", **sizes)
    engine = VllmEngine(checkpoint, teacher, SPEC, settings, 512, shared)
    before = ScorePooler.rows_run
    scores = engine.score(requests)
    read = sum(len(request.read) for request in requests)
    assert ScorePooler.rows_run - before == read  # and nowhere else
    model = load_model(checkpoint, architecture, torch.float32)
    more: Any = {"shared_ids": shared, "shift": teacher.shift}
    reference = TransformersEngine(model, teacher.attention, SPEC, **more)
    assert furthest(scores, reference.score(requests)) < 1e-4
    states = [one.hidden_states(requests) for one in (engine, reference)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    tables = random_tables(160, states[0].shape[1], 4, step=0.0)
    tables = replace(tables, shared=tables.shared if shared is None else shared)
    for one in (engine, reference):
        one.use_tables(tables)
    scores = engine.score(requests)
    assert furthest(scores, reference.score(requests)) < 1e-3
    for one in scores:
        assert one["tail_code"].shape[1] == 4
        assert shared is None or one["topk_ids"].max() < 120
    assert engine.score([]) == []
    with pytest.raises(TideError):
        engine.score([Request(np.zeros(600, np.int32), np.ones(1, np.int32), np.ones(1, np.int32))])


@pytest.mark.usefixtures("in_process")
def test_bfloat16_deviates_no_more_than_transformers_does(golden: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(wide_checkpoint(golden, "llada", tmp_path / "llada", seed=2)))
    teacher, requests = entry("llada"), mixed_requests()
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(checkpoint, "llada", dtype)
        values.append(TransformersEngine(model, teacher.attention, SPEC).score(requests))
    settings = EngineConfig(type="vllm", device="cpu", dtype="bfloat16")
    values.append(VllmEngine(checkpoint, teacher, SPEC, settings, 512).score(requests))
    exact, theirs, ours = (np.concatenate([s["logsumexp"] for s in scores]) for scores in values)
    assert 0 < np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).max() < 2 * np.abs(theirs - exact).max()


def test_a_checkpoint_that_does_not_fit_is_refused(golden: Path, tmp_path: Path) -> None:
    folder = wide_checkpoint(golden, "llada", tmp_path / "llada")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"n_layers": 3', '"n_layers": 2'))
    settings = EngineConfig(type="vllm", device="cpu")
    with pytest.raises(TideError):
        VllmEngine(open_checkpoint(str(folder)), entry("llada"), SPEC, settings, 64)


def test_killed_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's core process is killed; two workers finish; transformers agrees."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    out = tmp_path / "vllm"

    def config(**engine: Any) -> Any:
        engine |= {"dtype": "float32", "device": "cpu", "tokens_per_batch": 1024}
        own: Any = {"shard_examples": 4, "engine": engine}
        return small_cache_config("tiny-cross", TEACHER_TOKENIZER, out, **own)

    def kill_core() -> None:
        while not finished_units(out):
            time.sleep(0.001)
        for child in psutil.Process().children(recursive=True):
            if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_core)
    thread.start()
    with pytest.raises(TideError):
        build_cache(config(type="vllm"))
    thread.join()
    kept = len(finished_units(out))
    assert 0 < kept < 12
    report = build_cache(config(type="vllm", data_parallel=2))
    assert (report.kept, report.computed) == (kept, 12 - kept)
    verified = verify_cache(config(type="transformers"), 200)
    assert verified.rows == 48 and 0 < verified.largest < 1e-4


def test_tensor_parallel(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = wide_checkpoint(golden, "llada2_moe", tmp_path / "moe", seed=3)
    checkpoint, requests, teacher = open_checkpoint(str(folder)), mixed_requests(), "llada2_moe"
    settings = EngineConfig(type="vllm", device="cpu", dtype="float32", tensor_parallel=2)
    with closing(VllmEngine(checkpoint, entry(teacher), SPEC, settings, 512)) as engine:
        scores = engine.score(requests)
    model = load_model(checkpoint, teacher, torch.float32)
    reference = TransformersEngine(model, entry(teacher).attention, SPEC)
    assert furthest(scores, reference.score(requests)) < 1e-4
