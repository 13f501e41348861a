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
from shared.system.files import TideError
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's own
SHARD = "shards/draw=01/part-00001.parquet"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an empty bucket of a local S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    settings |= {"ENDPOINT_URL": f"http://{host}:{port}", "EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="caches")
        client.close()
        yield "s3://caches"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> Store:
    """A place in which nothing is yet."""
    return Store.open(str(tmp_path / "s") if request.param == "folder" else f"{s3}/{tmp_path.name}")


def push(store: Store, cache: Path) -> int:
    manifest = load_manifest(cache)
    return store.push(cache, manifest, settle_ledger(cache, manifest))


def test_push_and_pull_give_the_cache_back(
    caches: dict[str, Path], tmp_path: Path, store: Store
) -> None:
    source, again = caches["tiny-cross"], tmp_path / "again"
    assert push(store, source) == 6
    store.pull(again)
    assert files(again) == files(source)
    Unit(0, 1).path(again).unlink()
    assert store.pull(again) == 1
    with pytest.raises(TideError):
        push(store, caches["tiny-shared"])
    with pytest.raises(TideError):
        store.pull(Path(shutil.copytree(caches["tiny-shared"], tmp_path / "other")))


def test_what_was_lost_cut_or_replaced_is_said_by_pull(
    caches: dict[str, Path], tmp_path: Path, store: Store
) -> None:
    source = caches["tiny-cross"]
    push(store, source)
    whole = store.read(SHARD)
    for damaged in (whole[:-7], whole[:-7] + b"another", None):
        if damaged is None:
            store.files.delete_file(f"{store.root}/{SHARD}")
        else:
            store.put(SHARD, damaged)
        with pytest.raises(TideError, match=SHARD):
            store.pull(tmp_path / "pulled")
    # What is not there, or of another length, is written again.
    assert push(store, source) == 6
    store.put(SHARD, whole[:-7])
    for name in ("student_tokenizer/tokenizer.json", "ledger.parquet"):
        store.files.delete_file(f"{store.root}/{name}")
    assert push(store, source) == 6
    store.pull(tmp_path / "again")
    assert files(tmp_path / "again") == files(source)


def test_ranks_without_a_common_disk_share_the_work_through_the_store(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, store: Store
) -> None:
    def build(name: str, teacher: str = "tiny-cross", **changes: object) -> tuple[int, int, int]:
        changes["store"] = store.url
        out = tmp_path / name
        report = build_cache(small_cache_config(teacher, random_teacher, out, **changes))
        return report.computed, report.kept, report.elsewhere

    for rank in (0, 1):
        assert build(f"host-{rank}", rank=rank, world=2) == (3, 0, 3)
    store.pull(tmp_path / "whole")
    assert files(tmp_path / "whole") == files(caches["tiny-cross"])
    # Another host goes on where the store is: nothing is left to do.
    assert build("third") == (0, 0, 6)
    with pytest.raises(TideError):
        build("fourth", "tiny-shared")
    assert finished_units(tmp_path / "fourth") == []


def test_files_of_others_are_left_alone_and_names_that_lead_elsewhere_refused(
    caches: dict[str, Path], tmp_path: Path, s3: str
) -> None:
    for url in ("nope://x/y", "s3://"):
        with pytest.raises(TideError):
            Store.open(url).pull(tmp_path / "c")
    store = Store.open(str(tmp_path / "store"))
    for name in ("notes.txt", "shards/draw=00/part-²²²²².parquet", "tables/run.py", "x/" + SHARD):
        place = Path(store.root) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    assert push(store, caches["tiny-cross"]) == 6
    store.pull(tmp_path / "pulled")
    assert files(tmp_path / "pulled") == files(caches["tiny-cross"])
    assert not (tmp_path / "pulled" / "notes.txt").exists()
    for name in ("../x", "/etc/passwd", "shards/draw=00/../../x", "run.py", "tables/../x.parquet"):
        for use in (store.read, lambda name: store.put(name, b"x")):
            with pytest.raises(TideError):
                use(name)
