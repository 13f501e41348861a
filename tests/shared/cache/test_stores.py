from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shared.cache.ledger import settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units
from shared.cache.stores import Store
from shared.system.errors import TideError
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's own


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an empty bucket of a local S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="caches")
        client.close()
        yield "s3://caches"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address below which nothing is yet."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def push(store: Store, cache: Path) -> int:
    manifest = load_manifest(cache)
    return store.push(cache, manifest, settle_ledger(cache, manifest))


def test_push_and_pull_give_the_cache_back(
    caches: dict[str, Path], tmp_path: Path, store: str
) -> None:
    source = caches["tiny-cross"]
    there = Store.open(store)
    assert push(there, source) == 6
    there.pull(tmp_path / "again")
    assert files(tmp_path / "again") == files(source)
    Unit(0, 1).path(tmp_path / "again").unlink()
    assert there.pull(tmp_path / "again") == 1
    with pytest.raises(TideError, match=r"other settings[\s\S]*teacher.name"):
        push(there, caches["tiny-shared"])
    with pytest.raises(TideError, match="other settings"):
        there.pull(Path(shutil.copytree(caches["tiny-shared"], tmp_path / "other")))


def test_a_file_without_its_marker_is_not_there(
    caches: dict[str, Path], tmp_path: Path, store: str
) -> None:
    """Killed between file and marker, or while a file is written."""
    source, there = caches["tiny-cross"], Store.open(store)
    push(there, source)
    name = "draw=01/part-00001.parquet"
    there.files.delete_file(f"{there.root}/{name}.ok")
    there._write(name, b"half of i")
    assert Unit(1, 1) not in there.units()
    with pytest.raises(TideError, match="not what its marker says"):
        there.get(name)
    assert push(there, source) == 6
    there._write(name, b"spoiled")
    with pytest.raises(TideError, match=r"not what the cache's ledger says[\s\S]*copy it again"):
        there.pull(tmp_path / "again")


def test_ranks_without_a_common_disk_share_the_work_through_the_store(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, store: str
) -> None:
    for rank in (0, 1):
        changes = {"rank": rank, "world": 2, "store": store}
        report = build_cache(
            small_cache_config("tiny-cross", random_teacher, tmp_path / f"host-{rank}", **changes)
        )
        assert (report.computed, report.kept, report.elsewhere) == (3, 0, 3)
    Store.open(store).pull(tmp_path / "whole")
    assert files(tmp_path / "whole") == files(caches["tiny-cross"])
    # Another host goes on where the store is: nothing is left to do.
    report = build_cache(
        small_cache_config("tiny-cross", random_teacher, tmp_path / "third", store=store)
    )
    assert (report.computed, report.elsewhere) == (0, 6)
    with pytest.raises(TideError, match="other settings"):
        build_cache(
            small_cache_config("tiny-shared", random_teacher, tmp_path / "fourth", store=store)
        )
    assert finished_units(tmp_path / "fourth") == []


@pytest.mark.parametrize("url", ["nope://x/y", "s3://", "hf://not a name"])
def test_an_address_that_cannot_be_used_is_explained(url: str, tmp_path: Path, s3: str) -> None:
    with pytest.raises(TideError, match=r"fix: check the (address|network)|no cache"):
        Store.open(url).pull(tmp_path / "c")
