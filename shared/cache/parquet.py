"""Parquet files: whole or absent, every page with its checksum."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.system.errors import TideError
from shared.system.files import atomic_file


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write `table` atomically. TideError as `atomic_file`."""
    with atomic_file(path) as handle:
        pq.write_table(table, handle, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path, fix: str, content: bytes | None = None) -> pa.Table:
    """The table in a file, whose bytes may be at hand (`content`).

    TideError, with `fix`, where it is damaged.
    """
    source: Any = path if content is None else pa.BufferReader(content)
    try:
        return pq.ParquetFile(source, page_checksum_verification=True).read()
    except Exception as error:  # a footer with a flipped bit leads the library anywhere
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TideError(
            f"{path} cannot be read: {reason}", expected="a whole Parquet file", fix=fix
        ) from error
