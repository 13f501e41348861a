"""Grids; tables of runs, differences paired by seed; runs of strangers, read and never run."""

import json
import shlex
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluation.benchmarks import Answers, read_scores
from pipelines.evaluation.use_scores import USE
from pipelines.experiments import ablate, demo, report
from pipelines.experiments.report import find_runs, summary_table
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.files import TideError
from student_train.training.replay import replay
from tests.conftest import chats_file, heldout_file

NONE: dict[str, Any] = {"type": "none"}
CALM = {"type": "calm", "temperature": 2.0, "tidal": {"axis": "both"}}
GARBAGE = [b"", b"[]", b'{"config": 3}', b'{"steps": [3], "final": {"x": "y"}}', b"\xff",
           b'{"config": {"seed": "x"}}', b"[" * 100_000]  # fmt: skip


def fake_run(
    folder: Path,
    seed: int,
    cache: str,
    nll: float,
    distillation: dict[str, Any],
    digest: str | None = None,
) -> None:
    folder.mkdir(parents=True)
    config = {"seed": seed, "cache": f"c/{cache}", "distillation": distillation, "weight": 4.0}
    about = {"config": config, **({"cache": digest} if digest else {})}
    (folder / "run.json").write_text(json.dumps(about))
    steps = [{"step": s, "denoise": 5.0 - s, "loss": 5.0 - s} for s in (1, 2)]
    steps.append({"step": 2, "eval_heldout_nll": nll})
    final = {"eval_heldout_nll": nll, "eval_heldout_accuracy": 0.25, "seconds": 10.0}
    final["eval_heldout_bits_per_byte"] = nll
    (folder / "history.json").write_text(json.dumps({"steps": steps, "final": final}))


def fill(folder: Path, gains: list[float]) -> None:
    """Runs of the demo in which distillation gains so much, by seed."""
    for name, variant in demo.demo_grid(1).variants.items():
        alone = variant.train["distillation"] == NONE
        for seed, gain in enumerate(gains):
            run, nll = folder / f"{name}-seed{seed}", 4.0 if alone else 4.0 - gain
            fake_run(run, seed, variant.cache, nll, NONE if alone else CALM)


def words(table: str) -> str:
    return " ".join(table.split())


def test_a_difference_of_nothing_does_not_fill_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    for seed in (0, 1):
        fake_run(tmp_path / f"a-seed{seed}", seed, "c", 4.0 + 0.002 * seed, NONE)
    report.draw_curves(find_runs(tmp_path), tmp_path / "report.png")
    spans = [np.ptp(axis.get_ylim()) for axis in figures[0].axes]
    assert spans == [pytest.approx(1.1, abs=0.1), pytest.approx(0.1)]


def test_a_cache_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    """One that moved is the same, one made anew at the same place is another; a seed's own too."""
    for place, seed, cache, digest in (
        ("1", 0, "a/c", "x"), ("1", 1, "b/c", "x"), ("1", 2, "b/moved", "x"), ("2", 0, "b/c", "y"),
        ("3", 0, "a/own-0", "0"), ("3", 1, "a/own-1", "1"), ("3", 2, "b/kept", "0"),
        ("4", 0, "a/own-0", "2"),
    ):  # fmt: skip
        fake_run(tmp_path / place / f"v-seed{seed}", seed, cache, 4.0, NONE, digest)
    runs = find_runs(tmp_path)
    assert [run.caches for run in runs] == [*["c"] * 3, "c (2)", *["own"] * 3, "own (2)"]
    assert sorted(summary_table(runs)["seeds"]) == [1, 1, 3, 3]


def test_names_of_others_stay_in_their_cells(tmp_path: Path) -> None:
    fake_run(tmp_path / "a|b\n# c`-seed0", 0, "d|e\nf", 4.0, NONE)
    lines = report.write_report(tmp_path).read_text().splitlines()
    (text,) = (line for line in lines if line.startswith("| a"))
    assert text.startswith("| a\\|b # c | d\\|e f |")


