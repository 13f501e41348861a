"""`tide pack` and `tide unpack`: a whole cache as one .tar.zst, every file with its SHA-256.

The first member is `checksums.json`. An archive is whole or absent, and so is the folder that it is unpacked to.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import zstandard
from tqdm import tqdm

from shared.atomic import write_atomically
from shared.errors import TideError
from shared.ledger import LEDGER, settle_ledger
from shared.manifest import MANIFEST, load_manifest, refuse_unfinished
from shared.vocabulary import TABLES

CHECKSUMS = "checksums.json"
_CHUNK = 1 << 20
_LEVEL = 3  # shards are compressed already


def pack_cache(cache: Path, archive: Path) -> int:
    """Write the cache to `archive`; its number of files. TideError where the cache is not finished."""
    manifest = load_manifest(cache)
    refuse_unfinished(cache, manifest)
    settle_ledger(cache, manifest)
    others = [path for path in sorted([*cache.glob("*_tokenizer/*"), *cache.glob(f"{TABLES}/*")]) if path.is_file()]
    files = [cache / MANIFEST, cache / LEDGER, *others, *(unit.path(cache) for unit in manifest.units())]
    sums = {}
    for path in tqdm(files, unit="file", desc="checksums"):
        sums[path.relative_to(cache).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}

    def write(handle: BinaryIO) -> None:
        with (
            zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(handle, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            note = json.dumps(sums, indent=1).encode()
            tar.addfile(_member(CHECKSUMS, len(note)), io.BytesIO(note))
            for path in tqdm(files, unit="file", desc="pack"):
                with path.open("rb") as content:
                    tar.addfile(_member(path.relative_to(cache).as_posix(), path.stat().st_size), content)

    write_atomically(archive, write)
    return len(files)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def unpack_cache(archive: Path, cache: Path) -> int:
    """Read `archive` into the new folder `cache`; its number of files. TideError where a byte of it is wrong."""
    if cache.exists() and any(cache.iterdir()):
        raise TideError(f"{cache} is not empty", expected="a new folder")
    half = cache.with_name(cache.name + ".unpacking")
    shutil.rmtree(half, ignore_errors=True)
    try:
        count = _extract(archive, half)
        load_manifest(half)
    except (OSError, tarfile.TarError, zstandard.ZstdError, ValueError) as error:
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, TideError):
            raise
        raise TideError(
            f"{archive} cannot be unpacked: {error}",
            expected="a whole archive written by `tide pack`",
            fix="copy it again; nothing was left in the folder",
        ) from error
    if cache.exists():
        cache.rmdir()
    half.rename(cache)
    return count


def _extract(archive: Path, folder: Path) -> int:
    with archive.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as plain:
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            first = tar.next()
            if first is None or first.name != CHECKSUMS:
                raise ValueError(f"it does not begin with {CHECKSUMS}")
            sums = json.loads(_content(tar, first).read())
            left = dict(sums)
            for info in tqdm(iter(tar.next, None), total=len(sums), unit="file", desc="unpack"):
                if info.name not in left or not info.isreg() or not _inside(info.name):
                    raise ValueError(f"it holds {info.name!r}, which {CHECKSUMS} does not name")
                _write(_content(tar, info), folder / info.name, left.pop(info.name), info.name)
        while plain.read(_CHUNK):  # to the end of the stream, where its own checksum stands
            pass
    if left:
        raise ValueError(f"it lacks {len(left)} files, the first is {min(left)}")
    return len(sums)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    handle = tar.extractfile(info)
    if handle is None:
        raise ValueError(f"{info.name!r} is no file")
    return handle


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _write(source: Any, path: Path, expected: dict[str, Any], name: str) -> None:
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            handle.write(chunk)
    if digest.hexdigest() != expected["sha256"]:
        raise ValueError(f"the checksum of {name} does not hold")
