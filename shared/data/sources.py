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
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.data.stdlib_corpus import SPLITS, corpus_origin, iter_stdlib_functions
from shared.system.files import TideError

Place = str
Raw = bytes | dict[str, Any]  # a line of JSON still to be read, or a row

_TABLES = (".parquet", ".arrow", ".feather")
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *_TABLES)
_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(pa.input_stream(str(path), "zstd"), 1 << 20),  # type: ignore[arg-type]
}


def source_rows(source: str) -> Iterator[tuple[Place, Raw]]:
    """Every row of a source, with its place. TideError where it cannot be read."""
    kind, _, rest = source.partition(":")
    path, split = _split_of(source)
    if kind == "stdlib":
        if rest.partition("#")[0] not in SPLITS:
            expected = f"stdlib: and one of {', '.join(SPLITS)}"
            raise TideError(f"unknown split in {source!r}", expected=expected)
        for name, messages in iter_stdlib_functions(rest):
            yield f"{source}:{name}", {"messages": messages}
    elif source.startswith("hf://"):
        yield from _hub_rows(source.removeprefix("hf://"))
    elif _is_saved(path):
        yield from _saved_rows(path, split)
    else:
        for file in source_files(source):
            yield from file_rows(file)


def source_files(source: str) -> list[Path]:
    """The files that a source reads, in order; none for the hub and the standard library.

    TideError where none is there.
    """
    if source.startswith(("hf://", "stdlib:")):
        return []
    path, _ = _split_of(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        if not _is_saved(path):
            files = [p for p in files if _ending(p) in _ENDINGS or p.suffix == ".zst"]
    else:
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
    if not files:
        raise TideError(
            f"there is no data file {source}",
            expected=f"a file ({', '.join(_ENDINGS)}), a folder or a glob of them, hf://OWNER/NAME,"
            " or stdlib:train",
            fix="check the path given as data.source (--data)",
        )
    return files


def describe_source(source: str) -> str:
    """The source in words, with what it cannot say of itself."""
    return f"{source} ({corpus_origin()})" if source.startswith("stdlib:") else source


def public_name(source: str) -> str:
    """As others may read it: a path without its folders, an address without user and query."""
    source = re.sub(r"^(\w+://)(?:[^/]*@)?([^?]*)(?:\?[^#]*)?", r"\1\2", source)
    kind = "hf://" if source.startswith("hf://") else ""
    name = source.removeprefix(kind)
    on_the_hub = kind and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if source.startswith("stdlib:") or on_the_hub:
        return source
    return kind + name.rstrip("/").rpartition("/")[2]


def _split_of(source: str) -> tuple[Path, str | None]:
    """`PATH#SPLIT` in two; a path that has a `#` of its own stays whole."""
    match = re.fullmatch(r"(.*)#([\w.\[\]:%-]+)", source)
    if match and not Path(source).exists():
        return Path(match[1]), match[2]
    return Path(source), None


# --- Files


def file_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Every row of a file with its place. TideError where it is damaged or of no known kind."""
    kind = _ending(path)
    if kind in _TABLES:
        return _table_rows(path, kind)
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
    begins, ends = first[1].strip()[:1], first[1].strip()[-1:]
    a_row_each = begins == b"{" and (ends == b"}" or _ending(path) != ".json")
    if begins in (b"[", b"{") and not a_row_each:
        try:
            document = json.loads(b"\n".join(_lines(path)).decode())
        except (ValueError, RecursionError) as error:
            if (begins, ends) != (b"[", b"]"):  # else lines that hold lists: each is judged
                what = f"{path} is no JSON array: {str(error)[:120]}"
                raise TideError(what, expected="a list of rows, or one row a line") from error
        else:
            if not isinstance(document, list):
                what = f"{path} holds one JSON object with the fields {', '.join(document)}"
                raise TideError(what, expected="a list of rows, or one row a line")
            for i, row in enumerate(document):
                yield f"{path}[{i}]", row
            return
    for number, line in itertools.chain([first], lines):
        yield f"{path}:{number}", line


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[Place, Raw]]:
    def lines() -> Iterator[str]:
        """With their ends, which a quoted field keeps; a carriage return alone ends one too."""
        for line in _lines(path):
            yield from re.split(r"(?<=\r)(?!\n)", line.decode("utf-8", "surrogateescape") + "\n")

    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(lines(), delimiter=delimiter)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", {str(k): v for k, v in row.items()}
    except csv.Error as error:
        raise TideError(f"{path}, line {reader.line_num}: {error}", fix="mend the line") from error


def _table_rows(path: Path, kind: str) -> Iterator[tuple[Place, Raw]]:
    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            try:
                if kind == ".parquet":
                    batches = pq.ParquetFile(source).iter_batches(batch_size=1024)
                else:  # with an index at the end
                    file = pa.ipc.open_file(source)
                    batches = (file.get_batch(i) for i in range(file.num_record_batches))
            except pa.ArrowInvalid:  # without, as `datasets` writes
                batches = pa.ipc.open_stream(source)
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"{path} is no readable {kind[1:]} file: {_first_line(error)}"
        raise TideError(what, fix="write it again") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of the unpacked file, which end at a line feed and nowhere else; without a byte order
    mark. TideError where it is damaged or ends too early.
    """
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as stream:
            for number, line in enumerate(stream):
                yield (line if number else line.removeprefix(b"\xef\xbb\xbf")).removesuffix(b"\n")
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise TideError(
            f"{path} cannot be read to its end: {_first_line(error)}",
            expected="a whole file",
            fix="download or write the file again; a part of it would be another data set",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- Data sets of the library `datasets`


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved_rows(folder: Path, split: str | None) -> Iterator[tuple[Place, Raw]]:
    datasets = _datasets()
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        what = f"{folder} could not be read by `datasets`: {_first_line(error)}"
        raise TideError(what, fix="save it again") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            what = f"{folder} holds the splits {', '.join(rows)}"
            raise TideError(what, fix=f"write {folder}#{next(iter(rows))}")
        rows = rows[split]
    for number, row in enumerate(rows, 1):
        yield f"{folder}:{number}", row


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
    name, parts, split = parse_hub_name(text)
    datasets = _datasets()
    try:
        # 1. Which configurations, and which split. A single part names a configuration where the
        #    data set has one of that name, else a split.
        if len(parts) == 2 and parts[0] != "*":
            configs, split = [parts[0]], parts[1]
        else:
            configs = datasets.get_dataset_config_names(name)
            if parts and parts[0] == "*":
                split = split or (parts[1] if len(parts) == 2 else None)
            elif parts and (split is not None or parts[0] in configs):
                configs = [parts[0]]
            elif len(configs) > 1 and "default" not in configs:
                raise TideError(
                    f"hf://{name} has {len(configs)} configurations and no default: "
                    f"{', '.join(configs[:20])}",
                    fix=f"write hf://{name}:{configs[0]}, or hf://{name}:* for all of them",
                )
            else:
                configs, split = [None], split or (parts[0] if parts else None)
        split = split or "train"
        # 2. Their rows.
        for config in configs:
            rows = datasets.load_dataset(name, config, split=split, streaming="[" not in split)
            place = f"hf://{name}" + (f":{config}" if config else "") + f"#{split}"
            for number, row in enumerate(rows, 1):
                yield f"{place}:{number}", row
    except TideError:
        raise
    except Exception as error:  # the library raises many types, most of them about the network
        raise TideError(
            f"hf://{text} could not be read: {_first_line(error)}",
            expected="a data set on the hub, as hf://OWNER/NAME:CONFIG:SPLIT or "
            "hf://OWNER/NAME#train[:95%]",
            fix="check name, configuration, split and network, or give a path to the data",
        ) from error


def _datasets() -> Any:
    import datasets
    from datasets.utils import logging

    logging.set_verbosity_error()
    return datasets
