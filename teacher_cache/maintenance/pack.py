"""`tide pack`: a whole cache as one .tar.zst, every file with its SHA-256. The first member is `checksums.json`."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import zstandard
from tqdm import tqdm

from shared.cache.ledger import LEDGER, settle_ledger
from shared.cache.manifest import MANIFEST, load_manifest, refuse_unfinished
from shared.cache.vocabulary import TABLES
from shared.system.atomic import atomic_file

CHECKSUMS = "checksums.json"
_LEVEL = 3  # shards are compressed already


def pack_cache(cache: Path, archive: Path) -> int:
    """Write the cache to `archive`; its number of files. TideError where the cache is not finished."""
    manifest = load_manifest(cache)
    refuse_unfinished(cache, manifest)
    settle_ledger(cache, manifest)
    others = [
        path
        for path in sorted([*cache.glob("*_tokenizer/*"), *cache.glob(f"{TABLES}/*")])
        if path.is_file()
    ]
    files = [
        cache / MANIFEST,
        cache / LEDGER,
        *others,
        *(unit.path(cache) for unit in manifest.units()),
    ]
    sums = {}
    for path in tqdm(files, unit="file", desc="checksums"):
        sums[path.relative_to(cache).as_posix()] = {
            "sha256": _sha256(path),
            "bytes": path.stat().st_size,
        }

    with atomic_file(archive) as handle:
        with (
            zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(
                handle, closefd=False
            ) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            note = json.dumps(sums, indent=1).encode()
            tar.addfile(_member(CHECKSUMS, len(note)), io.BytesIO(note))
            for path in tqdm(files, unit="file", desc="pack"):
                with path.open("rb") as content:
                    tar.addfile(
                        _member(path.relative_to(cache).as_posix(), path.stat().st_size), content
                    )

    return len(files)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
