"""Rows out of files: JSONL, JSON arrays, CSV, Parquet, Arrow, each with its place; compressed ones included.

A file that is cut short is an error, never a short data set.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shared.system.errors import TideError

Place = str
Raw = bytes | dict[str, Any]
"""A line of JSON still to be read, or a row."""

_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_CHUNK = 1 << 20
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")


def ending(path: Path) -> str:
    """The kind of a file by its name: `.jsonl` for x.jsonl.zst."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower()


def is_data_file(path: Path) -> bool:
    """Whether `file_rows` knows the file's ending."""
    return ending(path) in ENDINGS or path.suffix == ".zst"


def file_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Every row of a file with its place. TideError where the file is damaged or of no known kind."""
    kind = ending(path)
    if kind in (".parquet", ".arrow", ".feather"):
        return _table_rows(path, kind)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson", ".json", ""):
        return _json_rows(path)
    raise TideError(
        f"{path} has an unknown ending",
        expected=", ".join(ENDINGS) + f", also with {', '.join(_COMPRESSED)}",
    )


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's content, decompressed. TideError where it is damaged or ends too early."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".zst":
                yield from _zstd_blocks(raw)
                return
            opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(
                path.suffix.lower()
            )
            with opened(raw) if opened else raw as stream:
                while block := stream.read(_CHUNK):
                    yield block
    except (
        zstandard.ZstdError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        gzip.BadGzipFile,
        OSError,
    ) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise TideError(
            f"{path} cannot be read to its end: {reason}",
            expected="a whole file",
            fix="download or write the file again; a part of it would be another data set",
        ) from error


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Frame after frame."""
    frame, rest, begun = zstandard.ZstdDecompressor().decompressobj(), b"", False
    while block := rest or raw.read(_CHUNK):
        found = frame.decompress(block)
        begun, rest = True, b""
        if found:
            yield found
        if frame.eof:
            rest = frame.unused_data
            frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    if begun:
        raise EOFError("it ends within a zstandard frame")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines, which end at a line feed and nowhere else; without a byte order mark."""
    rest, first = b"", True
    for block in _blocks(path):
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False  # noqa: PLW2901
        *whole, rest = (rest + block).split(b"\n") if b"\n" in block else [rest + block]
        yield from whole
    if rest:
        yield rest


def _json_rows(path: Path) -> Iterator[tuple[Place, Raw]]:
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    whole = _whole_document(path, first[1])
    if whole is not None:
        yield from ((f"{path}[{i}]", row) for i, row in enumerate(whole))
        return
    for number, line in itertools.chain([first], lines):
        yield f"{path}:{number}", line


def _whole_document(path: Path, line: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON array; None where it holds a row a line. TideError for another document."""
    start = line.strip()
    if start[:1] == b"{" and (start[-1:] == b"}" or ending(path) != ".json"):
        return None
    if start[:1] not in (b"[", b"{"):
        return None
    try:
        content = json.loads(b"".join(_blocks(path)).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if start[:1] == b"[" and start[-1:] == b"]":
            return None  # lines that hold lists: each is judged as a row
        raise TideError(
            f"{path} is no JSON array: {str(error)[:120]}",
            expected="a list of rows, or one row a line (JSONL)",
            fix="mend the file, or write one JSON object a line",
        ) from error
    if not isinstance(content, list):
        raise TideError(
            f"{path} holds one JSON object with the fields {', '.join(map(str, content))}",
            expected="an array of rows, or one row a line (JSONL)",
            fix="write the list of rows alone",
        )
    return content


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[Place, Raw]]:
    csv.field_size_limit(1 << 24)
    stream: Any = io.BufferedReader(_Stream(_blocks(path)))
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, delimiter=delimiter)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", {str(k): v for k, v in row.items()}
    except csv.Error as error:
        raise TideError(f"{path}, line {reader.line_num}: {error}", fix="mend the line") from error


class _Stream(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def _table_rows(path: Path, kind: str) -> Iterator[tuple[Place, Raw]]:
    number = 0
    try:
        for batch in (
            pq.ParquetFile(path).iter_batches(batch_size=1024)
            if kind == ".parquet"
            else _arrow_batches(path)
        ):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        name = "Parquet" if kind == ".parquet" else "Arrow"
        raise TideError(
            f"{path} is no readable {name} file: {(str(error).splitlines() or [''])[0]}",
            fix="write the file again",
        ) from error


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Arrow's two layouts: with an index at the end (a file), or without (a stream, as `datasets` writes)."""
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:
            batches = iter(pa.ipc.open_stream(source))
        yield from batches
