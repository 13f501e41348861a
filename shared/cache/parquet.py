"""Parquet files that are no shards: whole or absent, with page checksums."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shared.system.atomic import write_atomically


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write `table` atomically. TideError as `write_atomically`."""

    def write(handle: BinaryIO) -> None:
        pq.write_table(table, handle, compression="zstd", write_page_checksum=True)

    write_atomically(path, write)