def test_the_table_has_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    fill(tmp_path, [0.1, 0.2, 0.3])
    table = summary_table(find_runs(tmp_path))
    assert table.height == 6
    row = table.filter(table["student"] == "TIDE-Cross").to_dicts()[0]
    assert (row["seeds"], row["held-out NLL (nats/token)"]) == (3, "3.800 ± 0.100")
    assert row["objective"] == "calm, T 2.0, TIDAL both, weight 4"
    assert "lines exact" not in row  # nobody measured it
    assert "| TIDE-Shared" in report.write_report(tmp_path).read_text()
    assert (tmp_path / "report.png").exists()


def test_each_variant_of_the_demo_is_compared_with_the_undistilled_one(tmp_path: Path) -> None:
    wanted = [("cross", "TIDE-Cross"), ("cross", "best-cross")]
    wanted += [("shared", "TIDE-Shared"), ("shared", "best-shared")]
    pairs = [(f"undistilled-{kind}", variant) for kind, variant in wanted]
    assert demo.demo_grid(2).pairs() == pairs
    with pytest.raises(TideError):
        find_runs(tmp_path)


def test_runs_are_grouped_by_their_settings_never_by_their_folder(tmp_path: Path) -> None:
    """Two different experiments whose folders are both called `student` are no two seeds of one."""
    for seed, (name, kind) in enumerate({"monday": NONE, "tuesday": CALM}.items()):
        fake_run(tmp_path / name / "student", seed, "tiny-cross", 4.0, kind)
    table = summary_table(find_runs(tmp_path))
    assert sorted(table["student"].to_list()) == ["monday/student", "tuesday/student"]
    assert table["seeds"].to_list() == [1, 1]
    fake_run(tmp_path / "monday" / "student-seed7", 7, "tiny-cross", 4.0, CALM)
    fake_run(tmp_path / "monday" / "student-seed8", 8, "tiny-cross", 4.0, NONE)
    names = {run.place.name: run.variant for run in find_runs(tmp_path / "monday")}
    assert names["student"] == names["student-seed8"] != names["student-seed7"]


values = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=3, max_size=9)


def test_seeds_may_have_caches_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        fake_run(tmp_path / f"a-seed{seed}", seed, f"mine-{seed}", 4.0, CALM)
    runs = find_runs(tmp_path)
    assert {(run.variant, run.caches) for run in runs} == {("a", "mine")}
    assert sorted(run.cache.name for run in runs) == ["mine-0", "mine-1"]
    assert "--cache c/mine-0" in report.write_report(tmp_path).read_text()


@given(values.filter(lambda v: np.std(v) > 1e-3))
def test_the_interval_is_scipy_s_for_one_sample(values: list[float]) -> None:
    mean, half = report.interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], expected, rtol=1e-9, atol=1e-12)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    for seed, noise in enumerate((0.0, 0.5, -0.5)):
        for folder, nll, kind in (("a", 4.0, NONE), ("b", 3.9 + 0.001 * seed, CALM)):
            run = tmp_path / folder / f"{folder}-seed{seed}"
            fake_run(run, seed, "c", nll + noise, kind)
            lines = 0.1 * (1 + (kind is CALM) * seed)
            use = {"lines": lines, "parse": 0.5, "tokens_per_step": 2, "threshold": 0.9}
            (run / USE).write_text(json.dumps(use))
    fake_run(tmp_path / "a" / "a-seed9", 9, "c", 1.0, NONE)  # a seed that only one has
    runs = find_runs(tmp_path)
    differences = report.paired_differences(runs, "a", "b", "nll")
    assert differences == pytest.approx([-0.1, -0.099, -0.098])
    table = words(report.paired_table(runs, [("a", "b")]))
    assert "| b | a | 3 | **-0.099 ± 0.002** |" in table and "+0.100 ±" in table
    assert summary_table(runs).to_dicts()[0]["tokens a step"] == "2.00 ± 0.00"
    said = report.compare(tmp_path / "a", tmp_path / "b")
    assert 'distillation.type: "none" → "calm"' in said
    assert "| B | A | 3 | **-0.099 ± 0.002** |" in words(said)
    fake_run(tmp_path / "c" / "z-seed7", 7, "tiny-cross", 4.0, NONE)
    for one, two in (("", "a"), ("a", "c")):  # several variants; no seed that both have
        with pytest.raises(TideError):
            report.compare(tmp_path / one, tmp_path / two)


