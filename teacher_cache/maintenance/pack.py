"""`tide pack` and `tide unpack`: a whole cache as one .tar.zst, and the folder that it was.

The first member, `checksums.json`, has the size and SHA-256 of every file. An archive is believed
no further: no more than it says there is read into memory or written, and only names that caches
have.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Annotated, Any

import zstandard
from pydantic import Field, TypeAdapter
from tqdm.auto import tqdm

from shared.cache.ledger import LEDGER, settle_ledger
from shared.cache.manifest import MANIFEST, load_manifest, refuse_unfinished
from shared.cache.stores import belongs_to_cache, small_files
from shared.settings.build import strict
from shared.system import files as own
from shared.system.files import TideError, atomic_file, new_folder, refuse_odd, sha256_of

CHECKSUMS = "checksums.json"
_LEVEL = 3  # shards are compressed already
_HEADERS = 1 << 20  # bytes between two files, at most: their headers and padding
_LARGEST_NOTE = 64 << 20  # bytes
_WINDOW = 128 << 20  # memory that zstandard takes to unpack, at most
_DAMAGE = (EOFError, ValueError, RecursionError, MemoryError, tarfile.TarError, zstandard.ZstdError)


@strict
class _Member:
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def pack_cache(cache: Path, archive: Path) -> int:
    """Write the cache to `archive`; its number of files. TideError where it is not finished."""
    manifest = load_manifest(cache)
    refuse_unfinished(cache, manifest)
    settle_ledger(cache, manifest)
    files = [cache / MANIFEST, cache / LEDGER, *small_files(cache)]
    files += [unit.path(cache) for unit in manifest.units()]
    names = [path.relative_to(cache).as_posix() for path in files]
    about = {}
    for name in tqdm(names, unit="file", desc="checksums"):
        file = cache / name
        about[name] = {"sha256": sha256_of(file, cache), "bytes": file.stat().st_size}
    note = json.dumps(about, indent=1).encode()
    packer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with (
        atomic_file(archive) as handle,
        packer.stream_writer(handle, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        member = tarfile.TarInfo(CHECKSUMS)
        member.size = len(note)
        tar.addfile(member, io.BytesIO(note))
        for name in tqdm(names, unit="file", desc="pack"):
            member = tarfile.TarInfo(name)
            member.size = about[name]["bytes"]
            with (cache / name).open("rb") as content:
                tar.addfile(member, content)
    return len(names)


class _Bounded:
    """A stream that fails where more than `left` bytes are read."""

    def __init__(self, source: Any) -> None:
        self.source, self.left = source, _HEADERS

    def read(self, count: int = -1) -> bytes:
        content = self.source.read(min(count, self.left + 1) if count >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("it holds more than it says")
        return content


def unpack_cache(archive: Path, cache: Path) -> int:
    """Read `archive` into the new folder `cache`; how many files. TideError for a wrong byte."""
    if cache.is_symlink() or (cache.exists() and (not cache.is_dir() or any(cache.iterdir()))):
        raise TideError(f"{cache} is not empty, or no folder", expected="a new folder")
    if cache.resolve() == Path.cwd():
        raise TideError(f"{cache} is the folder that you are in", fix="name one inside it")
    refuse_odd(archive)
    cache = cache.absolute()
    if not cache.exists():
        own.remove_leftovers([cache])
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        with new_folder(cache) as folder:
            with archive.open("rb") as raw, reader.stream_reader(raw) as plain:
                count = _extract(_Bounded(plain), folder)
            load_manifest(folder)
    except TideError:
        raise
    except (OSError, *_DAMAGE) as error:
        what = f"{archive} cannot be unpacked: {str(error)[:500] or type(error).__name__}"
        fix = "copy it again; nothing was left in the folder"
        raise TideError(what, expected="a whole archive of `tide pack`", fix=fix) from error
    return count


def _extract(plain: _Bounded, folder: Path) -> int:
    """Every file of the tar archive into `folder`; how many. ValueError where one is wrong."""
    left: dict[str, _Member] | None = None  # what the note says of files that are still to come
    count = 0
    with tarfile.open(fileobj=plain, mode="r|") as tar:  # type: ignore[call-overload]
        for member in (bar := tqdm(tar, unit="file", desc="unpack")):
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise ValueError(f"{member.name[:200]!r} is no file")
            # 1. the first is the note: what the archive holds
            if left is None:
                if member.name != CHECKSUMS or member.size > _LARGEST_NOTE:
                    raise ValueError(f"it does not begin with {CHECKSUMS}")
                plain.left = member.size + _HEADERS
                left = TypeAdapter(dict[str, _Member]).validate_json(content.read())
                bar.total = count = len(left)
                whole = sum(about.bytes for about in left.values())
                strangers = [name for name in left if not belongs_to_cache(name)]
                if strangers:
                    raise ValueError(f"{strangers[0][:200]!r} is no file of a cache")
                if whole > (free := shutil.disk_usage(folder).free):
                    place = f"{folder.parent} has {free:,} free"
                    fix = "free some space, or unpack it elsewhere"
                    raise TideError(f"the archive holds {whole:,} bytes, and {place}", fix=fix)
                continue
            # 2. the others are as it says
            about = left.pop(member.name, None)
            if about is None or member.size != about.bytes:
                raise ValueError(f"{member.name[:200]!r} is not as {CHECKSUMS} says")
            plain.left = about.bytes + _HEADERS
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as handle:
                shutil.copyfileobj(content, handle)
            if sha256_of(path) != about.sha256:
                raise ValueError(f"the checksum of {member.name} does not hold")
            plain.left = _HEADERS
    # 3. to the end of the stream, where its own checksum stands
    while plain.read(1 << 16):
        pass
    if left is None or left:
        raise ValueError(f"it lacks {len(left or '')} files")
    return count
