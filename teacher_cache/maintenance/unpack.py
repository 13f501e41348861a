"""`tide unpack`: the folder that a packed cache was, whole or not at all, however odd the archive.

Nothing is believed before it is counted: an archive says what it holds in its first member, and no more than that is
read into memory or written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from shared.cache.manifest import load_manifest
from shared.cache.stores import belongs_to_cache
from shared.system.atomic import new_folder, remove_leftovers
from shared.system.errors import TideError
from shared.system.files import refuse_odd
from teacher_cache.maintenance.pack import CHECKSUMS

_CHUNK = 1 << 20
_HEADERS = 1 << 20
"""Bytes between two files: their headers and padding."""
_LARGEST_NOTE = 64 << 20
_WINDOW = 128 << 20
"""Of zstandard: memory that unpacking takes, at most."""
_SHA256 = re.compile("[0-9a-f]{64}")
_ERRORS = (
    OSError,
    tarfile.TarError,
    zstandard.ZstdError,
    ValueError,
    RecursionError,
    MemoryError,
    EOFError,
)


class _Metered:
    """A stream that gives no more bytes than were allowed."""

    def __init__(self, source: Any) -> None:
        self._source, self._left = source, 0

    def allow(self, count: int) -> None:
        """From now on, `count` bytes."""
        self._left = count

    def read(self, count: int = -1) -> bytes:
        """As a file's. ValueError where more would come than was allowed."""
        content = self._source.read(min(count, self._left + 1) if count >= 0 else self._left + 1)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError("it holds more than it says")
        return content


def unpack_cache(archive: Path, cache: Path) -> int:
    """Read `archive` into the new folder `cache`; its number of files. TideError where a byte of it is wrong."""
    if cache.is_symlink() or (cache.exists() and (not cache.is_dir() or any(cache.iterdir()))):
        raise TideError(
            f"{cache} is not empty, or no folder",
            expected="a new folder",
            fix="choose another name",
        )
    if cache.resolve() == Path.cwd():
        raise TideError(
            f"{cache} is the folder that you are in",
            expected="a new folder",
            fix="name one inside it",
        )
    refuse_odd(archive)
    cache = cache.absolute()
    if not cache.exists():
        remove_leftovers([cache])
    try:
        with new_folder(cache) as half:
            count = _extract(archive, half)
            load_manifest(half)
    except TideError:
        raise
    except _ERRORS as error:
        raise TideError(
            f"{archive} cannot be unpacked: {str(error)[:500] or type(error).__name__}",
            expected="a whole archive written by `tide pack`",
            fix="copy it again; nothing was left in the folder",
        ) from error
    return count


def _extract(archive: Path, folder: Path) -> int:
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    with archive.open("rb") as raw, reader.stream_reader(raw) as opened:
        plain = _Metered(opened)
        plain.allow(_HEADERS)
        with tarfile.open(fileobj=plain, mode="r|") as tar:  # type: ignore[call-overload]
            note = _note(tar, plain)
            _refuse_too_large(note, folder)
            left = dict(note)
            for info in tqdm(iter(tar.next, None), total=len(note), unit="file", desc="unpack"):
                if info.name not in left or not info.isreg():
                    raise ValueError(
                        f"it holds {info.name[:200]!r}, which {CHECKSUMS} does not name"
                    )
                size, digest = left.pop(info.name)
                if info.size != size:
                    raise ValueError(
                        f"{info.name} has {info.size:,} bytes, {CHECKSUMS} says {size:,}"
                    )
                plain.allow(size + _HEADERS)
                _write(_content(tar, info), folder / info.name, digest, info.name)
                plain.allow(_HEADERS)
        while plain.read(_CHUNK):  # to the end of the stream, where its own checksum stands
            pass
    if left:
        raise ValueError(f"it lacks {len(left)} files, the first is {min(left)}")
    return len(note)


def _note(tar: tarfile.TarFile, plain: _Metered) -> dict[str, tuple[int, str]]:
    """The first member: bytes and SHA-256 of every file."""
    first = tar.next()
    if first is None or first.name != CHECKSUMS or not first.isreg() or first.size > _LARGEST_NOTE:
        raise ValueError(f"it does not begin with {CHECKSUMS}")
    plain.allow(first.size + _HEADERS)
    return _sound(json.loads(_content(tar, first).read()))


def _sound(note: Any) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file. ValueError where the note says anything else, or names what no cache holds."""
    if not isinstance(note, dict):
        raise ValueError(f"{CHECKSUMS} is no table of files")
    found = {}
    for name, about in note.items():
        size, digest = (
            (about.get("bytes"), about.get("sha256")) if isinstance(about, dict) else (None, None)
        )
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"{CHECKSUMS} gives {name[:200]!r} no size")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(f"{CHECKSUMS} gives {name[:200]!r} no SHA-256")
        if not belongs_to_cache(name):
            raise ValueError(f"{CHECKSUMS} names {name[:200]!r}, which is no file of a cache")
        found[name] = (size, digest)
    return found


def _refuse_too_large(note: dict[str, tuple[int, str]], folder: Path) -> None:
    whole, free = sum(size for size, _ in note.values()), shutil.disk_usage(folder).free
    if whole > free:
        raise TideError(
            f"the archive holds {whole:,} bytes, and {free:,} are free on the disk of {folder.parent}",
            fix="free some space, or unpack it elsewhere",
        )


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    handle = tar.extractfile(info)
    if handle is None:
        raise ValueError(f"{info.name!r} is no file")
    return handle


def _write(source: Any, path: Path, expected: str, name: str) -> None:
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            handle.write(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(f"the checksum of {name} does not hold")
