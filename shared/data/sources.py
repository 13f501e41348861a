"""Rows out of sources: files (JSONL, JSON arrays, CSV, Parquet, Arrow; compressed ones included),
folders and globs of them, what `datasets` saved, the hub, the standard library.

Every row comes with its place, by which reports name it. A file that is cut short is an error,
never a short data set.
"""

import bz2
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from shared.data.stdlib_corpus import SPLITS, iter_stdlib_functions
from shared.data.tables import ENDINGS, first_line, table_rows
from shared.system.files import TideError, read_json

Place = str
Raw = bytes | dict[str, Any]  # a line of JSON still to be read, or a row

LONGEST_LINE = 1 << 24  # bytes: of a longer one no more is read
_MOST_PACKED = 1000  # bytes that a compressed array may have for each of its file
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *ENDINGS)
# What libraries write beside data, and what caches of `datasets` repeat of it.
_FOREIGN = re.compile(r"(dataset_(infos?|dict)|state|.*config|tokenizer)\.json|cache-.*\.arrow")
_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(pa.input_stream(str(path), "zstd"), 1 << 20),  # type: ignore[arg-type]
}


def source_rows(source: str) -> Iterator[tuple[Place, Raw]]:
    """Every row of a source, with its place. TideError where it cannot be read."""
    kind, _, rest = source.partition(":")
    if kind == "stdlib":
        if rest.partition("#")[0] not in SPLITS:
            expected = f"stdlib: and one of {', '.join(SPLITS)}"
            raise TideError(f"unknown split in {source!r}", expected=expected)
        for name, messages in iter_stdlib_functions(rest):
            yield f"{source}:{name}", {"messages": messages}
    elif source.startswith("hf://"):
        yield from _hub_rows(source.removeprefix("hf://"))
    else:
        kinds = itertools.groupby(source_files(source), lambda p: _ending(p) in ENDINGS)
        for tables, files in kinds:
            yield from (table_rows(files) if tables else chain.from_iterable(map(file_rows, files)))


def source_files(source: str) -> list[Path]:
    """The files that a source reads, in order; none for the hub and the standard library.

    TideError where none is there.
    """
    if source.startswith(("hf://", "stdlib:")):
        return []
    path, split = Path(source), None
    named = re.fullmatch(r"(.*)#([\w.\[\]:%-]+)", source)
    if named and not path.exists():  # else the name has a `#` of its own
        path, split = Path(named[1]), named[2]
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _saved_files(path, split)
    # Of a folder all that is in it. A glob's `*` passes over names with a dot in front.
    pattern = f"{glob.escape(str(path))}/**" if path.is_dir() else source
    top, deep, rest = (f"{pattern}/*" if pattern.endswith("**") else pattern).partition("**/")
    patterns = [glob.escape(source) if path.is_file() else pattern]
    if deep:
        folders = chain.from_iterable(map(_folders, glob.glob(top or ".")))
        patterns = [f"{glob.escape(folder)}/{rest}" for folder in folders]
    files = sorted(p for each in patterns for p in map(Path, glob.glob(each)) if p.is_file())
    if path.is_dir() or source.endswith("*"):
        files = [p for p in files if _ending(p) in _ENDINGS or p.suffixes == [".zst"]]
        files = [p for p in files if not _FOREIGN.fullmatch(p.name)]
    seen: set[Path] = set()  # a link to a file that is there would repeat its rows
    files = [p for p in files if (real := p.resolve()) not in seen and not seen.add(real)]
    if not files:
        kinds = f"{', '.join(_ENDINGS)}), a folder or a glob of them, hf://OWNER/NAME, stdlib:train"
        fix = "check the path given as data.source (--data)"
        raise TideError(f"there is no data file {source}", expected=f"a file ({kinds}", fix=fix)
    return files


def _folders(top: str) -> Iterator[str]:
    """A folder and those in it, links followed, each once. What programs keep for themselves has a
    dot or an underscore in front; a cache of ours, and prepared data, are no data.
    """
    seen = set()
    for folder, inside, files in os.walk(top, followlinks=True):
        names, place = {*inside, *files}, os.path.realpath(folder)
        ours = ({"shards", "manifest.json"}, {"parts", ".lock"}, {"run.json"})
        if place in seen or any(own <= names for own in ours):
            inside.clear()
            continue
        seen.add(place)
        inside[:] = sorted(name for name in inside if not name.startswith((".", "_")))
        yield folder


def public_name(source: str) -> str:
    """As others may read it: a path without its folders, an address without user and query."""
    source = re.sub(r"^(\w+://)(?:[^/]*@)?([^?]*)(?:\?[^#]*)?", r"\1\2", source)
    kind = "hf://" if source.startswith("hf://") else ""
    name = source.removeprefix(kind)
    on_the_hub = kind and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if source.startswith("stdlib:") or on_the_hub:
        return source
    return kind + name.rstrip("/").rpartition("/")[2]


# --- Files


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError(f"one of its names stands there twice: {', '.join(made):.80}")
    return made


def file_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Every row of a file with its place. TideError where it is damaged or of no known kind."""
    kind = _ending(path)
    if kind in ENDINGS:
        return table_rows([path])
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, "," if kind == ".csv" else "\t")
    if kind in _ENDINGS or not kind:
        return _json_rows(path)
    expected = f"{', '.join(_ENDINGS)}, also with {', '.join(_OPENERS)}"
    raise TideError(f"{path} has an unknown ending", expected=expected)


def _ending(path: Path) -> str:
    """The kind of a file by its name: `.jsonl` for x.jsonl.zst."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower()


