"""The linear tail: found once before the first shard, the same for all; it gives the teacher."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.cache.levels import EMPTY
from shared.cache.manifest import load_manifest
from shared.cache.shards import load_tables
from shared.cache.tail import LinearTail
from shared.models.loading import head_rows
from shared.settings.config import CacheConfig
from shared.system.files import TideError
from student_train.losses.targets import TopKTargets, teacher_log_weights
from teacher_cache.method import TailEncoder, TargetSpec, extract
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.tables import Sample, fit_tables, pilot_requests
from teacher_cache.run.work import load_engine
from tests.conftest import chats_file, small_cache_config
from tests.reading import all_rows

TEMPERATURES = (1.0, 2.0)


def test_the_tables_against_their_definition_in_float64(
    caches: dict[str, Path], random_teacher: Path
) -> None:
    run = open_or_begin(small_cache_config("tiny-shared", random_teacher, caches["tiny-shared"]))
    requests = pilot_requests(run, 200)
    again = pilot_requests(run, 200)
    assert [r.ids.tolist() for r in requests] == [r.ids.tolist() for r in again]
    hidden = load_engine(run).hidden_states(requests).double()
    assert 200 <= len(hidden) < 400
    head, n = head_rows(run.checkpoint, "llama").double(), len(hidden)
    logits = hidden @ head.T
    listed = logits.topk(8, 1).indices
    fisher, outside = torch.zeros(head.shape[1], head.shape[1]).double(), []
    for t in TEMPERATURES:
        p = torch.softmax(logits / t, 1).scatter(1, listed, 0.0)
        outside.append(p)
        for row in p:
            mean = row @ head
            information = (head * row[:, None]).T @ head - torch.outer(mean, mean) / row.sum()
            fisher += information / n / t**2 / 2
    center = hidden.mean(0)
    spread = (hidden - center).T @ (hidden - center) / n
    # The leading r eigenvalues of F·S are those of the code's covariance in the metric F.
    tables = load_tables(caches["tiny-shared"])
    variances = torch.linalg.eigvals(fisher @ spread).real.sort(descending=True).values[:6]
    encoder = torch.tensor(tables.encoder).double()
    covariance = encoder @ spread @ encoder.T
    torch.testing.assert_close(covariance.diagonal(), variances, rtol=1e-3, atol=1e-9)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * variances[0]
    np.testing.assert_allclose(tables.center, center, atol=1e-5)
    np.testing.assert_allclose(tables.mean, head @ center, atol=1e-4)
    count = torch.bincount(listed.flatten(), minlength=4096).numpy()
    assert (np.diff(count[tables.ids_by_rank]) <= 0).all() and tables.shared.all()
    # With the calibration each token has the mass outside that the teacher gives it.
    tail, calibrated = TailEncoder(tables, TEMPERATURES), []
    code = tail.code(hidden.float()) * tables.step
    for p, t, b in zip(outside, TEMPERATURES, torch.tensor(tables.calibration), strict=True):
        x = (tail.tail.at(code, t) - b).scatter(1, listed, EMPTY).double()
        given = (torch.softmax(x, 1) * p.sum(1, keepdim=True)).sum(0)
        calibrated.append(given.log() + b)
        torch.testing.assert_close(calibrated[-1], p.sum(0).log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_all_directions_give_the_whole_teacher(temperature: float) -> None:
    """Also at a temperature that is not cached. Fewer directions give less of it."""
    torch.manual_seed(0)
    hidden, head = torch.randn(400, 12) * torch.arange(1, 13) / 6, torch.randn(80, 12)
    shared = np.arange(80) != 7
    spec, gold = TargetSpec(5, 1.0, TEMPERATURES), torch.zeros(400, dtype=torch.long)
    logits, apart = (hidden @ head.T), []
    exact = torch.log_softmax(logits.double()[:, shared] / temperature, 1)
    for rank in (2, 6, 12, None):
        tables = fit_tables(Sample(hidden, head, shared, spec), rank, 0.0)
        encoder = TailEncoder(tables, TEMPERATURES)
        found: Any = extract(logits, hidden, gold, spec, torch.tensor([7]), encoder)
        kept = torch.ones_like(found["topk_ids"], dtype=torch.bool)
        level = dict(zip(TEMPERATURES, found["tail_level"].unbind(1), strict=True))
        tail = LinearTail.of(tables, TEMPERATURES)
        ids = found["topk_ids"].long()
        topk = TopKTargets(ids, found["topk_logp"], kept, found["tail_code"], level, tail)
        p = torch.log_softmax(teacher_log_weights(topk, temperature).double()[:, shared], 1)
        apart.append(float((exact.exp() * (exact - p)).sum(1).mean()))
        if rank == 12:  # but for the table in int8
            torch.testing.assert_close(p, exact, rtol=0, atol=0.2)
    assert apart[0] > apart[1] > 10 * apart[2] and apart[2] < 1e-4
    assert apart[3] < apart[1]


def test_what_tables_come_from_is_part_of_the_cache(random_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"

    def config(name: str = "c", seed: int = 0, **changed: Any) -> CacheConfig:
        targets = {"k": 8, "rank": 6, "pilot": 200, **changed}
        changes = {"targets": targets, "noise": {"draws": 1, "seed": seed}}
        return small_cache_config("tiny-shared", random_teacher, tmp_path / name, **changes)

    def shards() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.glob("shards/draw=*/*")}

    build_cache(config())
    changes = {"rank": 4, "pilot": 201, "step": 0.05, "values": "float32"}
    for name, value in changes.items():
        changed: Any = {name: value}
        with pytest.raises(TideError, match=f"targets.{name}"):
            build_cache(config(**changed))
    (out / "tables" / "vocabulary.parquet").write_bytes(b"PAR1")
    with pytest.raises(TideError, match=r"vocabulary\.parquet"):
        all_rows(out)
    shutil.rmtree(out / "tables")
    before = shards()
    assert build_cache(config()).computed == 0  # made anew, they are the same
    assert shards() == before
    build_cache(config("d", seed=7))
    shutil.copytree(tmp_path / "d" / "tables", out / "tables", dirs_exist_ok=True)
    with pytest.raises(TideError):
        all_rows(out)


def test_tables_of_another_cache_must_fit(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    other = caches["tiny-shared"]

    def config(k: int) -> CacheConfig:
        targets = {"k": k, "rank": 6, "pilot": 200, "tables_from": other}
        changes = {"targets": targets, "data": {"source": str(chats_file()), "limit": 8}}
        return small_cache_config("tiny-shared", random_teacher, tmp_path / f"k{k}", **changes)

    build_cache(config(8))
    tables = [load_manifest(cache).fingerprint.tables for cache in (tmp_path / "k8", other)]
    assert tables[0] == tables[1]
    with pytest.raises(TideError):
        build_cache(config(7))