def test_answers_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / ".humaneval-abc_rank0.jsonl"
    code = f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode()  # a pickle that makes a folder
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        database.execute("INSERT INTO unnamed VALUES ('x', ?)", (code,))
    database.close()
    assert Answers(path).get("generate_until", ("x",)) is None
    assert not (tmp_path / "ran").exists()
    for content in GARBAGE:
        (tmp_path / "gsm8k.json").write_bytes(content)
        with suppress(TideError):
            assert read_scores(tmp_path) == []


def test_answers_are_found_again_and_changed_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    question, pair = ("q", {"until": ["\n"]}, 0), (("c", "d"),)
    first = Answers(path)
    first.add("generate_until", question, "a\u2028b")
    first.add("loglikelihood", pair, (-1.5, True))
    again = Answers(path)
    assert again.get("generate_until", question) == "a\u2028b"
    assert again.get("generate_until", (*question[:2], 1)) is None
    assert again.get("loglikelihood", pair) == [-1.5, True]
    path.write_text(path.read_text().replace("-1.5", "-0.5")[:-9])  # changed, and cut
    Answers(path).add("loglikelihood_rolling", ("t",), -3.0)
    found = Answers(path)
    assert found.get("loglikelihood", pair) is None
    assert found.get("loglikelihood_rolling", ("t",)) == -3.0
    assert found.get("generate_until", question) is not None


