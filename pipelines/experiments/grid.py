"""Many trainings, a few at a time: each is a `tide train` of its own, and finished ones are not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shared.system.errors import TideError
from shared.system.signals import end_children, start_child

LOCK = ".lock"
"""In a folder of runs: who works on it holds this."""


@dataclass(frozen=True)
class Job:
    """One training: its folder and the arguments of `tide train`."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / "history.json").exists()


def train_all(jobs: Sequence[Job], at_once: int | None = None) -> None:
    """Train all, `at_once` at a time (default: as many as there are cores, one thread each), under one bar.

    TideError with the end of its log where one fails. Interrupted and called again, it goes on where it stopped.
    """
    waiting = [job for job in jobs if not job.finished]
    running: dict[subprocess.Popen[bytes], Job] = {}
    limit = at_once or os.cpu_count() or 1
    before, _ = _steps(jobs)
    # smoothing=0: the mean rate since the start, which holds the starting times of students and any other load too.
    with tqdm(
        initial=before,
        unit="step",
        desc=f"train {len(jobs)} students",
        smoothing=0,
        dynamic_ncols=True,
    ) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    job = waiting.pop(0)
                    running[_start(job)] = job
                time.sleep(0.5)
                _update(bar, jobs)
                for process in [p for p in running if p.poll() is not None]:
                    folder = running.pop(process).folder
                    if process.returncode != 0:
                        log = (folder / "log.txt").read_text(errors="replace")[-2000:]
                        raise TideError(
                            f"training {folder.name} failed (exit {process.returncode}):\n{log}"
                        )
        finally:
            end_children(list(running))


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "train",
        *job.arguments,
        "--out",
        str(job.folder),
    ]
    with (job.folder / "log.txt").open("wb") as log:
        return start_child(command, {"OMP_NUM_THREADS": "1"}, log)


def _steps(jobs: Sequence[Job]) -> tuple[int, int | None]:
    """Steps done, and steps in all: a student that has not begun is taken to be as long as the longest known."""
    known = [state for job in jobs if (state := _state(job.folder))]
    if not known:
        return 0, None
    longest = max(total for _, total in known)
    return sum(done for done, _ in known), sum(total for _, total in known) + longest * (
        len(jobs) - len(known)
    )


def _state(folder: Path) -> tuple[int, int] | None:
    """Steps done and steps in all of one training; None where it has not logged any yet."""
    try:
        state = json.loads((folder / "progress.json").read_text())
        return int(state["step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError):
        return None


def _update(bar: Any, jobs: Sequence[Job]) -> None:
    done, bar.total = _steps(jobs)
    bar.update(done - bar.n)
