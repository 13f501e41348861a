"""Checkpoints on disk: which are whole, by the SHA-256 of every file, and which go when newer ones are there.

A checkpoint is a folder `checkpoint-STEP` of several files. Its marker `COMPLETE` is written last and holds the hash of
each, so that a folder that was half written, or changed since, is never gone on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.system.atomic import write_bytes

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_READ_BY_TRAINER = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A marked folder: its optimizer step, and the seconds of training up to it."""

    folder: Path
    step: int
    seconds: float


def _folders(place: Path) -> dict[int, Path]:
    """The folders with a checkpoint's name, by step."""
    found = (
        (_NAME.fullmatch(path.name), path) for path in place.glob("checkpoint-*") if path.is_dir()
    )
    return {int(name[1]): path for name, path in found if name is not None}


def mark(folder: Path, step: int, seconds: float) -> None:
    """Declare a checkpoint whole: sync its files, and write the marker."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == MARKER:
            continue
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            files[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                handle, "sha256"
            ).hexdigest()
    note = {"step": step, "seconds": round(seconds, 3), "files": files}
    note |= {"sum": _sum(note)}
    write_bytes(folder / MARKER, (json.dumps(note, indent=1) + "\n").encode())


def rotate(place: Path, keep: int) -> None:
    """Delete all marked checkpoints but the `keep` of the highest steps. Dates count for nothing; other names stay."""
    marked = [folder for _, folder in sorted(_folders(place).items()) if (folder / MARKER).exists()]
    for folder in marked[:-keep]:
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first: killed on the way it is a broken one, not a damaged one."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def whole_checkpoints(place: Path) -> list[Checkpoint]:
    """Marked checkpoints, oldest first, all their hashes looked at. Damaged ones are named on stderr and left out."""
    found = []
    for step, folder in sorted(_folders(place).items()):
        if not (folder / MARKER).exists():
            continue
        note, problem = _note(folder, step)
        problem = problem or _problem(folder, note.get("files", {}))
        if problem is None:
            found.append(Checkpoint(folder, step, float(note["seconds"])))
        else:
            print(f"checkpoint {folder} is damaged and not used: {problem}", file=sys.stderr)
    return found


def clear(place: Path, whole: list[Checkpoint]) -> None:
    """Make room for steps that will be computed again: half-written checkpoints go, damaged ones are put aside as
    `damaged-checkpoint-STEP`. Nothing without a checkpoint's name is touched.
    """
    good = {checkpoint.folder for checkpoint in whole}
    for folder in _folders(place).values():
        if folder in good:
            continue
        if (folder / MARKER).exists():
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        else:
            shutil.rmtree(folder)


def _sum(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _note(folder: Path, step: int) -> tuple[dict[str, Any], str | None]:
    """What the marker says, and what is wrong with it."""
    try:
        note = json.loads((folder / MARKER).read_text())
        if isinstance(note, float):  # an earlier version wrote the seconds alone
            return {"seconds": note, "files": None}, None
        fits = (
            note.pop("sum") == _sum(note) and note["step"] == step and float(note["seconds"]) >= 0
        )
        fits = fits and all(
            isinstance(name, str) and isinstance(v, str) for name, v in note["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f"{MARKER} cannot be read"
    return (note, None) if fits else ({}, f"{MARKER} is not that of this checkpoint")


def _problem(folder: Path, files: dict[str, str] | None) -> str | None:
    """The first file that is not what the marker says; None where all are."""
    if files is None:
        print(
            f"checkpoint {folder} is of an earlier version, without hashes: it cannot be checked",
            file=sys.stderr,
        )
        return None
    for name, expected in files.items():
        try:
            with (folder / name).open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} is not what was written (SHA-256 {found[:16]}… instead of {expected[:16]}…)"
    for path in folder.rglob("*"):
        if path.suffix in _READ_BY_TRAINER and path.relative_to(folder).as_posix() not in files:
            return f"{path.name} was not written with it"
    return None
