"""Rows of Parquet and Arrow files, read in a process of its own: a damaged one may end it.

Run as a program, this file takes paths on its input, a line each, and writes the rows of each:
pickled lists, then None, or what is wrong as a text. It imports little, to start fast.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

ENDINGS = (".parquet", ".arrow", ".feather")
_BATCH = 128  # rows; a file of a few bytes may unpack to a megabyte in each


def table_rows(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of these files with its place. TideError where one is damaged."""
    from shared.system.files import TideError

    command = [sys.executable, "-P", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            for path in paths:
                number, rows = 0, None
                try:
                    process.stdin.write(b"%b\n" % bytes(path.absolute()).hex().encode())
                    process.stdin.flush()
                    while isinstance(rows := pickle.load(process.stdout), list):
                        for row in rows:
                            number += 1
                            yield f"{path}:{number}", row
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


def _serve(wanted: BinaryIO, out: BinaryIO) -> None:
    for line in wanted:
        path = Path(bytes.fromhex(line.decode()).decode(errors="surrogateescape"))
        said = None
        try:
            for batch in _batches(path):
                batch.validate(full=True)
                pickle.dump(batch.to_pylist(), out)
        except Exception as error:  # a flipped bit leads the library anywhere
            said = first_line(error)
        pickle.dump(said, out)
        out.flush()


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            file = pq.ParquetFile(source, page_checksum_verification=True)
            yield from file.iter_batches(batch_size=_BATCH)
            return
        try:  # with an index at the end
            reader: Any = pa.ipc.open_file(source)
            whole = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # without, as `datasets` writes
            whole = pa.ipc.open_stream(source)
        for batch in whole:
            batch.validate(full=True)
            yield from (batch.slice(at, _BATCH) for at in range(0, batch.num_rows, _BATCH))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
