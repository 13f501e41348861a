"""Rows out of files: JSONL, JSON arrays, CSV, Parquet, Arrow; compressed ones included.

Every row comes with its place. A file that is cut short is an error, never a short data set.
"""

import bz2
import csv
import gzip
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
import zstandard

from shared.system.errors import TideError

Place = str
Raw = bytes | dict[str, Any]  # a line of JSON still to be read, or a row

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_BLOCK_BYTES = 1 << 20


def file_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Every row of a file with its place. TideError where it is damaged or of no known kind."""
    kind = _ending(path)
    if kind in (".parquet", ".arrow", ".feather"):
        return _table_rows(path, kind)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson", ".json", ""):
        return _json_rows(path)
    expected = f"{', '.join(ENDINGS)}, also with {', '.join(_COMPRESSED)}"
    raise TideError(f"{path} has an unknown ending", expected=expected)


def is_data_file(path: Path) -> bool:
    """Whether the name is one of a file of data."""
    return _ending(path) in ENDINGS or path.suffix == ".zst"


def _ending(path: Path) -> str:
    """The kind of a file by its name: `.jsonl` for x.jsonl.zst."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower()


def _json_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    rows = _whole_document(path, first[1].strip())
    if rows is not None:
        for i, row in enumerate(rows):
            yield f"{path}[{i}]", row
        return
    for number, line in itertools.chain([first], lines):
        yield f"{path}:{number}", line


def _whole_document(path: Path, first: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON array; None where it holds a row a line.

    `first` is its first line. TideError where the file is another document.
    """
    begins_array, ends_array = first.startswith(b"["), first.endswith(b"]")
    begins_object, ends_object = first.startswith(b"{"), first.endswith(b"}")
    if begins_object and (ends_object or _ending(path) != ".json"):
        return None
    if not begins_array and not begins_object:
        return None
    try:
        document = json.loads(b"".join(_blocks(path)).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if begins_array and ends_array:
            return None  # lines that hold lists: each is judged as a row
        raise TideError(
            f"{path} is no JSON array: {str(error)[:120]}",
            expected="a list of rows, or one row a line (JSONL)",
            fix="mend the file, or write one JSON object a line",
        ) from error
    if not isinstance(document, list):
        raise TideError(
            f"{path} holds one JSON object with the fields {', '.join(map(str, document))}",
            expected="an array of rows, or one row a line (JSONL)",
            fix="write the list of rows alone",
        )
    return document


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[Place, Raw]]:
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(_csv_lines(path), delimiter=delimiter)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", {str(k): v for k, v in row.items()}
    except csv.Error as error:
        raise TideError(f"{path}, line {reader.line_num}: {error}", fix="mend the line") from error


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, which a quoted field keeps; a carriage return alone ends one too."""
    for line in _lines(path):
        text = line.decode("utf-8", "surrogateescape") + "\n"
        yield from re.split(r"(?<=\r)(?!\n)", text)


def _table_rows(path: Path, kind: str) -> Iterator[tuple[Place, Raw]]:
    number = 0
    try:
        if kind == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        else:
            batches = _arrow_batches(path)
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        name = "Parquet" if kind == ".parquet" else "Arrow"
        reason = (str(error).splitlines() or [""])[0]
        raise TideError(
            f"{path} is no readable {name} file: {reason}", fix="write it again"
        ) from error


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Arrow's two layouts: with an index at the end (a file), or without (a stream, as `datasets`
    writes).
    """
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:
            batches = iter(pa.ipc.open_stream(source))
        yield from batches


def _lines(path: Path) -> Iterator[bytes]:
    """Lines, which end at a line feed and nowhere else; without a byte order mark."""
    rest, begun = b"", False
    for block in _blocks(path):
        text = block if begun else block.removeprefix(b"\xef\xbb\xbf")
        begun = True
        if b"\n" not in text:
            rest += text
            continue
        *whole, rest = (rest + text).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's content, decompressed. TideError where it is damaged or ends too early."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    kind = path.suffix.lower()
    try:
        if kind == ".zst":
            yield from _zstd_blocks(path)
            return
        with openers.get(kind, Path.open)(path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except (zstandard.ZstdError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise TideError(
            f"{path} cannot be read to its end: {reason}",
            expected="a whole file",
            fix="download or write the file again; a part of it would be another data set",
        ) from error


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    """Frame after frame. EOFError within one: the library itself takes a part for the whole."""
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    with path.open("rb") as stream:
        rest = b""
        while packed := rest or stream.read(_BLOCK_BYTES):
            block = frame.decompress(packed)
            inside, rest = True, b""
            if block:
                yield block
            if frame.eof:
                rest = frame.unused_data
                frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    if inside:
        raise EOFError("it ends within a zstandard frame")
