"""Classes, priors and ranks: made once before the first shard, the same for all."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.cache.manifest import load_manifest
from shared.cache.row import ranks
from shared.cache.shards import load_centroids, load_pilot, load_vocabulary
from shared.settings.config import CacheConfig
from shared.system.files import TideError
from teacher_cache.maintenance.derive import smaller
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.tables import classes_for, cluster, pilot_requests
from teacher_cache.run.work import load_engine
from tests.conftest import GOLDEN, chats_file, small_cache_config
from tests.reading import all_rows


def test_the_prior_is_the_mean_of_what_is_outside(
    caches: dict[str, Path], random_teacher: Path
) -> None:
    """Recomputed in float64 from full logits, one request at a time."""
    plan = open_or_begin(small_cache_config("tiny-shared", random_teacher, caches["tiny-shared"]))
    engine: Any = load_engine(plan)
    requests = pilot_requests(plan)
    assert [r.ids.tolist() for r in requests] == [r.ids.tolist() for r in pilot_requests(plan)]
    assert 200 <= sum(len(request.read) for request in requests) < 400
    logits = torch.cat([logits for logits, _ in engine.logits(requests)]).double()
    tables = load_vocabulary(caches["tiny-shared"])
    for i, temperature in enumerate((1.0, 2.0)):
        p = torch.softmax(logits / temperature, 1).scatter(1, logits.topk(8, 1).indices, 0.0)
        np.testing.assert_allclose(tables.prior[i], p.mean(0), rtol=2e-3, atol=1e-9)
    count = torch.bincount(logits.topk(8, 1).indices.flatten(), minlength=4096).numpy()
    assert (np.diff(count[tables.ids_by_rank]) <= 0).all()
    assert tables.shared.all() and tables.classes == 5
    pilot = load_pilot(caches["tiny-shared"])
    assert pilot.sizes.size == len(logits) and (pilot.sizes == 8).all()


def test_a_smaller_k_follows_from_the_pilot(random_teacher: Path, tmp_path: Path) -> None:
    for k in (8, 3):
        changes = {"targets": {"k": k, "classes": 5, "pilot": 300}, "noise": {"draws": 1}}
        config = small_cache_config("tiny-shared", random_teacher, tmp_path / f"k{k}", **changes)
        build_cache(config)
    whole, classes = load_vocabulary(tmp_path / "k8"), np.arange(5, dtype=np.int32)
    cut, pilot = smaller(whole, load_pilot(tmp_path / "k8"), (1.0, 2.0), 3, classes)
    direct = load_vocabulary(tmp_path / "k3")
    np.testing.assert_allclose(cut.prior, direct.prior, rtol=1e-3, atol=1e-10)
    assert np.array_equal(cut.rank_of, direct.rank_of)
    np.testing.assert_allclose(pilot.odds, load_pilot(tmp_path / "k3").odds, atol=1e-3)
    assert load_centroids(tmp_path / "k8").shape == (5, 32)


def test_classes_hold_tokens_of_like_direction() -> None:
    torch.manual_seed(0)
    centres = torch.randn(4, 16) * 3
    own = torch.arange(200) % 4
    lengths = torch.rand(200, 1) * 9 + 0.5  # which say nothing
    rows = (centres[own] + torch.randn(200, 16) * 0.1) * lengths
    allowed = np.arange(220) < 200
    class_of, means = cluster(torch.cat([rows, torch.randn(20, 16)]), allowed, 4)
    assert (class_of[200:] == -1).all() and means.shape == (4, 16)
    for c in range(4):
        assert len(set(class_of[:200][own.numpy() == c].tolist())) == 1
    assert len(set(class_of[:200].tolist())) == 4
    with pytest.raises(TideError):
        cluster(rows, np.ones(200, bool), 300)


def test_classes_of_the_students_head_and_of_the_teachers(
    random_teacher: Path, tmp_path: Path
) -> None:
    def classes(**targets: Any) -> np.ndarray:
        changes = {"targets": {"k": 8, "classes": 5, **targets}}
        config = small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes)
        return classes_for(open_or_begin(config))[0]

    own = classes()
    embedded = "embedded:teacher_cache.teachers/tiny"
    assert not np.array_equal(own, classes(classes_from=embedded))
    assert np.array_equal(own, classes(classes_from=str(random_teacher)))
    assert (classes(classes=1) == 0).all()
    with pytest.raises(TideError):  # too few rows
        classes(classes_from=str(GOLDEN / "a2d_qwen3"))


def test_what_classes_and_priors_come_from_is_part_of_the_cache(
    random_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"

    def config(name: str = "c", seed: int = 0, **changed: Any) -> CacheConfig:
        targets = {"k": 8, "classes": 5, "pilot": 200, **changed}
        changes = {"targets": targets, "noise": {"draws": 1, "seed": seed}}
        return small_cache_config("tiny-shared", random_teacher, tmp_path / name, **changes)

    def shards() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.glob("draw=*/*")}

    build_cache(config())
    tiny = "embedded:teacher_cache.teachers/tiny"
    changes = {"classes": 4, "pilot": 201, "tail": "student", "values": "float32"}
    for name, value in {**changes, "classes_from": tiny}.items():
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
        targets = {"k": k, "classes": 5, "pilot": 200, "tables_from": other}
        changes = {"targets": targets, "data": {"source": str(chats_file()), "limit": 8}}
        return small_cache_config("tiny-shared", random_teacher, tmp_path / f"k{k}", **changes)

    build_cache(config(8))
    tables = [load_manifest(cache).fingerprint.tables for cache in (tmp_path / "k8", other)]
    assert tables[0] == tables[1]
    with pytest.raises(TideError):
        build_cache(config(7))


def test_ranks_are_an_order_of_all_ids() -> None:
    order = ranks(np.array([3, 3, 1], np.int32), np.array([0.1, 0.0, 0.3, 0.0, 0.3], np.float32))
    assert order.tolist() == [4, 1, 2, 0, 3]