def _json_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    """A row a line, or the rows of one JSON array, which may begin with a whole or a part line."""
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    begins, ends = first[1].lstrip()[:1], first[1].rstrip()[-1:]
    a_row_each = begins == b"{" and (ends == b"}" or _ending(path) != ".json")
    if begins in (b"[", b"{") and not a_row_each:
        most = max(LONGEST_LINE, _MOST_PACKED * path.stat().st_size)
        with _opened(path) as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            what = f"{path} unpacks to more than {most:,} bytes of a single document"
            raise TideError(what, fix="write one row a line")
        try:
            document = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as error:
            if (begins, ends) != (b"[", b"]"):  # else lines that hold lists: each is judged
                what = f"{path} is no JSON array: {str(error)[:120]}"
                raise TideError(what, expected="a list of rows, or one row a line") from error
        else:
            for i, row in enumerate(document if isinstance(document, list) else [document]):
                yield f"{path}[{i}]", row
            return
    for number, line in chain([first], lines):
        yield f"{path}:{number}", line


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[Place, Raw]]:
    def lines() -> Iterator[str]:
        """With their ends, which a quoted field keeps; a carriage return alone ends one too."""
        for line in _lines(path):
            if len(line) > LONGEST_LINE:
                raise csv.Error(f"it is longer than {LONGEST_LINE:,} bytes")
            yield from re.split(r"(?<=\r)(?!\n)", line.decode("utf-8", "surrogateescape") + "\n")

    csv.field_size_limit(LONGEST_LINE)
    reader = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    before = 0
    try:
        if len(set(names := reader.fieldnames or ())) < len(names):
            raise csv.Error(f"a name stands there twice: {', '.join(names)}")
        for row in reader:
            if None in row:
                raise csv.Error(f"it has more fields than the first line ({len(row) - 1})")
            before = reader.line_num
            yield f"{path}:{before}", row
    except csv.Error as error:
        raise TideError(
            f"{path}: the row that begins in line {before + 1} cannot be read: {error}",
            expected="quotes around a field only, and doubled inside of it",
            fix="mend the line: else rows would be cut short, or many read as one",
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of the unpacked file, which end at a line feed and nowhere else, without byte order
    marks. Of one that is too long comes a byte more than may be.
    """
    with _opened(path) as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            rest = line
            while rest and not rest.endswith(b"\n"):  # too long, or the last
                rest = stream.readline(1 << 20)
            yield line.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked file. TideError where it is damaged or ends too early."""
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        what = f"{path} cannot be read to its end: {first_line(error)}"
        fix = "download or write the file again; a part of it would be another data set"
        raise TideError(what, expected="a whole file", fix=fix) from error


# --- Data sets of the library `datasets`


def _saved_files(folder: Path, split: str | None) -> list[Path]:
    """The files that `save_to_disk` wrote to a folder, or of one of its splits, in their order."""
    try:
        whole = folder / "dataset_dict.json"
        splits: list[Any] = read_json(whole)["splits"] if whole.exists() else [split]
        if split not in splits:
            what = f"{folder} holds the splits {', '.join(splits)}"
            raise TideError(what, fix=f"write {folder}#{splits[0]}")
        folder = folder / (split or "") if whole.exists() else folder
        state = read_json(folder / "state.json")
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        what = f"{folder} could not be read as a data set that was saved: {error!r}"
        raise TideError(what, fix="save it again") from error


def parse_hub_name(text: str) -> tuple[str, list[str], str | None]:
    """Name, parts and split of `OWNER/NAME[:CONFIG][:SPLIT]` or `OWNER/NAME[:CONFIG]#SPLIT`, where
    SPLIT may be a slice such as `train[:95%]` and CONFIG may be `*`.
    """
    place, _, split = text.partition("#")
    name, *parts = place.split(":")
    if not name or len(parts) > 2 or (split and len(parts) > 1):
        expected = "hf://OWNER/NAME[:CONFIG][:SPLIT] or hf://OWNER/NAME[:CONFIG]#SPLIT"
        raise TideError(f"hf://{text} names no data set", expected=expected)
    return name, parts, split or None


def _hub_rows(text: str) -> Iterator[tuple[Place, Raw]]:
    """Rows of a data set of the hub, streamed; a slice of a split is fetched whole."""
    import datasets

    name, parts, split = parse_hub_name(text)
    datasets.logging.set_verbosity_error()
    try:
        # 1. Which configurations, and which split. A single part names a configuration where the
        #    data set has one of that name, else a split.
        known = datasets.get_dataset_config_names(name)
        alone = len(parts) == 1 and not split and parts[0] not in ("*", *known)
        config = None if alone or not parts else parts[0]
        split = split or ("train" if not alone and len(parts) < 2 else parts[-1])
        if config is None and len(known) > 1 and "default" not in known:
            what = f"hf://{name} has {len(known)} configurations and no default: "
            fix = f"write hf://{name}:{known[0]}, or hf://{name}:* for all of them"
            raise TideError(what + ", ".join(known[:20]), fix=fix)
        # 2. Their rows.
        for each in known if config == "*" else [config]:
            rows = datasets.load_dataset(name, each, split=split, streaming="[" not in split)
            place = f"hf://{name}" + (f":{each}" if each else "") + f"#{split}"
            for number, row in enumerate(rows, 1):
                yield f"{place}:{number}", row
    except TideError:
        raise
    except Exception as error:  # the library raises many types, most of them about the network
        raise TideError(
            f"hf://{text} could not be read: {first_line(error)}",
            expected="a data set on the hub: hf://OWNER/NAME:CONFIG:SPLIT or …#train[:95%]",
            fix="check name, configuration, split and network, or give a path to the data",
        ) from error
