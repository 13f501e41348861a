"""An objective of the user's own: the example of docs/objectives.md in all that a run goes through;
what is not imported.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.experiments.report import find_runs, summary_table
from pipelines.recipes.read import train_command
from shared.settings.build import build, to_plain
from shared.settings.config import TrainConfig
from shared.system.files import TideError
from student_train.training.preflight import recorded_run
from student_train.training.replay import replay
from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config, curve

PAGE = Path(__file__).parents[3] / "docs" / "objectives.md"
TIDAL = {"tidal": {"lambda_max": 0.8}}
OWN = {"type": "jsd:Jsd", "temperature": 1.0, "beta": 0.3, **TIDAL}
CHUNKS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Squared:
    needs = "chunks"

    def loss(self, student, teacher):
        return (student.exp() - teacher) ** 2

class Plain:
    needs = "topk"

@dataclass(frozen=True)
class Whole:
    needs = "topk"

    def loss(self, student, teacher):
        return (teacher - student).sum()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's module and another; nothing of them stays imported."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (place / "jsd.py").write_text(code)
    (place / "more.py").write_text(CHUNKS)
    yield place
    for name in ("jsd", "more"):
        sys.modules.pop(name, None)


def own(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    plain = {**to_plain(config(cache, out, max_steps=8, heldout=None)), "distillation": OWN}
    return build(TrainConfig, {**plain, **changes}, imports=True)


def test_the_page_s_objective_learns_resumes_and_is_reported(
    caches: dict[str, Path], here: Path
) -> None:
    # 1. trained, and gone on with from a checkpoint, float for float
    run = own(caches["tiny-shared"], here / "runs" / "a")
    train_student(run)
    logged = [entry for entry in curve(run.out) if "loss" in entry]
    assert logged[-1]["denoise"] < logged[0]["denoise"] and logged[-1]["distillation"] > 0
    recorded = recorded_run(run.out)["config"]
    assert (
        recorded["distillation"] == to_plain(run.distillation)
        and OWN.items()
        >= {
            name: value for name, value in recorded["distillation"].items() if name != "tidal"
        }.items()
    )
    whole = curve(run.out)
    shutil.rmtree(run.out / "checkpoints" / "checkpoint-8")
    shutil.rmtree(run.out / "model")
    train_student(run)
    assert curve(run.out) == whole
    with pytest.raises(TideError, match="beta"):
        train_student(own(run.cache, run.out, distillation={**OWN, "beta": 0.4}))
    # 2. by the command that a report states, over TOML
    command = train_command(recorded).replace("pipelines", str(PAGE.parents[1] / "pipelines"), 1)
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--out", str(here / "runs" / "b")])
    assert done.exit_code == 0, done.output
    assert curve(here / "runs" / "b") == whole
    # 3. a report reads it as data
    sys.modules.pop("jsd")
    (here / "jsd.py").write_text("raise SystemExit('imported')")
    table = summary_table(find_runs(here / "runs"))
    assert table["objective"].to_list() == ["jsd:Jsd, T 1.0, beta 0.3, TIDAL both"] * 2


def test_replay_imports_what_is_named_and_chunks_work_too(
    caches: dict[str, Path], here: Path
) -> None:
    broken = {"learning_rate": 1e30, "max_grad_norm": 1e30}
    run = own(caches["tiny-cross"], here / "run", distillation={"type": "more:Squared"}, **broken)
    with pytest.raises(TideError, match="not finite"):
        train_student(run)
    for objective in (None, "jsd:Jsd"):
        with pytest.raises(TideError, match="more:Squared"):
            replay(run.out, objective)
    assert "sum of distillation" in replay(run.out, "more:Squared")


@pytest.mark.parametrize(
    "settings",
    [
        *({"type": f"{name}:Jsd"} for name in ("none", "os", "run.jsd", "more")),
        *({"type": "more:Plain"}, {"type": "jsd:Jsd", "beta": 1.5}),
    ],
    ids=str,
)
def test_what_is_no_objective_is_said(here: Path, settings: dict[str, Any]) -> None:
    (here / "run").mkdir()
    (here / "run" / "__init__.py").touch()
    (here / "run" / "run.json").write_text("{}")
    shutil.copy(here / "jsd.py", here / "run")
    with pytest.raises(TideError, match=r"beta|type|objective|module|folder"):
        build(TrainConfig, {"distillation": settings}, imports=True)
    assert "run.jsd" not in sys.modules
    with pytest.raises(TideError):
        build(TrainConfig, {"distillation": OWN})
    assert "jsd" not in sys.modules or settings["type"] == "jsd:Jsd"


def test_a_loss_that_is_no_value_a_row_is_refused(caches: dict[str, Path], here: Path) -> None:
    run = own(caches["tiny-shared"], here / "run", distillation={"type": "more:Whole"})
    with pytest.raises(TideError, match="more:Whole"):
        train_student(run)
