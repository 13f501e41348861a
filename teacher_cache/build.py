"""Stage one: run the teacher once over every missing unit and write its shard."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from shared.atomic import remove_leftovers
from shared.config import CacheConfig
from shared.errors import TideError
from shared.shards import CACHE, shard_counts
from teacher_cache.engines.choose import load_engine, settle_engine
from teacher_cache.plan import CachePlan, make_plan
from teacher_cache.units import run_units
from teacher_cache.workers import run_workers


@dataclass(frozen=True)
class CacheReport:
    """What a finished cache holds."""

    folder: Path
    rows: int
    masked: int
    chunks: int
    bytes: int
    computed: int
    kept: int
    counts: dict[str, int]


def build_cache(config: CacheConfig) -> CacheReport:
    """Compute every missing shard of the cache at `config.out`; finished ones are skipped.

    Raises TideError on anything that the user can mend, before the teacher is loaded where that is possible.
    """
    config = settle_engine(config)
    with _only_writer(config.out):
        plan = make_plan(config)
        remove_leftovers(config.out)
        for row in plan.data.bad_rows:
            tqdm.write(f"left out {row.place}: {row.reason}")
        missing = plan.missing
        kept = len(plan.manifest.units()) - len(missing)
        if missing:
            if config.engine.data_parallel > 1:
                run_workers(plan, missing)
            else:
                with closing(load_engine(plan)) as engine:
                    run_units(plan, engine, missing)
        return summarise(plan, len(missing), kept)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the cache's lock. The system drops it with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise TideError(f"{folder} cannot be written: {error.strerror}", fix="choose another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TideError(
                f"another process is writing the cache {folder}", fix="wait for it, or choose another folder"
            ) from error
        yield


def summarise(plan: CachePlan, computed: int, kept: int) -> CacheReport:
    """Add up the counts that the shards carry. TideError where no example was usable."""
    out = plan.config.out
    total: Counter[str] = Counter()
    size = 0
    for unit in plan.manifest.units():
        path = unit.path(out)
        counts = shard_counts(path, plan.manifest.digest)
        total.update({name: n for name, n in counts.items() if name != CACHE})
        size += path.stat().st_size
    if total["rows"] == 0:
        raise TideError(
            f"no example of {plan.data.source} fits: {json.dumps(total)}",
            expected="prompts shorter than lengths.student and lengths.teacher",
            fix="raise the lengths, or use other data",
        )
    return CacheReport(out, total["rows"], total["masked"], total["chunks"], size, computed, kept, dict(total))
