"""`make bench`: ratios measured side by side in one run. Absolute times are this machine's."""

from pipelines.speed.head import bench_head
from pipelines.speed.loader import bench_loader
from pipelines.speed.stages import bench_stages
from pipelines.speed.use import bench_use
from pipelines.terminal import print_table
from shared.system.errors import TideError

TABLES = {"stages": bench_stages, "head": bench_head, "loader": bench_loader, "use": bench_use}


def run_bench(only: str | None = None) -> None:
    """Print all tables, or one of `TABLES`."""
    if only is not None and only not in TABLES:
        raise TideError(f"unknown table {only!r}", expected=f"one of {', '.join(TABLES)}")
    for name, measure in TABLES.items():
        if only in (None, name):
            print_table(measure())
