"""`make bench`: ratios measured side by side in one run. Absolute times are this machine's and are not compared."""

from __future__ import annotations

from pathlib import Path

from pipelines.speed.alignment import bench_alignment
from pipelines.speed.end_to_end import bench_end_to_end
from pipelines.speed.engines import bench_engines
from pipelines.speed.head import bench_head
from pipelines.speed.large_cache import bench_large_cache
from pipelines.speed.preparing import bench_preparing
from pipelines.speed.rehearsed import bench_rehearsed
from pipelines.speed.serving import bench_serving
from pipelines.speed.shortcuts import bench_shortcuts
from pipelines.speed.stage_one import bench_stage_one
from pipelines.speed.training import bench_training
from pipelines.speed.use import bench_use
from pipelines.terminal import print_table
from shared.system.errors import TideError

TABLES = {
    "preparing": bench_preparing,
    "alignment": bench_alignment,
    "engines": bench_engines,
    "stage-one": bench_stage_one,
    "end-to-end": bench_end_to_end,
    "training": bench_training,
    "head": bench_head,
    "shortcuts": bench_shortcuts,
    "rehearsed": bench_rehearsed,
    "large-cache": bench_large_cache,
    "use": bench_use,
    "serving": bench_serving,
}


def run_bench(only: str | None = None, figure: Path | None = None) -> None:
    """Print all tables, or one of `TABLES`. `figure`: where the picture of `use` goes."""
    if only is not None and only not in TABLES:
        raise TideError(f"unknown table {only!r}", expected=f"one of {', '.join(TABLES)}")
    for name, measure in TABLES.items():
        if only in (None, name):
            print_table(measure() if figure is None or name != "use" else bench_use(figure))
