"""Files in an object store: s3://, gs://, hf:// or any that fsspec knows, or a path.

Such stores have no rename, so a file counts only once its marker is there: `NAME.ok`, which holds its size and SHA-256
and is written after it. Killed between the two, the next run writes the file again; so it does where file or marker
was lost or cut since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from shared.cache.ledger import LEDGER
from shared.cache.manifest import MANIFEST
from shared.cache.shards import Unit
from shared.cache.vocabulary import TABLES
from shared.system.atomic import write_bytes
from shared.system.errors import TideError

T = TypeVar("T", bound="MarkedFiles")
MARKER = ".ok"
_ERRORS = (OSError, ValueError, pa.ArrowException)
_AT_ONCE = 16


def is_remote(place: str) -> bool:
    """Whether a path is the address of a store."""
    return "://" in place


def belongs_to_cache(name: str) -> bool:
    """Whether a cache has files of that name: manifest, ledger, tokenizers, tables, shards."""
    path = PurePosixPath(name)
    if not path.parts or name != str(path) or path.is_absolute() or ".." in path.parts:
        return False
    if len(path.parts) == 1:
        return name in (MANIFEST, LEDGER)
    folder, *rest = path.parts
    if len(rest) != 1 or rest[0].startswith("."):
        return False
    small = folder in ("student_tokenizer", "teacher_tokenizer") or (
        folder == TABLES and path.suffix == ".parquet"
    )
    return small or Unit.at(Path(name)) is not None


def _marked(listed: Iterable[str]) -> list[str]:
    """Of all names in a store the cache's files that have a marker, in order."""
    every = set(listed)
    return sorted(name for name in every if belongs_to_cache(name) and name + MARKER in every)


@dataclass(frozen=True)
class MarkedFiles:
    """A folder of a file system of pyarrow. Names that are no cache's are neither read nor written."""

    files: Any
    root: str
    url: str

    @classmethod
    def open(cls: type[T], url: str) -> T:
        """TideError where the address cannot be understood, or what it needs is not installed."""
        try:
            if url.startswith("hf://"):
                from huggingface_hub import HfFileSystem

                return cls(
                    pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())),
                    url.removeprefix("hf://"),
                    url,
                )
            files, root = pafs.FileSystem.from_uri(
                url if is_remote(url) else Path(url).absolute().as_uri()
            )
        except (pa.ArrowException, ImportError, OSError, ValueError) as error:
            raise TideError(
                f"the store {url} cannot be opened: {error}",
                expected="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, hf://datasets/NAME or a path",
                fix="check the address and the credentials (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, … in the environment)",
            ) from error
        return cls(files, root.rstrip("/"), url)

    def get(self, name: str) -> bytes:
        """A file's content. TideError where it is missing, or not what its marker says."""
        marker = self.marker(name)
        content = self.read(name)
        if marker is None or marker["sha256"] != hashlib.sha256(content).hexdigest():
            raise TideError(
                f"{self.url}/{name} is not what its marker says",
                fix="push it again (`tide push`) from where it was made: what does not hold is written anew",
            )
        return content

    def read(self, name: str) -> bytes:
        """A file's content, whatever its marker says. TideError where it cannot be read."""
        self._refuse(name)
        try:
            with self.files.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except _ERRORS as error:
            raise self.failed(f"{name} cannot be read", error) from error

    def put(self, name: str, content: bytes, facts: dict[str, Any] | None = None) -> None:
        """Write a file, then its marker; nothing where both are there and say the same."""
        self._refuse(name)
        digest = hashlib.sha256(content).hexdigest()
        old = self.marker(name)
        if old is not None and old["sha256"] == digest and self._size(name) == len(content):
            return
        note = json.dumps({**(facts or {}), "bytes": len(content), "sha256": digest}).encode()
        try:
            if (
                self._size(name + MARKER) is not None
            ):  # from now on the file is not what the old marker says
                self.files.delete_file(f"{self.root}/{name}{MARKER}")
            self._write(name, content)
            self._write(name + MARKER, note)
        except TideError:
            raise
        except _ERRORS as error:
            raise self.failed(f"{name} cannot be written", error) from error

    def marker(self, name: str) -> dict[str, Any] | None:
        """What is said of a file; None where nothing is, or nothing that can be read."""
        try:
            with self.files.open_input_stream(f"{self.root}/{name}{MARKER}") as stream:
                content = stream.read()
        except FileNotFoundError:
            return None
        except _ERRORS as error:
            raise self.failed(f"{name}{MARKER} cannot be read", error) from error
        try:
            found = json.loads(content)
        except ValueError:
            return None
        sound = (
            isinstance(found, dict)
            and isinstance(found.get("sha256"), str)
            and isinstance(found.get("bytes"), int)
        )
        return found if sound else None

    def names(self, folder: str = "") -> list[str]:
        """The cache's files that are there (in `folder`), with their markers, in order. TideError for names that lead
        out of the store.
        """
        return _marked(self._listed(folder))

    def sound(self, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
        """Of the `wanted` names those whose markers can be read and have the file's size, with their markers."""
        sizes = self._listed()
        names = [name for name in _marked(sizes) if wanted(name)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            markers = list(pool.map(self.marker, names))
        return {
            n: m
            for n, m in zip(names, markers, strict=True)
            if m is not None and m["bytes"] == sizes.get(n)
        }

    def lost(self) -> list[str]:
        """The cache's files whose markers are there without them."""
        sizes = self._listed()
        marked = (name.removesuffix(MARKER) for name in sizes if name.endswith(MARKER))
        return sorted(name for name in marked if belongs_to_cache(name) and name not in sizes)

    def failed(self, what: str, error: Exception) -> TideError:
        """The error for what the store did not do."""
        return TideError(
            f"{self.url}: {what}: {error}",
            fix="check the address, the credentials and the network, and run the same command again; "
            "what is finished is kept",
        )

    def _listed(self, folder: str = "") -> dict[str, int]:
        """Every file with its size in bytes."""
        place = f"{self.root}/{folder}".rstrip("/")
        try:
            found = self.files.get_file_info(
                pafs.FileSelector(place, recursive=True, allow_not_found=True)
            )
        except _ERRORS as error:
            raise self.failed("it cannot be listed", error) from error
        sizes = {
            i.path.removeprefix(self.root).lstrip("/"): i.size
            for i in found
            if i.type == pafs.FileType.File
        }
        for name in sizes:
            if ".." in PurePosixPath(name).parts:
                raise TideError(
                    f"{self.url} holds a file named {name!r}",
                    expected="names of a cache",
                    fix="delete it from the store",
                )
        return sizes

    def _size(self, name: str) -> int | None:
        try:
            info = self.files.get_file_info(f"{self.root}/{name}")
        except _ERRORS as error:
            raise self.failed(f"{name} cannot be looked at", error) from error
        return info.size if info.type == pafs.FileType.File else None

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        if isinstance(self.files, pafs.LocalFileSystem):
            write_bytes(Path(path), content)
            return
        with self.files.open_output_stream(path) as stream:
            stream.write(content)

    def _refuse(self, name: str) -> None:
        if not belongs_to_cache(name):
            raise TideError(
                f"{name!r} is no file of a cache",
                expected="a manifest, ledger, tokenizer, table or shard",
            )
