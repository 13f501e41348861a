"""A cache in an object store: s3://, gs://, hf:// or any that fsspec knows, or a path.

Such stores have no rename, but a file is there whole or not at all; the ledger has the SHA-256 of
every shard. The manifest is written first, so that runs can go on, and the ledger last.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from tqdm.auto import tqdm

from shared.cache.ledger import LEDGER, Ledger, entry_of, load_ledger, save_ledger
from shared.cache.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.cache.shards import TABLES, Unit, finished_units, has_tables
from shared.system.files import TideError, read_bytes, refuse_odd, write_bytes

_ERRORS = (OSError, ValueError, pa.ArrowException, ImportError)


def belongs_to_cache(name: str) -> bool:
    """Whether a cache has files of that name: manifest, ledger, tokenizers, tables, shards."""
    path = PurePosixPath(name)
    if name in (MANIFEST, LEDGER) or (len(path.parts) == 3 and Unit.at(Path(name)) is not None):
        return True
    if name != str(path) or len(path.parts) != 2 or ".." in path.parts or path.name[0] == ".":
        return False
    kinds = {"student_tokenizer": "", "teacher_tokenizer": "", TABLES: ".parquet"}
    folder = path.parts[0]
    return folder in kinds and name.endswith(kinds[folder])


def small_files(cache: Path) -> list[Path]:
    """The files of tokenizers and tables, which are passed on with a cache."""
    found = [p for p in cache.glob("*/*") if p.is_file()]
    return sorted(p for p in found if belongs_to_cache(p.relative_to(cache).as_posix()))


def _name(unit: Unit) -> str:
    return unit.path(Path()).as_posix()


@dataclass(frozen=True)
class Store:
    """A folder of a file system of pyarrow. Only names of a cache's files are read or written."""

    files: Any
    root: str
    url: str

    @classmethod
    def open(cls, url: str) -> "Store":
        """TideError where the address cannot be understood, or what it needs is not installed."""
        try:
            address = url if "://" in url else str(Path(url).absolute())
            files, root = pafs.FileSystem.from_uri(address)
        except _ERRORS as error:
            raise TideError(
                f"the store {url} cannot be opened: {error}",
                expected="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, hf://datasets/NAME or a path",
                fix="check the address and the credentials (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)",
            ) from error
        return cls(files, root.rstrip("/"), url)

    @contextmanager
    def _file(self, name: str) -> Iterator[str]:
        """The path of a file in the store, for a block whose errors are explained."""
        try:
            if name and not belongs_to_cache(name):
                raise TideError(f"{name!r} is no file of a cache")
            if isinstance(self.files, pafs.LocalFileSystem):
                refuse_odd(Path(self.root, name), Path(self.root))
            yield f"{self.root}/{name}".rstrip("/")
        except TideError:
            raise
        except _ERRORS as error:
            fix = "check the address, the credentials and the network, and run the same command "
            fix += "again; what is finished is kept"
            raise TideError(f"{self.url}/{name}: {error}", fix=fix) from error

    def sizes(self) -> dict[str, int]:
        """The cache's files that are there, in order, with their bytes."""
        with self._file("") as root:
            selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
            listed = self.files.get_file_info(selector)
        sizes = {}
        for info in listed:
            name = info.path.removeprefix(self.root).lstrip("/")
            if info.type == pafs.FileType.File and belongs_to_cache(name):
                sizes[name] = info.size
        return dict(sorted(sizes.items()))

    def read(self, name: str) -> bytes:
        """A file's content. TideError where it cannot be read."""
        with self._file(name) as path, self.files.open_input_stream(path) as stream:
            return stream.read()

    def put(self, name: str, content: bytes) -> None:
        """Write a file. TideError where it cannot be written."""
        with self._file(name) as path:
            if isinstance(self.files, pafs.LocalFileSystem):
                write_bytes(Path(path), content)
            else:
                with self.files.open_output_stream(path) as stream:
                    stream.write(content)

    def _bring(self, cache: Path, *names: str) -> None:
        for name in names:
            write_bytes(cache / name, self.read(name))

    def manifest(self, cache: Path | None = None) -> Manifest:
        """The store's manifest. TideError where there is none, or `cache` has another's."""
        if MANIFEST not in self.sizes():
            expected = "a cache from `tide push`"
            raise TideError(f"{self.url} is no cache: it has no {MANIFEST}", expected=expected)
        with tempfile.TemporaryDirectory(prefix="tide-store-") as folder:
            self._bring(Path(folder), MANIFEST)
            manifest = load_manifest(Path(folder))
        if cache is not None and (cache / MANIFEST).exists():
            old, purpose = load_manifest(cache).fingerprint, f"bring it up to {self.url}"
            check_fingerprint(cache, old, manifest.fingerprint, purpose)
        return manifest

    def bring(self, cache: Path) -> None:
        """For training, all but the shards. TideError where `cache` is another."""
        manifest = self.manifest(cache)
        last = (LEDGER, MANIFEST)
        there = all((cache / name).exists() for name in last)
        if not there or load_manifest(cache) != manifest:  # it may have grown
            small = [n for n in self.sizes() if n not in last and Unit.at(Path(n)) is None]
            self._bring(cache, *small, *last)

    def bring_manifest(self, cache: Path) -> None:
        """For stage one: the store's manifest and tables, to a folder that has none."""
        if not (cache / MANIFEST).exists() and MANIFEST in self.sizes():
            self.bring_tables(cache)
            self._bring(cache, MANIFEST)

    def bring_tables(self, cache: Path) -> None:
        """The store's tables, where `cache` has none."""
        if not has_tables(cache):  # by name the one that says that all are there is last
            self._bring(cache, *(n for n in self.sizes() if n.startswith(f"{TABLES}/")))

    def begin(self, cache: Path, manifest: Manifest) -> frozenset[Unit]:
        """Units that need not be computed. TideError where the store holds another cache."""
        sizes = self.sizes()
        if MANIFEST in sizes:
            there = self.manifest().fingerprint
            check_fingerprint(Path(self.url), there, manifest.fingerprint, "go on with it")
        for path in [*small_files(cache), cache / MANIFEST]:
            self.put(path.relative_to(cache).as_posix(), read_bytes(path, cache))
        return frozenset(unit for name in sizes if (unit := Unit.at(Path(name))))

    def put_shard(self, cache: Path, unit: Unit) -> None:
        self.put(_name(unit), read_bytes(unit.path(cache), cache))

    def push(self, cache: Path, manifest: Manifest, ledger: Ledger) -> int:
        """Copy what the store lacks of `cache`; how many shards it has now.

        TideError where a shard is not what the ledger says.
        """
        # 1. shards that are not there, or not as long as the ledger says
        self.begin(cache, manifest)
        sizes = self.sizes()
        for unit in tqdm(finished_units(cache), unit="shard", desc="push"):
            if unit in ledger and sizes.get(_name(unit)) != ledger[unit].bytes:
                ledger[unit].check(unit.path(cache), read_bytes(unit.path(cache)))
                self.put_shard(cache, unit)
        # 2. once all are there, the ledger; what others wrote is read for it, and so checked
        sizes, units = self.sizes(), manifest.units()
        there = [unit for unit in units if _name(unit) in sizes]
        if len(there) == len(units):
            whole = {unit: ledger[unit] for unit in there if unit in ledger}
            for unit in tqdm([u for u in there if u not in whole], unit="shard", desc="ledger"):
                name = _name(unit)
                whole[unit] = entry_of(Path(self.url) / name, self.read(name), manifest)
            with tempfile.TemporaryDirectory(prefix="tide-ledger-") as folder:
                save_ledger(Path(folder), manifest, whole)
                self.put(LEDGER, (Path(folder) / LEDGER).read_bytes())
        return len(there)

    def pull(self, cache: Path) -> int:
        """Copy everything that `cache` lacks; how many files.

        TideError where the store holds no cache, or another, or one that lost something.
        """
        # 1. all that manifest and ledger speak of is there
        manifest, sizes = self.manifest(cache), self.sizes()
        ledger: Ledger = {}
        if LEDGER in sizes:
            with tempfile.TemporaryDirectory(prefix="tide-store-") as folder:
                self._bring(Path(folder), LEDGER)
                ledger = load_ledger(Path(folder), manifest)
        needed = [*map(_name, ledger), "student_tokenizer/tokenizer.json"]
        if not manifest.shared_tokenizer:
            needed.append("teacher_tokenizer/tokenizer.json")
        if manifest.fingerprint.tables is not None:
            needed.append(f"{TABLES}/vocabulary.parquet")
        lost = [name for name in needed if name not in sizes]
        if lost:
            fix = "push it again (`tide push`) from where it was made: it writes what is missing"
            what = f"{self.url} lacks {len(lost)} files of the cache, the first is {lost[0]}"
            raise TideError(what, fix=fix)
        # 2. shards are checked by the ledger, or in an unfinished cache by their own checksums
        last = [name for name in (LEDGER, MANIFEST) if name in sizes]
        missing = [name for name in sizes if not (cache / name).exists()]
        for name in tqdm([n for n in missing if n not in last], unit="file", desc="pull"):
            content, unit, path = self.read(name), Unit.at(Path(name)), Path(self.url) / name
            if unit in ledger:
                ledger[unit].check(path, content)
            elif unit is not None:
                entry_of(path, content, manifest)
            write_bytes(cache / name, content)
        # 3. at the end, what says that the rest is there
        self._bring(cache, *last)
        return len(missing)
