"""Tables of runs: mean and spread, differences paired by seed, and runs told apart by settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.evaluation.use_scores import USE
from pipelines.experiments.ablate import demo_grid, verdicts
from pipelines.experiments.report import (
    compare,
    find_runs,
    interval,
    paired_differences,
    paired_table,
    summary_table,
    write_report,
)
from shared.system.errors import TideError

NONE: dict[str, Any] = {"type": "none"}
CALM = {"type": "calm", "temperature": 2.0, "tidal": {"axis": "both"}}


def fake_run(folder: Path, seed: int, cache: str, nll: float, distillation: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    config = {"seed": seed, "cache": f"c/{cache}", "distillation": distillation, "weight": 4.0}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    steps = [{"step": s, "denoise": 5.0 - s, "loss": 5.0 - s} for s in (1, 2)]
    steps.append({"step": 2, "eval_heldout_nll": nll})
    final = {"eval_heldout_nll": nll, "eval_heldout_accuracy": 0.25, "seconds": 10.0}
    (folder / "history.json").write_text(json.dumps({"steps": steps, "final": final}))


def fill(folder: Path, gains: list[float]) -> None:
    """Runs of the demo in which distillation gains so much, by seed."""
    for name, variant in demo_grid(1).variants.items():
        alone = variant.train["distillation"] == NONE
        for seed, gain in enumerate(gains):
            run, nll = folder / f"{name}-seed{seed}", 4.0 if alone else 4.0 - gain
            fake_run(run, seed, variant.cache, nll, NONE if alone else CALM)


def words(table: str) -> str:
    return " ".join(table.split())


def test_the_table_has_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    fill(tmp_path, [0.1, 0.2, 0.3])
    table = summary_table(find_runs(tmp_path))
    assert table.height == 5
    row = table.filter(table["student"] == "TIDE-Cross").to_dicts()[0]
    assert row["seeds"] == 3
    assert row["held-out NLL (nats/token)"] == "3.800 ± 0.100"
    assert row["objective"] == "calm, T 2.0, TIDAL both, weight 4"
    assert "lines exact" not in row  # nobody measured it
    text = write_report(tmp_path).read_text()
    assert "| TIDE-Shared" in text
    assert (tmp_path / "report.png").exists()


def test_the_verdict_follows_the_numbers(tmp_path: Path) -> None:
    grid = demo_grid(2)
    assert grid.pairs() == [
        ("undistilled-cross", "TIDE-Cross"),
        ("undistilled-shared", "TIDE-Shared"),
        ("undistilled-shared", "best-shared"),
    ]
    cases = {"helped: ": [0.1, 0.2], "some seeds": [0.1, -0.2], "did not help": [-0.1, -0.2]}
    for said, gains in cases.items():
        fill(tmp_path / said, gains)
        assert verdicts(find_runs(tmp_path / said), grid).count(said) == 3
    with pytest.raises(TideError):
        find_runs(tmp_path / "none")


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


@given(values.filter(lambda v: np.std(v) > 1e-3))
def test_the_interval_is_scipy_s_for_one_sample(values: list[float]) -> None:
    mean, half = interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], expected, rtol=1e-9, atol=1e-12)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    for seed, level in enumerate((4.0, 5.0, 6.0)):
        for name, more in (("plain", 0.0), ("other", -0.1)):
            run = tmp_path / f"{name}-seed{seed}"
            fake_run(run, seed, "c", level + more, NONE)
            use = {"lines": 0.1 - more * seed, "parse": 0.5, "tokens_per_step": 2, "threshold": 0.9}
            (run / USE).write_text(json.dumps(use))
    fake_run(tmp_path / "plain-seed9", 9, "c", 1.0, NONE)  # a seed that only one has
    runs = find_runs(tmp_path)
    assert paired_differences(runs, "plain", "other", "nll") == pytest.approx([-0.1] * 3)
    table = words(paired_table(runs, [("plain", "other")]))
    assert "| other | plain | 3 | **-0.100 ± 0.000** |" in table and "+0.100 ±" in table
    assert summary_table(runs).to_dicts()[0]["tokens a step"] == "2.00 ± 0.00"


def test_two_variants_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for seed, noise in enumerate((0.0, 0.5, -0.5)):
        other = 3.9 + noise + 0.001 * seed
        fake_run(tmp_path / "a" / f"x-seed{seed}", seed, "tiny-cross", 4.0 + noise, NONE)
        fake_run(tmp_path / "b" / f"y-seed{seed}", seed, "tiny-cross", other, CALM)
    said = compare(tmp_path / "a", tmp_path / "b")
    assert 'distillation.type: "none" → "calm"' in said
    assert "| B | A | 3 | **-0.099 ± 0.002** |" in words(said)
    fake_run(tmp_path / "c" / "z-seed9", 9, "tiny-cross", 4.0, NONE)
    for one, two in (("", "a"), ("a", "c")):  # several variants; no seed that both have
        with pytest.raises(TideError):
            compare(tmp_path / one, tmp_path / two)
