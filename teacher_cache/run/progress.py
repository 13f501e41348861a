"""What a person watches for days: a bar, status.json in the cache, and a text file for Prometheus.

The status says what the run at hand does, and adds up engine seconds over all runs: the cost.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.system.files import TideError, read_json, write_bytes
from teacher_cache.run.open import Run

STATUS = "status.json"
_SECONDS_BETWEEN = 2.0
_SUMMED = ("rows_done", "rows_to_do", "bytes_written", "rows_per_second", "engine_seconds")


def read_status(cache: Path) -> dict[str, Any]:
    """A cache's status, of several ranks their sums; empty where there is none that can be read."""
    alone = _read(cache / STATUS)
    ranks = [_read(path) for path in sorted(cache.glob("status-*-of-*.json"))]
    if not ranks:
        return alone
    every = [one for one in (alone, *ranks) if one]
    sums = {key: sum(one.get(key) or 0 for one in every) for key in _SUMMED}
    states = {one.get("state") for one in every}
    return {**sums, "state": states.pop() if len(states) == 1 else "mixed", "ranks": len(ranks)}


def _read(path: Path) -> dict[str, Any]:
    try:
        status = read_json(path)
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


class Progress:
    """Counts written units. Used as a context: what ends it with an error is noted as `failed`."""

    def __init__(self, run: Run, units: Sequence[Unit]) -> None:
        config = run.config
        self._run, self._metrics = run, config.metrics_file
        self._store = None if config.store is None else Store.open(config.store)
        name = STATUS if config.world == 1 else f"status-{config.rank}-of-{config.world}.json"
        self._path = config.out / name
        self._total = sum(run.examples_in(unit) for unit in units)
        self._engine_before = float(_read(self._path).get("engine_seconds", 0.0))
        self._started, self._last = time.time(), 0.0
        self._rows, self._bytes, self._busy = 0, 0, 0.0
        title = f"cache {config.teacher}"
        self._bar = tqdm(total=self._total, unit="row", desc=title, smoothing=0.05)

    def wrote(self, unit: Unit, examples: int, busy_seconds: float) -> None:
        """One more shard is on disk. `busy_seconds`: what the engine was busy for it."""
        self._rows += examples
        self._busy += busy_seconds
        self._bytes += unit.path(self._run.config.out).stat().st_size
        if self._store is not None:
            self._store.put_shard(self._run.config.out, unit)
        self._bar.update(examples)
        share = self._busy / max(1e-9, time.time() - self._started)
        place = f"draw {unit.draw} part {unit.part + 1}/{self._run.manifest.parts}"
        self._bar.set_postfix_str(f"{place}, engine busy {share:.0%}")
        if time.time() - self._last >= _SECONDS_BETWEEN:
            self._write("running")

    def _write(self, state: str) -> None:
        self._last = time.time()
        seconds = max(1e-9, self._last - self._started)
        rate = self._rows / seconds
        status = {
            "state": state, "rows_done": self._rows, "rows_to_do": self._total,
            "rows_per_second": round(rate, 3), "bytes_written": self._bytes,
            "seconds_left": round((self._total - self._rows) / rate, 1) if rate > 0 else None,
            "engine_busy_share": round(self._busy / seconds, 4),
            "engine_seconds": round(self._engine_before + self._busy, 1),
        }  # fmt: skip
        _replace(self._path, json.dumps(status, indent=1) + "\n")
        if self._metrics is not None:
            write_metrics(self._metrics, status, self._run.config.teacher)

    def __enter__(self) -> "Progress":
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._write("finished" if kind is None else "stopped" if stopped else "failed")


def write_metrics(path: Path, status: dict[str, Any], teacher: str) -> None:
    """A status in Prometheus's text format, for node_exporter's textfile collector."""
    text = ""
    for key, value in {**status, "running": int(status.get("state") == "running")}.items():
        if isinstance(value, int | float):
            text += f"# TYPE tide_cache_{key} gauge\n"
            text += f'tide_cache_{key}{{teacher="{teacher}"}} {value}\n'
    _replace(path, text)


def _replace(path: Path, text: str) -> None:
    # Whole, but not forced to the disk: the next comes in seconds. A full disk stops no run.
    with contextlib.suppress(OSError, TideError):
        write_bytes(path, text.encode(), durable=False)
