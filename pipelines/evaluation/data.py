"""Where a benchmark's rows come from: the hub (or its cache on this disk), or files named with --data."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation.recipe import Benchmark
from shared.system.errors import TideError

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def parse_places(texts: Sequence[str]) -> dict[str, Path]:
    """`gsm8k=rows.jsonl` and the like as a table. TideError where one is no TASK=PATH or the path is missing."""
    places = {}
    for text in texts:
        name, found, place = text.partition("=")
        if not found or not name:
            raise TideError(f"--data {text}", expected="TASK=PATH, such as gsm8k=rows.jsonl")
        path = Path(place).expanduser()
        if not path.exists():
            raise TideError(
                f"--data {text}: there is no {path}",
                expected="a file of rows, or a folder of the data set",
            )
        places[name] = path.resolve()
    return places


def local_rows(path: Path) -> dict[str, Any]:
    """A task's settings that read `path`: a file is its only split; a folder is a data set as on the hub."""
    if path.is_dir():
        return {"dataset_path": str(path)}
    suffix = next((s for s in reversed(path.suffixes) if s in _LOADERS), None)
    if suffix is None:
        raise TideError(
            f"{path} is no file of rows",
            expected=f"a name that ends in {', '.join(_LOADERS)}, perhaps .gz",
        )
    splits = {
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": None,
    }
    files = {"data_files": {"test": str(path)}}
    return {
        "dataset_path": _LOADERS[suffix],
        "dataset_name": None,
        "dataset_kwargs": files,
        **splits,
    }


def load_tasks(manager: Any, benchmark: Benchmark, place: Path | None) -> dict[str, Any]:
    """lm-eval's tasks of a benchmark, their rows read. TideError where the task is unknown or its rows are missing."""
    from lm_eval.tasks._factory import TaskFactory

    if benchmark.task not in manager.all_tasks:
        raise TideError(
            f"lm-eval has no task {benchmark.task!r}",
            expected="a benchmark of the recipe, or a task that `tide lm-eval ls tasks` lists",
        )
    if benchmark.task in manager.all_tags:
        members = sorted(manager.task_index[benchmark.task].tags)
        raise TideError(
            f"{benchmark.task} is a tag of {len(members)} tasks and has no score of its own",
            expected="a task, or a group that adds its tasks up",
            fix=f"name the tasks: --tasks {','.join(members)}",
        )
    changes = {**benchmark.overrides, **(local_rows(place) if place else {})}
    index = manager.task_index
    try:
        with _quiet():
            # the manager itself changes no members of groups: its `load` hands a group's own member list down to them
            built = TaskFactory().build(
                index[benchmark.task], overrides=changes or None, registry=index
            )
            return manager.load([built])
    except Exception as error:  # whatever datasets, the hub and the task's own code raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TideError(
            f"the rows of {benchmark.name} cannot be read: {first}",
            expected="network access, a cached copy of the data set, or files of your own",
            fix=f"give --data {benchmark.name}=PATH: a JSONL or Parquet file, or a folder of the data set",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of datasets."""
    level = logging.getLogger("datasets").level
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.getLogger("datasets").setLevel(level)
