"""The library, for notebooks and scripts: what the command `tide` does, as four functions.

    import tide

    data = tide.prepare("tiny-cross")
    cache = tide.cache("tiny-cross", out="caches/mine")
    run = tide.train(cache, out="runs/mine", epochs=2)
    print(run.student().answer("Write `f`."))

Settings are those of a recipe (docs/settings.md), by name and nested as there:
`noise={"draws": 2}`. What is finished is kept: called again, each goes on where it stopped. What
cannot work raises `TideError`, which says how to mend it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide import rooms as rooms  # isort: skip  (first: by it the others are found)

import pyarrow as pa

from pipelines.recipes.read import cache_config, train_config
from shared.data.reading import waiting_messages
from shared.settings.build import build
from shared.settings.config import CacheConfig, DataConfig
from shared.system.files import TideError, read_json, write_bytes
from student_train.using.settings import SampleConfig

if TYPE_CHECKING:
    from shared.text.tokenizers import Tokenizer
    from student_train.using.student import LoadedStudent
    from teacher_cache.prepared.folder import PreparedData

__all__ = ["Cache", "Data", "Run", "Student", "TideError", "cache", "load_student", "prepare",
           "train"]  # fmt: skip
# a file, a folder, a glob, hf://OWNER/NAME, stdlib:train; rows: a list of dicts, a
# datasets.Dataset, a frame of polars or pandas; a source with its settings; or several
Source = Any
Chat = str | Sequence[dict[str, Any]]  # a question, or messages with `role` and `content`


@dataclass(frozen=True)
class Data:
    """Prepared data: rendered, tokenised and aligned. Shown, it says what became of the rows."""

    folder: Path
    examples: int
    prepared: PreparedData = field(repr=False)
    student_tokenizer: Tokenizer = field(repr=False)

    def __str__(self) -> str:
        from teacher_cache.prepared.folder import describe

        return describe(self.prepared)

    def show(self, count: int = 3) -> str:
        """The first examples as the student reads them, trained answers in ⟦ ⟧."""
        from teacher_cache.prepared.folder import show

        return show(self.prepared.between(0, count), self.student_tokenizer)


@dataclass(frozen=True)
class Cache:
    """A finished cache."""

    folder: Path
    teacher: str
    examples: int
    draws: int

    @property
    def shards(self) -> Path:
        """A folder of Parquet files alone, which libraries of tables open as one."""
        return self.folder / "shards"

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """The cache in a folder. TideError where it holds none."""
        from shared.cache.manifest import load_manifest

        manifest = load_manifest(Path(folder))
        teacher = manifest.fingerprint.teacher.name
        return cls(Path(folder), teacher, manifest.examples, manifest.draws)


@dataclass(frozen=True)
class Run:
    """A finished run of training."""

    folder: Path
    metrics: dict[str, float]

    @property
    def model(self) -> Path:
        """The student's folder, which transformers loads."""
        return self.folder / "model"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged curve, an entry a step that was logged or scored."""
        return list(read_json(self.folder / "history.json")["steps"])

    def student(self, device: str = "auto") -> Student:
        """Ready to answer."""
        return load_student(self.model, device)


def prepare(teacher: str | None = None, data: Source | None = None, **settings: Any) -> Data:
    """Render, tokenise and align the data for a teacher, once; `cache` finds it again.

    `recipe` and `teachers_file` are paths; all else are settings of `[cache]`. TideError where the
    data cannot be used.
    """
    config = _cache_config(teacher, data, settings)
    from teacher_cache.run.open import open_sides, prepare_data

    sides = open_sides(config, weights=False)
    prepared, _ = prepare_data(config, sides)
    return Data(config.prepared_folder, prepared.examples, prepared, sides.student)


def cache(teacher: str | None = None, data: Source | None = None, **settings: Any) -> Cache:
    """Stage one: run the teacher once, and write what it knows to `out` (default: caches/TEACHER).

    Arguments as of `prepare`. What is there already is not computed again. TideError before
    anything is loaded, where that is possible.
    """
    config = _cache_config(teacher, data, settings)
    from teacher_cache.run.build import build_cache

    return Cache.open(build_cache(config).folder)


def train(cache: Cache | str | Path, callbacks: Sequence[Any] = (), **settings: Any) -> Run:
    """Stage two: train a student from a cache into `out` (default: runs/TEACHER).

    `recipe` is a path (default: the recipe of the cache's teacher), `callbacks` are transformers'
    (`TrainerCallback`); all else are settings of `[train]`. A run that was interrupted goes on.
    TideError where cache, student and settings do not fit.
    """
    source = cache if isinstance(cache, Cache) else Cache.open(cache)
    settings = {"cache": source.folder, **settings}
    config = train_config(source.teacher, *_places(settings), settings)
    from pipelines.plan.memory import halvings_here
    from student_train.training.trainer import train_student

    return Run(config.out, train_student(config, callbacks, halvings_here(config)))


def _cache_config(teacher: str | None, data: Source | None, settings: Any) -> CacheConfig:
    places = _places(settings)
    config = cache_config(teacher, *places, settings)
    if data is None:
        return config
    changes = {**settings, "data": _source(data, config.prepared_folder)}
    return cache_config(teacher, *places, changes)


def _source(data: Source, folder: Path) -> Any:
    """The setting `data`; rows are written to `folder`, named by their content."""
    if isinstance(data, str | Path):
        return {"source": str(data)}
    if isinstance(data, dict):
        inner = _source(data["source"], folder) if "source" in data else {}
        return {**data, **(inner if isinstance(inner, dict) else {"source": inner})}
    if isinstance(data, list | tuple):
        names = {field.name for field in fields(DataConfig)}
        are_rows = [isinstance(one, Mapping) and not one.keys() <= names for one in data]
        if not any(are_rows):
            return [_source(one, folder) for one in data]
        rows = list(data)
    else:
        try:
            rows = data.to_list() if hasattr(data, "to_list") else pa.table(data).to_pylist()
        except (TypeError, ValueError) as error:
            what = f"data is a {type(data).__name__}, out of which no rows come: {error}"
            expected = "a path, a list of rows, a datasets.Dataset (one split), or a frame"
            raise TideError(what, expected=expected) from error
    text = "".join(f"{json.dumps(row, default=str)}\n" for row in rows).encode()
    path = folder / f"rows-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.exists():
        write_bytes(path, text)
    return {"source": str(path)}


def _places(settings: dict[str, Any]) -> tuple[Path | None, list[str], Path | None]:
    """Recipe, no overrides, and teachers' file: taken out of the settings."""
    recipe, teachers = settings.pop("recipe", None), settings.pop("teachers_file", None)
    return recipe and Path(recipe), [], teachers and Path(teachers)


@dataclass(frozen=True)
class Student:
    """A student in memory; `loaded` has its model and tokenizer."""

    place: str
    loaded: LoadedStudent = field(repr=False)

    def answer(self, chat: Chat, **sampling: Any) -> str:
        """The answer to one chat; settings as of `answers`."""
        return self.answers([chat], **sampling)[0]

    def answers(self, chats: Sequence[Chat], batch: int = 8, **sampling: Any) -> list[str]:
        """The answers to several, `batch` at a time. Settings of sampling by the names of
        docs/using.md: `new_tokens`, `threshold`, `steps_per_block`, `temperature`, `seed`, …
        """
        if batch < 1:
            raise TideError(f"batch is {batch}", expected="at least 1")
        ask = [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in chats]
        messages = [waiting_messages(chat) for chat in ask]
        block = self.loaded.choose_block(sampling.get("block"))
        config = build(SampleConfig, {**sampling, "block": block}, "sampling")
        return list(self.loaded.answer(messages, config, batch))

    def log_likelihoods(
        self, context: str, continuations: Sequence[str], draws: int = 32
    ) -> list[float]:
        """Lower bounds of log p(continuation | context) in nats: the ELBO over `draws` masks."""
        from student_train.using.elbo import ElboConfig, log_likelihoods

        encode = self.loaded.tokenizer.encode
        try:
            config = ElboConfig(draws=draws, block=self.loaded.choose_block(None))
            asked = [(encode([context])[0], encode(list(continuations)))]
            return log_likelihoods(self.loaded.model, asked, self.loaded.special, config)[0]
        except ValueError as error:
            raise TideError(str(error)) from error


def load_student(place: str | Path, device: str = "auto") -> Student:
    """A student from a folder (runs/NAME/model) or a hub id. TideError where it is none."""
    from student_train.using.student import load_for_use

    return Student(str(place), load_for_use(str(place), device))
