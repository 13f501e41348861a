"""Rows of Parquet and Arrow files, read in a process of its own: a damaged one may end it.

Run as a program, this file takes paths on its input and writes the rows of each: pickled lists,
then None, or a text that says what is wrong. It imports little, to start fast.
"""

import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = (".parquet", ".arrow", ".feather")
_BATCH = 128  # rows; a file of a few bytes may unpack to a megabyte in each


def table_rows(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of these files with its place. TideError where one is damaged."""
    from shared.system.files import TideError

    command, pipe = [sys.executable, "-P", __file__], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        wanted: Any = process.stdin
        try:
            for path in paths:
                numbers = itertools.count(1)
                try:
                    pickle.dump(str(path.absolute()), wanted)
                    wanted.flush()
                    while isinstance(rows := pickle.load(process.stdout), list):  # type: ignore[arg-type]
                        yield from ((f"{path}:{next(numbers)}", row) for row in rows)
                except (EOFError, OSError, pickle.UnpicklingError):
                    rows = f"reading it ended the process that read it ({process.wait()})"
                if rows is not None:
                    what = f"{path} is no readable {path.suffix[1:]} file: {rows}"
                    raise TideError(what, fix="write it again")
        finally:
            process.kill()  # also where nobody wants more rows


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as source:
        if path.lower().endswith(".parquet"):
            file = pq.ParquetFile(source, page_checksum_verification=True)
            yield from file.iter_batches(_BATCH)
            return
        try:  # with an index at the end
            indexed = pa.ipc.open_file(source)
        except pa.ArrowInvalid:  # without, as `datasets` writes
            yield from pa.ipc.open_stream(source)
        else:
            yield from map(indexed.get_batch, range(indexed.num_record_batches))


def _serve(wanted: Any, out: Any) -> None:
    while path := pickle.load(wanted):
        said = None
        try:
            for batch in _batches(path):
                batch.validate(full=True)
                for start in range(0, batch.num_rows, _BATCH):
                    pickle.dump(batch.slice(start, _BATCH).to_pylist(), out)
        except Exception as error:  # a flipped bit leads the library anywhere
            said = first_line(error)
        pickle.dump(said, out)
        out.flush()


if __name__ == "__main__":
    with suppress(EOFError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
