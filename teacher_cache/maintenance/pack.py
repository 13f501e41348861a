"""`tide pack` and `tide unpack`: a whole cache as one .tar.zst, and the folder that it was.

The first member, `checksums.json`, has the size and SHA-256 of every file. An archive is believed
no further: no more than it says there is read into memory or written, and only names that caches
have.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import zstandard
from pydantic import Field, TypeAdapter
from tqdm import tqdm

from shared.cache.ledger import LEDGER, settle_ledger
from shared.cache.manifest import MANIFEST, load_manifest, refuse_unfinished
from shared.cache.shards import TABLES
from shared.cache.stores import belongs_to_cache
from shared.settings.build import strict
from shared.system.errors import TideError
from shared.system.files import atomic_file, new_folder, refuse_odd, remove_leftovers

CHECKSUMS = "checksums.json"
_LEVEL = 3  # shards are compressed already
_HEADERS = 1 << 20  # bytes between two files, at most: their headers and padding
_LARGEST_NOTE = 64 << 20  # bytes
_WINDOW = 128 << 20  # memory that zstandard takes to unpack, at most
_ERRORS = (
    OSError, EOFError, ValueError, RecursionError, MemoryError, tarfile.TarError,
    zstandard.ZstdError,
)  # fmt: skip


@strict
class _Member:
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def pack_cache(cache: Path, archive: Path) -> int:
    """Write the cache to `archive`; its number of files.

    TideError where the cache is not finished.
    """
    manifest = load_manifest(cache)
    refuse_unfinished(cache, manifest)
    settle_ledger(cache, manifest)
    small = sorted([*cache.glob("*_tokenizer/*"), *cache.glob(f"{TABLES}/*")])
    files = [cache / MANIFEST, cache / LEDGER, *(path for path in small if path.is_file())]
    files += [unit.path(cache) for unit in manifest.units()]
    names = {path: path.relative_to(cache).as_posix() for path in files}
    sums = {}
    for path in tqdm(files, unit="file", desc="checksums"):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        sums[names[path]] = {"sha256": digest, "bytes": path.stat().st_size}
    note = json.dumps(sums, indent=1).encode()
    packer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with (
        atomic_file(archive) as handle,
        packer.stream_writer(handle, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        member = tarfile.TarInfo(CHECKSUMS)
        member.size = len(note)
        tar.addfile(member, io.BytesIO(note))
        for path in tqdm(files, unit="file", desc="pack"):
            member = tarfile.TarInfo(names[path])
            member.size = sums[names[path]]["bytes"]
            with path.open("rb") as content:
                tar.addfile(member, content)
    return len(files)


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
    """Read `archive` into the new folder `cache`; its number of files.

    TideError where a byte is wrong.
    """
    if cache.is_symlink() or (cache.exists() and (not cache.is_dir() or any(cache.iterdir()))):
        raise TideError(f"{cache} is not empty, or no folder", expected="a new folder")
    if cache.resolve() == Path.cwd():
        raise TideError(f"{cache} is the folder that you are in", fix="name one inside it")
    refuse_odd(archive)
    cache = cache.absolute()
    if not cache.exists():
        remove_leftovers([cache])
    reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        with new_folder(cache) as folder:
            with archive.open("rb") as raw, reader.stream_reader(raw) as plain:
                count = _extract(_Bounded(plain), folder)
            load_manifest(folder)
    except TideError:
        raise
    except _ERRORS as error:
        raise TideError(
            f"{archive} cannot be unpacked: {str(error)[:500] or type(error).__name__}",
            expected="a whole archive written by `tide pack`",
            fix="copy it again; nothing was left in the folder",
        ) from error
    return count


def _extract(plain: _Bounded, folder: Path) -> int:
    """Every file of the tar archive `plain` into `folder`; how many.

    ValueError where one is wrong.
    """
    with tarfile.open(fileobj=plain, mode="r|") as tar:  # type: ignore[call-overload]

        def members() -> Iterator[tuple[tarfile.TarInfo, Any]]:
            while (member := tar.next()) is not None:
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise ValueError(f"{member.name[:200]!r} is no file")
                yield member, content

        stream = members()
        # 1. the note: what the archive holds
        member, content = next(stream)
        if member.name != CHECKSUMS or member.size > _LARGEST_NOTE:
            raise ValueError(f"it does not begin with {CHECKSUMS}")
        plain.left = member.size + _HEADERS
        note = TypeAdapter(dict[str, _Member]).validate_json(content.read())
        for name in note:
            if not belongs_to_cache(name):
                raise ValueError(f"{name[:200]!r} is no file of a cache")
        whole, free = sum(about.bytes for about in note.values()), shutil.disk_usage(folder).free
        if whole > free:
            raise TideError(
                f"the archive holds {whole:,} bytes, and {folder.parent} has {free:,} free",
                fix="free some space, or unpack it elsewhere",
            )
        # 2. the files, each as the note says
        left = dict(note)
        for member, content in tqdm(stream, total=len(note), unit="file", desc="unpack"):
            about = left.pop(member.name, None)
            if about is None or member.size != about.bytes:
                raise ValueError(f"{member.name[:200]!r} is not as {CHECKSUMS} says")
            plain.left = about.bytes + _HEADERS
            path = folder / member.name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as handle:
                shutil.copyfileobj(content, handle)
            with path.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != about.sha256:
                    raise ValueError(f"the checksum of {member.name} does not hold")
            plain.left = _HEADERS
    # 3. to the end of the stream, where its own checksum stands
    while plain.read(1 << 16):
        pass
    if left:
        raise ValueError(f"it lacks {len(left)} files, the first is {min(left)}")
    return len(note)
