"""Where rows come from: a file, a folder of them, a glob, a saved data set, the hub, the standard library."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from shared.data.files import ENDINGS, Place, Raw, file_rows, is_data_file
from shared.data.hub import hub_rows, is_saved, saved_rows, split_of
from shared.data.stdlib_corpus import corpus_origin, iter_stdlib_functions
from shared.system.errors import TideError


def source_files(source: str) -> list[Path]:
    """The files that a source reads, in order; empty for the hub and the standard library. TideError where none is
    there.
    """
    if source.startswith(("hf://", "stdlib:")):
        return []
    path = Path(split_of(source)[0])
    if path.is_file():
        return [path]
    if path.is_dir():
        saved = is_saved(path)
        found = sorted(p for p in path.rglob("*") if p.is_file() and (saved or is_data_file(p)))
        if not found:
            raise TideError(
                f"the folder {source} holds no data files",
                expected=f"files in {', '.join(ENDINGS)}",
            )
        return found
    if glob.has_magic(source):
        found = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
        if found:
            return found
    raise TideError(
        f"there is no data file {source}",
        expected=f"a file ({', '.join(ENDINGS)}), a folder or a glob of them, hf://OWNER/NAME, or stdlib:train",
        fix="check the path given as data.source (--data)",
    )


def source_rows(source: str) -> Iterator[tuple[Place, Raw]]:
    """Every row of a source, with its place."""
    if source.startswith("stdlib:"):
        split = source.removeprefix("stdlib:")
        if split not in ("train", "heldout", "all"):
            raise TideError(
                f"unknown split in {source!r}",
                expected="stdlib:train, stdlib:heldout or stdlib:all",
            )
        return (
            (f"{source}:{f.name}", {"messages": f.messages()}) for f in iter_stdlib_functions(split)
        )
    if source.startswith("hf://"):
        return hub_rows(source.removeprefix("hf://"))
    place, split = split_of(source)
    if Path(place).is_dir() and is_saved(Path(place)):
        return saved_rows(Path(place), split)
    return (row for path in source_files(source) for row in file_rows(path))


def describe_source(source: str) -> str:
    """The source in words, with what it cannot say of itself."""
    return f"{source} ({corpus_origin()})" if source.startswith("stdlib:") else source


def public_name(source: str) -> str:
    """The source as others may read it: a path of this machine loses its folders."""
    kind = "hf://" if source.startswith("hf://") else ""
    name = source.removeprefix(kind)
    if source.startswith("stdlib:") or (
        kind and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    ):
        return source
    return kind + name.rstrip("/").rpartition("/")[2]
