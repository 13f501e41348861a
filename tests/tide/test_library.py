import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import polars as pl
import pytest
from pyarrow.dataset import dataset
from transformers import TrainerCallback

import tide
from shared.cache.manifest import load_manifest
from shared.settings.config import LengthConfig
from student_train.using.settings import SampleConfig
from student_train.using.student import load_for_use

PAGE = Path(__file__).parents[2] / "docs" / "notebook.md"


def test_settings_are_those_of_a_recipe(random_teacher: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(random_teacher), "engine": {"dtype": "float32"}}
    given |= {"lengths": {"student": 64, "teacher": 64}, "shard_examples": 8}
    given |= {"data": {"source": "stdlib:train", "limit": 8}}
    made = tide.cache("tiny-cross", **given, noise={"draws": 1}, out=str(tmp_path / "c"))
    manifest = load_manifest(made.folder)
    assert (made.examples, made.draws) == (8, 1)
    assert manifest.fingerprint.lengths == LengthConfig(student=64, teacher=64)
    assert manifest.fingerprint.noise.comp_demo is False  # as the recipe has it
    grown = tide.cache("tiny-cross", **given, noise={"draws": 2}, out=str(tmp_path / "c"))
    assert grown.draws == 2 and load_manifest(grown.folder).digest == manifest.digest
    assert tide.Cache.open(tmp_path / "c") == grown
    row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    sources = [str(tmp_path / "own.jsonl"), {"source": "stdlib:train", "limit": 3}]
    data = tide.prepare("tiny-cross", sources, out=str(tmp_path / "d"))
    assert data.examples == 4 and "4 examples are taken" in str(data)
    assert data.folder == tmp_path / "prepared"


ROWS = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}],
         "source": "a column"} for i in range(3)]  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        *(list, tuple, datasets.Dataset.from_list, pl.DataFrame, pd.DataFrame),
        lambda rows: {"source": rows, "form": "messages"},
        lambda rows: [{"source": rows}],
    ],
    ids=["list", "tuple", "datasets", "polars", "pandas", "settings", "sources"],
)
def test_rows_in_memory_are_data(form: Callable[[Any], Any], tmp_path: Path) -> None:
    made = [tide.prepare("tiny-cross", form(ROWS), out=tmp_path / name) for name in ("a", "b")]
    assert [data.examples for data in made] == [3, 3]
    assert len(list((tmp_path / "prepared").glob("rows-*.jsonl"))) == 1  # one for the same rows
    (path,) = (tmp_path / "prepared").glob("rows-*.jsonl")
    assert tide.prepare("tiny-cross", path, out=tmp_path / "c").examples == 3


READERS: dict[str, Callable[[Path], int]] = {
    "pyarrow": lambda folder: dataset(folder).count_rows(),
    "polars": lambda folder: pl.scan_parquet(folder).collect().height,
    "datasets": lambda folder: datasets.load_dataset(str(folder))["train"].num_rows,
}


@pytest.mark.parametrize("reader", READERS)
def test_shards_open_as_one_table(caches: dict[str, Path], reader: str, tmp_path: Path) -> None:
    cache = tide.Cache.open(caches["tiny-cross"])
    assert READERS[reader](cache.shards) == cache.examples * cache.draws
    older = Path(shutil.copytree(cache.folder, tmp_path / "older"))
    for folder in (older / "shards").iterdir():
        folder.rename(older / folder.name)
    with pytest.raises(tide.TideError, match="shards"):
        tide.Cache.open(older)
    for folder in older.glob("draw=*"):
        folder.rename(older / "shards" / folder.name)
    assert tide.Cache.open(older).examples == cache.examples


def test_callbacks_are_told_of_every_step(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And passes are halved as often as what is counted for the GPU at hand asks for."""

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32}
    how = {"student": shape, "max_steps": 3, "heldout": None, "device": "cpu"}
    seen = Count()
    monkeypatch.setattr("pipelines.plan.memory.halvings_here", lambda _: 1)
    with pytest.warns(UserWarning, match="fit into memory"):
        run = tide.train(caches["tiny-cross"], [seen], out=tmp_path, **how)
    assert seen.steps == 3 and run.model.is_dir()


def test_importing_it_is_quick_and_files_of_the_same_names_hide_nothing(tmp_path: Path) -> None:
    """Not from processes either, which begin in the same working directory."""
    (tmp_path / "tide").mkdir()
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text("raise SystemExit('theirs')")
    (tmp_path / "student_train.py").write_text("raise SystemExit('theirs')")
    code = """
import sys, tide, shared.data
print(tide.load_student, 'torch' in sys.modules)
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from shared.system.hardware import hardware_line
with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    print(pool.submit(hardware_line).result() == hardware_line())
"""
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True}
    options["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    begin = (
        f"import sys; sys.path.insert(1, {str(PAGE.parents[1])!r})\n"  # as an installation has it
    )
    done = subprocess.run([sys.executable, "-c", begin + code], check=False, **options)
    assert done.stdout.startswith("<function"), done.stderr
    assert done.stdout.endswith("False\nTrue\n"), done.stderr
    late = f"{begin}sys.modules['shared'] = sys\nimport tide"
    done = subprocess.run([sys.executable, "-c", late], check=False, **options)
    assert "import tide first" in done.stderr


def test_a_student_answers_as_on_the_command_line(student: str) -> None:
    loaded = load_for_use(student, "cpu")
    ours = tide.load_student(student, "cpu")
    chats = [[{"role": "user", "content": "Write `f`."}], [{"role": "user", "content": "g"}]]
    given: dict[str, Any] = {"new_tokens": 16, "block": 8, "threshold": 0.01}
    wanted = list(loaded.answer(chats, SampleConfig(**given), 2))
    assert ours.answers(["Write `f`.", chats[1]], **given) == wanted
    assert ours.answer("Write `f`.", **given) == wanted[0]
    assert "model" in repr(ours) and "Qwen" not in repr(ours)


def test_what_cannot_be_is_a_tide_error(
    student: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    ours, done = tide.load_student(student, "cpu"), caches["tiny-cross"]
    for call in (
        lambda: ours.answer("x", new_tokens=0),
        lambda: ours.answer("x", tokens=5),
        lambda: ours.answer([{"role": "user", "content": 3}]),
        lambda: ours.log_likelihoods("", ["x"]),
        lambda: tide.load_student(tmp_path / "none"),
        lambda: tide.cache("tiny-crss"),
        lambda: tide.prepare("tiny-cross", data=str(tmp_path / "none.jsonl")),
        lambda: tide.train(tmp_path / "none"),
        lambda: tide.train(done, out=tmp_path / "r", epochz=2),
    ):
        with pytest.raises(tide.TideError):
            call()


@pytest.mark.filterwarnings("ignore")  # a notebook has no filter
def test_the_cells_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/notebook.md as a notebook: its cells, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(cell, str(PAGE), "exec"), names)
    cache, student = names["cache"], names["student"]
    assert (cache.teacher, cache.examples, cache.draws) == ("tiny-cross", 48, 2)
    assert names["distilled"].metrics["eval_heldout_nll"] > 0
    assert [loss for _, loss in names["curve"]] and (tmp_path / "runs" / "plain" / "model").is_dir()
    likely = student.log_likelihoods("def close(self):\n    return ", ["True", "banana"])
    assert likely[0] > likely[1]
    said = capsys.readouterr().out
    assert "48 examples are taken" in said and "⟦" in said
    assert "reverse_calm" in said[said.rindex("runs/distilled") :]  # what would work instead
