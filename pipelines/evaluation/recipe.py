"""Which benchmarks to run, and how: the paper's eight, a TOML file of one's own, or any task of
lm-eval by name; and where their rows come from: the hub (or its cache here), or files of --data.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from shared.settings.build import read_toml
from shared.system.errors import TideError

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Benchmark:
    """One task of lm-eval and its settings; None leaves the task's own."""

    name: str
    title: str
    task: str
    metric: str | None = None  # METRIC,FILTER of lm-eval; None: the first that the task reports
    shots: int | None = None
    new_tokens: int | None = None
    steps: int | None = None
    chat: bool = True  # ask through the chat template
    overrides: dict[str, Any] = field(default_factory=dict)  # of the task's configuration


def packaged(name: str) -> Path:
    """A file or folder that ships beside this one."""
    return Path(__file__).parent / name


def paper_benchmarks() -> dict[str, Benchmark]:
    """The eight of the paper, by name, in the order of its table."""
    return read_benchmarks(packaged("paper.toml"))


def read_benchmarks(path: Path) -> dict[str, Benchmark]:
    """A TOML file, a table a benchmark. TideError for an unknown setting, or where `task` lacks."""
    known = {f.name for f in fields(Benchmark)} - {"name"}
    benchmarks = {}
    for name, values in read_toml(path).items():
        extra = sorted(set(values) - known) if isinstance(values, dict) else []
        if not isinstance(values, dict) or "task" not in values or extra:
            raise TideError(
                f"{name} in {path} is no benchmark{': unknown ' * bool(extra)}{', '.join(extra)}",
                expected=f"a table with `task`, and any of {', '.join(sorted(known - {'task'}))}",
            )
        benchmarks[name] = Benchmark(**{"name": name, "title": name, **values})
    return benchmarks


def choose(names: str, recipe: Path | None, **changes: Any) -> list[Benchmark]:
    """The benchmarks named, apart by commas: of the recipe (default the paper's), else of lm-eval.

    `paper` or `all` are all of the recipe. `changes` replace each one's settings, unless None.
    """
    known = paper_benchmarks() if recipe is None else read_benchmarks(recipe)
    chosen: dict[str, Benchmark] = {}
    for name in (part.strip() for part in names.split(",")):
        if name in ("paper", "all"):
            chosen |= known
        elif name:
            chosen[name] = known.get(name) or Benchmark(name, name, name, chat=False)
    if not chosen:
        raise TideError(
            "no task is named", expected=f"--tasks paper, or some of {', '.join(known)}"
        )
    given = {key: value for key, value in changes.items() if value is not None}
    return [replace(benchmark, **given) for benchmark in chosen.values()]


def parse_places(texts: Sequence[str]) -> dict[str, Path]:
    """`gsm8k=rows.jsonl` and the like as a table. TideError where one is not, or has no path."""
    places = {}
    for text in texts:
        name, _, place = text.partition("=")
        if not name or not place:
            raise TideError(f"--data {text}", expected="TASK=PATH, such as gsm8k=rows.jsonl")
        places[name] = Path(place).expanduser().resolve()
        if not places[name].exists():
            raise TideError(f"--data {text}: there is no {place}", expected="a file or a folder")
    return places


def local_rows(path: Path) -> dict[str, Any]:
    """Settings of a task that reads `path`: a file is its only split; a folder is as on the hub."""
    if path.is_dir():
        return {"dataset_path": str(path)}
    suffix = next((s for s in reversed(path.suffixes) if s in _LOADERS), None)
    if suffix is None:
        raise TideError(
            f"{path} is no file of rows",
            expected=f"a name that ends in {', '.join(_LOADERS)}, perhaps .gz",
        )
    return {
        "dataset_path": _LOADERS[suffix], "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "validation_split": None, "training_split": None,
        "fewshot_split": None,
    }  # fmt: skip


def load_tasks(manager: Any, benchmark: Benchmark, place: Path | None) -> dict[str, Any]:
    """lm-eval's tasks of a benchmark, their rows read. TideError where there are none."""
    from lm_eval.tasks._factory import TaskFactory

    index = manager.task_index
    if benchmark.task not in manager.all_tasks:
        raise TideError(
            f"lm-eval has no task {benchmark.task!r}",
            expected="a benchmark of the recipe, or a task that `tide lm-eval ls tasks` lists",
        )
    if benchmark.task in manager.all_tags:
        members = ",".join(sorted(index[benchmark.task].tags))
        raise TideError(
            f"{benchmark.task} is a tag and has no score of its own", fix=f"--tasks {members}"
        )
    changes = {**benchmark.overrides, **(local_rows(place) if place else {})}
    datasets_log = logging.getLogger("datasets")
    level = datasets_log.level
    datasets_log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            # The manager's own `load` hands a group's changes to none of its members.
            factory = TaskFactory()
            built = factory.build(index[benchmark.task], overrides=changes or None, registry=index)
            return manager.load([built])
    except TideError:
        raise
    except Exception as error:  # whatever datasets, the hub and the task's own code raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TideError(
            f"the rows of {benchmark.name} cannot be read: {first}",
            expected="network access, a cached copy of the data set, or files of your own",
            fix=f"give --data {benchmark.name}=PATH: a JSONL or Parquet file, or a folder",
        ) from error
    finally:
        datasets_log.setLevel(level)
