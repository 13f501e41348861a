"""A cache in an object store: s3://, gs://, hf:// or any that fsspec knows, or a path.

Such stores have no rename, so a file counts only once its marker is there: `NAME.ok`, which holds its size and SHA-256
and is written after it. Killed between the two, the next run writes the file again. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from tqdm import tqdm

from shared.atomic import write_bytes
from shared.errors import TideError
from shared.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.shards import Unit, finished_units

_MARKER = ".ok"
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
        try:
            with self.files.open_input_stream(f"{self.root}/{name}") as stream:
                content = stream.read()
        except _ERRORS as error:
            raise self._failed(f"{name} cannot be read", error) from error
        if marker is None or marker["sha256"] != hashlib.sha256(content).hexdigest():
            raise TideError(
                f"{self.url}/{name} is not what its marker says", fix="delete it and its marker, and push it again"
            )
        return content

    def put(self, name: str, content: bytes) -> None:
        """Write a file, then its marker; nothing where the marker says that it is there already."""
        digest = hashlib.sha256(content).hexdigest()
        old = self._marker(name)
        if old is not None and old["sha256"] == digest:
            return
        marker = json.dumps({"bytes": len(content), "sha256": digest}).encode()
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

    def names(self) -> list[str]:
        """Files that are there, with their markers, in order."""
        try:
            found = self.files.get_file_info(pafs.FileSelector(self.root, recursive=True, allow_not_found=True))
        except _ERRORS as error:
            raise self._failed("it cannot be listed", error) from error
        paths = {info.path.removeprefix(self.root).lstrip("/") for info in found if info.type == pafs.FileType.File}
        return sorted(name for name in paths if name + _MARKER in paths)

    def units(self) -> list[Unit]:
        """Units whose shards are there."""
        split = [name.split("/") for name in self.names() if name.endswith(".parquet")]
        return [Unit(int(draw.removeprefix("draw=")), int(part[5:-8])) for draw, part in split]

    def bring_manifest(self, cache: Path) -> None:
        """The store's manifest to a folder that has none, so that a run goes on with the store's cache."""
        if not (cache / MANIFEST).exists() and MANIFEST in self.names():
            write_bytes(cache / MANIFEST, self.get(MANIFEST))

    def begin(self, cache: Path, manifest: Manifest) -> frozenset[Unit]:
        """Units that need not be computed. TideError where the store holds another cache."""
        names = self.names()
        if MANIFEST in names:
            found = Manifest(**{k: v for k, v in json.loads(self.get(MANIFEST)).items() if k != "checksum"})
            check_fingerprint(Path(self.url), found, manifest.fingerprint, "go on with it")
        for path in [*sorted(cache.glob("*_tokenizer/*")), cache / MANIFEST]:
            self.put(path.relative_to(cache).as_posix(), path.read_bytes())
        return frozenset(self.units())

    def put_shard(self, cache: Path, unit: Unit) -> None:
        """Copy a finished shard."""
        path = unit.path(cache)
        self.put(path.relative_to(cache).as_posix(), path.read_bytes())

    def push(self, cache: Path, manifest: Manifest) -> int:
        """Copy everything of `cache` that the store lacks; how many shards there are now."""
        there = self.begin(cache, manifest)
        for unit in tqdm([u for u in finished_units(cache) if u not in there], unit="shard", desc="push"):
            self.put_shard(cache, unit)
        return len(self.units())

    def pull(self, cache: Path) -> int:
        """Copy everything that `cache` lacks; how many files. TideError where the store holds no cache, or another."""
        names = self.names()
        if MANIFEST not in names:
            raise TideError(f"{self.url} is no cache: it has no {MANIFEST}", expected="a cache from `tide push`")
        content = self.get(MANIFEST)
        if (cache / MANIFEST).exists():
            old = load_manifest(cache)
            new = json.loads(content)["fingerprint"]
            check_fingerprint(cache, old, new, f"bring it up to {self.url}")
        missing = [name for name in names if name != MANIFEST and not (cache / name).exists()]
        for name in tqdm(missing, unit="file", desc="pull"):
            write_bytes(cache / name, self.get(name))
        write_bytes(cache / MANIFEST, content)
        return len(missing)


def local_cache(place: str, folder: Path) -> Path:
    """A cache as a folder: `place` itself, or what `pull` brings into `folder`."""
    if not is_remote(place):
        return Path(place)
    Store.open(place).pull(folder)
    return folder
