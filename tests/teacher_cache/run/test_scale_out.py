from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import finished_units
from shared.settings.build import build
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from teacher_cache.run import build as building
from teacher_cache.run.build import build_cache
from teacher_cache.run.progress import read_status
from tests.conftest import files, small_cache_config


def test_ranks_share_the_units_on_one_disk(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    for rank in range(3):
        report = build_cache(
            small_cache_config("tiny-shared", random_teacher, out, rank=rank, world=3)
        )
        assert (report.computed, report.kept) == (2, 2 * rank)
    assert files(out) == files(caches["tiny-shared"])
    status = read_status(out)
    assert (status["state"], status["ranks"], status["rows_done"]) == ("finished", 3, 48)


def test_ranks_lock_out_a_plain_run_and_their_own_twins(
    random_teacher: Path, tmp_path: Path
) -> None:
    def config(**changes: Any) -> CacheConfig:
        return small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes)

    with building._only_writer(config(rank=0, world=2)):
        for other in ({"rank": 0, "world": 2}, {}):
            with pytest.raises(TideError, match="is in use by"):
                build_cache(config(**other))
        assert build_cache(config(rank=1, world=2)).computed == 3


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(TideError, match="0 ≤ rank < world"):
        build(CacheConfig, {"rank": 2, "world": 2})


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Ray on two nodes, two CPUs each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_cluster_of_two_nodes_loses_one(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, cluster: Any
) -> None:
    """Actors run on both nodes; one node goes while units are computed; the cache is the same, to the byte."""
    import ray

    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    out = tmp_path / "c"
    engine = {"dtype": "float32", "device": "cpu", "workers": "ray", "data_parallel": 4}
    config = small_cache_config("tiny-shared", random_teacher, out, engine=engine)
    seen: list[int] = []

    def lose() -> None:
        while not finished_units(out):
            time.sleep(0.05)
        seen.append(len({node["NodeID"] for node in ray.nodes() if node["Alive"]}))
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    report = build_cache(config)
    thread.join()
    assert seen == [2]
    assert report.computed == 6
    assert files(out) == files(caches["tiny-shared"])
    status = read_status(out)
    assert status["state"] == "finished"
    print(f"actors lost and replaced: {status['failures']}")


def test_ray_that_is_not_there_is_explained(
    random_teacher: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *_: None if name == "ray" else object()
    )
    engine = {"dtype": "float32", "device": "cpu", "workers": "ray"}
    with pytest.raises(TideError, match=r"Ray is not installed[\s\S]*pip install"):
        build_cache(
            small_cache_config("tiny-shared", random_teacher, tmp_path / "c", engine=engine)
        )
