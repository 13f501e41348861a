"""What a person watches for days: a bar, a status file for other programs, and a text file for Prometheus.

`status.json` lies in the cache. It says what the run at hand does, and adds up engine seconds over all runs, which is
what the cache has cost.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from teacher_cache.run.plan import CachePlan

STATUS = "status.json"
_SECONDS_BETWEEN = 2.0


def read_status(cache: Path) -> dict[str, Any]:
    """The status of a cache; empty where there is none, or none that can be read. Of several ranks: their sums."""
    found, ranks = (
        _read(cache / STATUS),
        [_read(path) for path in sorted(cache.glob("status-*-of-*.json"))],
    )
    if not ranks:
        return found
    every = [one for one in (found, *ranks) if one]
    keys = (
        "rows_done",
        "rows_to_do",
        "bytes_written",
        "rows_per_second",
        "failures",
        "engine_seconds",
    )
    sums = {key: sum(one.get(key) or 0 for one in every) for key in keys}
    states = {one.get("state") for one in every}
    return {**sums, "state": states.pop() if len(states) == 1 else "mixed", "ranks": len(ranks)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Progress:
    """Counts written units. Used as a context: what ends it with an error is noted as `failed`."""

    def __init__(self, plan: CachePlan, units: Sequence[Unit]) -> None:
        config = plan.config
        self._plan, self._out, self._metrics = plan, config.out, config.metrics_file
        self._store = None if config.store is None else Store.open(config.store)
        self._name = STATUS if config.world == 1 else f"status-{config.rank}-of-{config.world}.json"
        self._total = sum(plan.examples_in(unit) for unit in units)
        self._engine_before = float(_read(self._out / self._name).get("engine_seconds", 0.0))
        self._started, self._last = time.time(), 0.0
        self._rows = self._bytes = self._failures = 0
        self._busy = 0.0
        self._bar = tqdm(
            total=self._total, unit="row", desc=f"cache {plan.config.teacher}", smoothing=0.05
        )

    def wrote(self, unit: Unit, examples: int, busy_seconds: float, engines: int = 1) -> None:
        """One more shard is on disk. `busy_seconds`: what an engine was busy for it."""
        self._rows += examples
        self._busy += busy_seconds
        self._bytes += unit.path(self._out).stat().st_size
        if self._store is not None:
            self._store.put_shard(self._out, unit)
        self._bar.update(examples)
        share = self._busy / max(1e-9, (time.time() - self._started) * engines)
        parts = self._plan.manifest.parts
        self._bar.set_postfix_str(
            f"draw {unit.draw} part {unit.part + 1}/{parts}, engine busy {share:.0%}"
        )
        if time.time() - self._last >= _SECONDS_BETWEEN:
            self._write("running", engines)

    def failed(self) -> None:
        """A worker was lost and replaced."""
        self._failures += 1

    def _write(self, state: str, engines: int = 1) -> None:
        now = time.time()
        self._last = now
        seconds = max(1e-9, now - self._started)
        rate = self._rows / seconds
        status = {
            "state": state,
            "updated": round(now, 1),
            "rows_done": self._rows,
            "rows_to_do": self._total,
            "rows_per_second": round(rate, 3),
            "seconds_left": round((self._total - self._rows) / rate, 1) if rate > 0 else None,
            "bytes_written": self._bytes,
            "engine_busy_share": round(self._busy / (seconds * engines), 4),
            "failures": self._failures,
            "engine_seconds": round(self._engine_before + self._busy, 1),
        }
        _replace(self._out / self._name, json.dumps(status, indent=1) + "\n")
        if self._metrics is not None:
            _replace(self._metrics, prometheus(status, self._plan.config.teacher))

    def __enter__(self) -> Progress:
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.close()
        self._write(
            "finished"
            if kind is None
            else "stopped"
            if issubclass(kind, KeyboardInterrupt)
            else "failed"
        )


def prometheus(status: dict[str, Any], teacher: str) -> str:
    """A status in Prometheus's text format, for node_exporter's textfile collector."""
    lines = []
    for key, value in status.items():
        if isinstance(value, int | float):
            lines += [
                f"# TYPE tide_cache_{key} gauge",
                f'tide_cache_{key}{{teacher="{teacher}"}} {value}',
            ]
    lines += ["# TYPE tide_cache_running gauge"]
    lines += [f'tide_cache_running{{teacher="{teacher}"}} {int(status["state"] == "running")}']
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, but not forced to the disk: the next one comes in seconds. A full disk stops no run."""
    with contextlib.suppress(OSError, TideError):
        write_bytes(path, text.encode(), durable=False)
