"""A cache in an object store: s3://, gs://, hf:// or any that fsspec knows, or a path.

Such stores have no rename, so a file counts only once its marker is there: `NAME.ok`, which holds its size and SHA-256
and is written after it. Killed between the two, the next run writes the file again. The manifest comes last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from tqdm import tqdm

from shared.atomic import write_bytes
from shared.errors import TideError
from shared.ledger import LEDGER, Entry, Ledger, load_ledger, save_ledger
from shared.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.shards import Unit, finished_units, read_table
from shared.vocabulary import TABLES, has_tables

_MARKER = ".ok"
_ENTRY = [field.name for field in dataclasses.fields(Entry)]
_ERRORS = (OSError, ValueError, pa.ArrowException)


def is_remote(place: str) -> bool:
    """Whether a path is the address of a store."""
    return "://" in place


@dataclass(frozen=True)
class Store:
    """A folder of a file system of pyarrow."""

    files: Any
    root: str
    url: str

    @classmethod
    def open(cls, url: str) -> Store:
        """TideError where the address cannot be understood, or what it needs is not installed."""
        try:
            if url.startswith("hf://"):
                from huggingface_hub import HfFileSystem

                return cls(pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), url.removeprefix("hf://"), url)
            files, root = pafs.FileSystem.from_uri(url if is_remote(url) else Path(url).absolute().as_uri())
        except (pa.ArrowException, ImportError, OSError, ValueError) as error:
            raise TideError(
                f"the store {url} cannot be opened: {error}",
                expected="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, hf://datasets/NAME or a path",
                fix="check the address and the credentials (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, … in the environment)",
            ) from error
        return cls(files, root.rstrip("/"), url)

    def get(self, name: str) -> bytes:
        """A file's content. TideError where it is missing, or not what its marker says."""
        marker = self._marker(name)
        content = self.read(name)
        if marker is None or marker["sha256"] != hashlib.sha256(content).hexdigest():
            raise TideError(
                f"{self.url}/{name} is not what its marker says", fix="delete it and its marker, and push it again"
            )
        return content

    def read(self, name: str) -> bytes:
        """A file's content, whatever its marker says. TideError where it cannot be read."""
        try:
            with self.files.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except _ERRORS as error:
            raise self._failed(f"{name} cannot be read", error) from error

    def bring(self, cache: Path) -> None:
        """All of a finished cache but its shards. TideError where the store holds none, or `cache` is another."""
        there = (cache / LEDGER).exists() and (cache / MANIFEST).exists()
        if there and self._same(cache) == (cache / MANIFEST).read_bytes():
            return  # else it has grown since
        wanted = [name for name in self.names() if not name.endswith(".parquet") or name.startswith(f"{TABLES}/")]
        if MANIFEST not in wanted:
            raise TideError(f"{self.url} is no cache: it has no {MANIFEST}", expected="a cache from `tide push`")
        for name in [*(n for n in wanted if n != MANIFEST), LEDGER, MANIFEST]:
            write_bytes(cache / name, self.get(name))

    def _same(self, cache: Path) -> bytes:
        """The store's manifest. TideError where `cache` has another's."""
        content = self.get(MANIFEST)
        if (cache / MANIFEST).exists():
            check_fingerprint(
                cache, load_manifest(cache), json.loads(content)["fingerprint"], f"bring it up to {self.url}"
            )
        return content

    def put(self, name: str, content: bytes, facts: dict[str, Any] | None = None) -> None:
        """Write a file, then its marker; nothing where the marker says that it is there already."""
        digest = hashlib.sha256(content).hexdigest()
        old = self._marker(name)
        if old is not None and old["sha256"] == digest:
            return
        marker = json.dumps({**(facts or {}), "bytes": len(content), "sha256": digest}).encode()
        try:
            if old is not None:  # from now on the file is not what the old marker says
                self.files.delete_file(f"{self.root}/{name}{_MARKER}")
            self._write(name, content)
            self._write(name + _MARKER, marker)
        except _ERRORS as error:
            raise self._failed(f"{name} cannot be written", error) from error

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        if isinstance(self.files, pafs.LocalFileSystem):
            self.files.create_dir(path.rpartition("/")[0], recursive=True)
        with self.files.open_output_stream(path) as stream:
            stream.write(content)

    def _marker(self, name: str) -> dict[str, Any] | None:
        try:
            with self.files.open_input_stream(f"{self.root}/{name}{_MARKER}") as stream:
                found = json.loads(stream.read())
        except FileNotFoundError:
            return None
        except _ERRORS as error:
            raise self._failed(f"{name}{_MARKER} cannot be read", error) from error
        return found

    def _failed(self, what: str, error: Exception) -> TideError:
        return TideError(
            f"{self.url}: {what}: {error}",
            fix="check the address, the credentials and the network, and run the same command again; "
            "what is finished is kept",
        )

    def names(self, folder: str = "") -> list[str]:
        """Files that are there (in `folder`), with their markers, in order."""
        place = f"{self.root}/{folder}".rstrip("/")
        try:
            found = self.files.get_file_info(pafs.FileSelector(place, recursive=True, allow_not_found=True))
        except _ERRORS as error:
            raise self._failed("it cannot be listed", error) from error
        paths = {info.path.removeprefix(self.root).lstrip("/") for info in found if info.type == pafs.FileType.File}
        return sorted(name for name in paths if name + _MARKER in paths)

    def units(self) -> list[Unit]:
        """Units whose shards are there."""
        units = (Unit.at(Path(name)) for name in self.names())
        return [unit for unit in units if unit is not None]

    def bring_manifest(self, cache: Path) -> None:
        """The store's manifest, and its tables, to a folder that has none: a run goes on with the store's cache."""
        if not (cache / MANIFEST).exists() and MANIFEST in self.names():
            self.bring_tables(cache)
            write_bytes(cache / MANIFEST, self.get(MANIFEST))

    def bring_tables(self, cache: Path) -> None:
        """The store's tables, where it has them and `cache` does not; the one that says that all are there is last."""
        if not has_tables(cache):
            for name in sorted(name for name in self.names(TABLES) if name.startswith(f"{TABLES}/")):
                write_bytes(cache / name, self.get(name))

    def begin(self, cache: Path, manifest: Manifest) -> frozenset[Unit]:
        """Units that need not be computed. TideError where the store holds another cache."""
        names = self.names()
        if MANIFEST in names:
            found = Manifest(**{k: v for k, v in json.loads(self.get(MANIFEST)).items() if k != "checksum"})
            check_fingerprint(Path(self.url), found, manifest.fingerprint, "go on with it")
        small = [*sorted(cache.glob("*_tokenizer/*")), *sorted(cache.glob(f"{TABLES}/*.parquet"))]
        for path in [*small, cache / MANIFEST]:
            self.put(path.relative_to(cache).as_posix(), path.read_bytes())
        return frozenset(self.units())

    def put_shard(self, cache: Path, unit: Unit, entry: Entry | None = None) -> None:
        """Copy a finished shard; its marker says all that the ledger does."""
        path = unit.path(cache)
        content = path.read_bytes()
        if entry is None:
            entry = Entry.of(content, read_table(path, None, content).counts)
        entry.check(path, content)
        self.put(path.relative_to(cache).as_posix(), content, dataclasses.asdict(entry))

    def push(self, cache: Path, manifest: Manifest, ledger: Ledger) -> int:
        """Copy everything of `cache` that the store lacks; how many shards there are now. Once all are there the ledger
        follows. TideError where a shard is not what the ledger says.
        """
        there = self.begin(cache, manifest)
        for unit in tqdm([u for u in finished_units(cache) if u not in there], unit="shard", desc="push"):
            self.put_shard(cache, unit, ledger.get(unit))
        units = self.units()
        if set(units) == set(manifest.units()):
            self._put_ledger(cache, manifest, ledger, units)
        return len(units)

    def _put_ledger(self, cache: Path, manifest: Manifest, ledger: Ledger, units: list[Unit]) -> None:
        """The ledger of all shards; those that another process wrote are known from their markers."""
        whole: Ledger = {}
        for unit in units:
            known = ledger.get(unit)
            marker = None if known is not None else self._marker(unit.path(Path()).as_posix())
            whole[unit] = known if known is not None else Entry(**{k: (marker or {})[k] for k in _ENTRY})
        with tempfile.TemporaryDirectory(prefix="tide-ledger-") as folder:
            save_ledger(Path(folder), manifest, whole)
            self.put(LEDGER, (Path(folder) / LEDGER).read_bytes())

    def pull(self, cache: Path) -> int:
        """Copy everything that `cache` lacks; how many files. TideError where the store holds no cache, or another."""
        names = self.names()
        if MANIFEST not in names:
            raise TideError(f"{self.url} is no cache: it has no {MANIFEST}", expected="a cache from `tide push`")
        content = self._same(cache)
        missing = [name for name in names if name != MANIFEST and not (cache / name).exists()]
        ledger = self._ledger(content) if LEDGER in names else {}
        lost = [unit for unit in ledger if unit.path(Path()).as_posix() not in names]
        if lost:
            raise TideError(
                f"{self.url} lacks {len(lost)} shards that its ledger names, the first is {lost[0].path(Path())}",
                fix="push the cache again from where it was made",
            )
        for name in tqdm(missing, unit="file", desc="pull"):
            found, unit = self.get(name), Unit.at(Path(name))
            if unit in ledger:
                ledger[unit].check(Path(self.url) / name, found)
            write_bytes(cache / name, found)
        write_bytes(cache / MANIFEST, content)
        return len(missing)

    def _ledger(self, manifest: bytes) -> Ledger:
        """The ledger of the store's cache."""
        with tempfile.TemporaryDirectory(prefix="tide-ledger-") as folder:
            write_bytes(Path(folder) / LEDGER, self.get(LEDGER))
            write_bytes(Path(folder) / MANIFEST, manifest)
            return load_ledger(Path(folder), load_manifest(Path(folder)))
