"""A cache in an object store (`shared.cache.marked_files`): pushed, pulled, or gone on with. The manifest comes last."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shared.cache.ledger import LEDGER, Entry, Ledger, load_ledger, save_ledger
from shared.cache.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.cache.marked_files import MarkedFiles
from shared.cache.shards import Unit, finished_units, read_table
from shared.cache.vocabulary import TABLES, has_tables
from shared.system.atomic import write_bytes
from shared.system.errors import TideError

_ENTRY = [field.name for field in dataclasses.fields(Entry)]


class Store(MarkedFiles):
    """A cache in a store."""

    def bring(self, cache: Path) -> None:
        """All of a finished cache but its shards. TideError where the store holds none, or `cache` is another."""
        there = (cache / LEDGER).exists() and (cache / MANIFEST).exists()
        if there and self._same(cache) == (cache / MANIFEST).read_bytes():
            return  # else it has grown since
        wanted = [
            name
            for name in self.names()
            if not name.endswith(".parquet") or name.startswith(f"{TABLES}/")
        ]
        if MANIFEST not in wanted:
            raise TideError(
                f"{self.url} is no cache: it has no {MANIFEST}", expected="a cache from `tide push`"
            )
        for name in [*(n for n in wanted if n != MANIFEST), LEDGER, MANIFEST]:
            write_bytes(cache / name, self.get(name))

    def _same(self, cache: Path) -> bytes:
        """The store's manifest. TideError where `cache` has another's."""
        content = self.get(MANIFEST)
        if (cache / MANIFEST).exists():
            about = self._manifest(content).fingerprint
            old = load_manifest(cache).fingerprint
            check_fingerprint(cache, old, about, f"bring it up to {self.url}")
        return content

    def units(self) -> list[Unit]:
        """Units whose shards are there, with markers that fit them."""
        return sorted(self._markers())

    def _markers(self) -> dict[Unit, dict[str, Any]]:
        found = self.sound(lambda name: Unit.at(Path(name)) is not None)
        return {
            unit: marker
            for name, marker in found.items()
            if (unit := Unit.at(Path(name))) is not None
        }

    def bring_manifest(self, cache: Path) -> None:
        """The store's manifest, and its tables, to a folder that has none: a run goes on with the store's cache."""
        if not (cache / MANIFEST).exists() and MANIFEST in self.names():
            self.bring_tables(cache)
            write_bytes(cache / MANIFEST, self.get(MANIFEST))

    def bring_tables(self, cache: Path) -> None:
        """The store's tables, where it has them and `cache` does not; the one that says that all are there is last."""
        if not has_tables(cache):
            for name in sorted(
                name for name in self.names(TABLES) if name.startswith(f"{TABLES}/")
            ):
                write_bytes(cache / name, self.get(name))

    def begin(self, cache: Path, manifest: Manifest) -> frozenset[Unit]:
        """Units that need not be computed. TideError where the store holds another cache."""
        if MANIFEST in self.names():
            self._refuse_other(manifest, self.get(MANIFEST))
        self._put_small(cache)
        return frozenset(self.units())

    def _refuse_other(self, manifest: Manifest, content: bytes) -> None:
        check_fingerprint(
            Path(self.url),
            self._manifest(content).fingerprint,
            manifest.fingerprint,
            "go on with it",
        )

    @staticmethod
    def _manifest(content: bytes) -> Manifest:
        with tempfile.TemporaryDirectory(prefix="tide-store-") as folder:
            write_bytes(Path(folder) / MANIFEST, content)
            return load_manifest(Path(folder))

    def _put_small(self, cache: Path) -> None:
        small = [*sorted(cache.glob("*_tokenizer/*")), *sorted(cache.glob(f"{TABLES}/*.parquet"))]
        for path in [*small, cache / MANIFEST]:
            self.put(path.relative_to(cache).as_posix(), path.read_bytes())

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
        if self.sound(
            lambda name: name == MANIFEST
        ):  # one that is damaged says nothing: then the ledger tells what is there
            self._refuse_other(manifest, self.get(MANIFEST))
        self._put_small(cache)
        there = {unit: marker["sha256"] for unit, marker in self._markers().items()}
        same = {
            unit
            for unit, digest in there.items()
            if unit not in ledger or ledger[unit].sha256 == digest
        }
        for unit in tqdm(
            [u for u in finished_units(cache) if u not in same], unit="shard", desc="push"
        ):
            self.put_shard(cache, unit, ledger.get(unit))
        markers = self._markers()  # other ranks may have written since
        if set(markers) == set(manifest.units()):
            self._put_ledger(manifest, ledger, markers)
        return len(markers)

    def _put_ledger(
        self, manifest: Manifest, ledger: Ledger, markers: dict[Unit, dict[str, Any]]
    ) -> None:
        """The ledger of all shards; those that another process wrote are known from their markers."""
        whole: Ledger = {
            unit: ledger[unit]
            if unit in ledger
            else Entry(**{name: marker[name] for name in _ENTRY})
            for unit, marker in sorted(markers.items())
        }
        with tempfile.TemporaryDirectory(prefix="tide-ledger-") as folder:
            save_ledger(Path(folder), manifest, whole)
            self.put(LEDGER, (Path(folder) / LEDGER).read_bytes())

    def pull(self, cache: Path) -> int:
        """Copy everything that `cache` lacks; how many files. TideError where the store holds no cache, or another."""
        names = self.names()
        if MANIFEST not in names:
            raise TideError(
                f"{self.url} is no cache: it has no {MANIFEST}", expected="a cache from `tide push`"
            )
        if lost := self.lost():
            raise self._lacks(lost)
        content = self._same(cache)
        missing = [name for name in names if name != MANIFEST and not (cache / name).exists()]
        ledger = self._ledger(content) if LEDGER in names else {}
        if lost := sorted({unit.path(Path()).as_posix() for unit in ledger} - set(names)):
            raise self._lacks(lost)
        for name in tqdm(missing, unit="file", desc="pull"):
            unit = Unit.at(Path(name))
            found = self.read(name) if unit in ledger else self.get(name)
            if unit in ledger:  # it knows the shard even where the marker was cut
                ledger[unit].check(Path(self.url) / name, found)
            write_bytes(cache / name, found)
        self._check_small(cache, content)
        write_bytes(cache / MANIFEST, content)
        return len(missing)

    def _check_small(self, cache: Path, manifest: bytes) -> None:
        """TideError where the tokenizers or tables that the manifest speaks of did not come."""
        about = self._manifest(manifest).fingerprint
        wanted = ["student_tokenizer/tokenizer.json"]
        wanted += [] if about.teacher.student_tokens else ["teacher_tokenizer/tokenizer.json"]
        if lost := [name for name in wanted if not (cache / name).exists()]:
            raise self._lacks(lost)
        if about.tables is not None and not has_tables(cache):
            raise self._lacks([TABLES])

    def _lacks(self, lost: list[str]) -> TideError:
        return TideError(
            f"{self.url} lacks {len(lost)} files that it should have, the first is {lost[0]}",
            expected="a whole cache",
            fix="push the cache again (`tide push`) from where it was made: it writes what is missing",
        )

    def _ledger(self, manifest: bytes) -> Ledger:
        """The ledger of the store's cache."""
        with tempfile.TemporaryDirectory(prefix="tide-ledger-") as folder:
            write_bytes(Path(folder) / LEDGER, self.get(LEDGER))
            write_bytes(Path(folder) / MANIFEST, manifest)
            return load_ledger(Path(folder), load_manifest(Path(folder)))