@pytest.mark.parametrize("name", ["run.json", "history.json", "use.json", "nonfinite.json"])
def test_odd_runs_are_explained(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = {"config": {**to_plain(TrainConfig()), "cache": "none"}}
    (run / "run.json").write_text(json.dumps(config))
    (run / "history.json").write_text('{"steps": [], "final": {}}')
    (run / "nonfinite.json").write_text('{"step": 1, "batch": 1, "example_ids": []}')
    for content in GARBAGE:
        (run / name).write_bytes(content)
        with pytest.raises(TideError):  # noqa: PT012
            replay(run) if name == "nonfinite.json" else find_runs(tmp_path)
            pytest.fail(f"{content[:40]!r} was taken")


def write_grid(path: Path, model: Path) -> Path:
    path.write_text(f"""
seeds = [0]
[caches.a]
teacher = "tiny-cross"
model = "{model}"
shard_examples = 8
data = {{ source = "{chats_file()}", limit = 24 }}
lengths = {{ student = 128, teacher = 128 }}
noise = {{ draws = 1 }}
[train]
max_steps = 2
batch_size = 4
device = "cpu"
precision = "float32"
student = {{ hidden_size = 32, layers = 1, heads = 2, kv_heads = 1, intermediate_size = 32 }}
heldout = {{ source = "{heldout_file()}", limit = 4 }}
[variants.plain]
cache = "a"
train = {{ distillation = {{ type = "none" }} }}
[variants.calm]
cache = "a"
train = {{ distillation = {{ type = "calm", tidal = {{ axis = "training_only" }} }}, weight = 2.0 }}
""")
    return path


def test_a_grid_trains_reports_and_resumes(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_grid(tmp_path / "grid.toml", random_teacher)
    text = ablate.run_ablation(recipe, tmp_path / "out").read_text()
    assert "| calm " in text and "calm, T 2.0, TIDAL training_only, weight 2" in text
    assert len(list((tmp_path / "out").glob("*-seed*/history.json"))) == 2
    command = next(line for line in text.splitlines() if line.startswith("* `calm`"))
    again = shlex.split(command.split("`")[3])
    assert CliRunner().invoke(app, [*again[1:], "--out", str(tmp_path / "again")]).exit_code == 0
    files = [tmp_path / run / "history.json" for run in ("out/calm-seed0", "again")]
    once, twice = (json.loads(file.read_text())["final"]["eval_heldout_nll"] for file in files)
    assert once == twice
    monkeypatch.setattr(ablate, "start_child", lambda *_: pytest.fail("a training began again"))
    ablate.run_ablation(recipe, tmp_path / "out")


def test_axes_are_a_product_and_caches_may_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grid.toml").write_text("""
[cache]
teacher = "tiny-shared"
[caches]
a = { out = "caches/a-{seed}", data = { source = "stdlib:half-b#{seed}" } }
b = { teacher = "tiny-cross" }
[variants.CE]
cache = "a"
train = { distillation = { type = "none" } }
seeds = [2]
[variants.KL]
cache = "a"
train = { distillation = { type = "kl" }, weight = 3.0 }
axes = { cache = ["a", "b"], "distillation.temperature" = [1.0, 2.0] }
""")
    grid = ablate.read_grid(tmp_path / "grid.toml")
    assert [*grid.variants] == ["CE", "KL-a-1.0", "KL-a-2.0", "KL-b-1.0", "KL-b-2.0"]
    last = {"distillation": {"type": "kl", "temperature": 2.0}, "weight": 3.0}
    assert grid.variants["KL-b-2.0"] == ablate.Variant("b", last)
    assert [grid.teacher(cache) for cache in "ab"] == ["tiny-shared", "tiny-cross"]
    assert grid.pairs() == [("CE", "KL-a-1.0"), ("CE", "KL-a-2.0")]  # one teacher's
    built, trained = [], {}
    monkeypatch.setattr(ablate, "build_cache", built.append)
    monkeypatch.setattr(ablate, "train_all", lambda jobs, _: trained.update(jobs))
    ablate.train_grid(grid, tmp_path)
    places = [(str(config.out), config.sources[0].source) for config in built]
    wanted = [(f"caches/a-{seed}", f"stdlib:half-b#{seed}") for seed in (0, 1, 2)]
    assert sorted(places) == [(f"{tmp_path}/caches/b", "stdlib:train"), *wanted]
    assert [path.name for path in trained if "CE" in path.name] == ["CE-seed2"]
    assert "caches/a-2" in trained[tmp_path / "CE-seed2"]
    assert len(trained) == 1 + 4 * 3


@given(st.floats(1.2, 4.0), st.floats(0.01, 0.5), st.floats(64.0, 1024.0))
def test_the_worth_of_a_teacher_is_read_off_the_line(
    start: float, slope: float, functions: float
) -> None:
    def bits(n: float) -> float:
        return start - slope * float(np.log(n / 64))

    line = {n: bits(n) for n in (64, 256, 1024)}
    assert demo.functions_for(line, bits(functions)) == pytest.approx(functions)
    assert demo.functions_for(line, bits(1024) - 1e-3) == np.inf
    assert demo.functions_for(line, bits(64)) == 64


@pytest.mark.parametrize(("gain", "said"), [(0.05, "what 128 do"), (1.0, "more than 1,024 do")])
def test_the_curve_says_how_many_functions_a_teacher_is_worth(
    gain: float, said: str, tmp_path: Path
) -> None:
    for n, bits in ((64, 2.4), (256, 2.3), (1024, 2.2)):
        for seed in (0, 1):
            for name, less in (("undistilled", 0.0), ("distilled", gain)):
                folder = tmp_path / f"{name}-{n}-seed{seed}"
                fake_run(folder, seed, f"shared-{n}", bits - less + seed / 100, NONE)
    assert said in demo.data_curve(find_runs(tmp_path), 1.2, tmp_path)
    assert (tmp_path / "curve.png").exists()


def test_the_whole_recipe_is_checked_first(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "build_cache", lambda _config: pytest.fail("a cache was begun"))
    recipe = write_grid(tmp_path / "grid.toml", random_teacher)
    whole = recipe.read_text()
    changes = [("weight = 2.0", "wieght = 2.0", "wieght"), ('cache = "a"', 'cache = "b"', "'b'"),
               ('type = "calm"', 'type = "clam"', "variant calm")]  # fmt: skip
    for old, new, name in changes:
        assert old in whole
        recipe.write_text(whole.replace(old, new, 1))
        with pytest.raises(TideError, match=name):
            ablate.run_ablation(recipe, tmp_path / "out")
