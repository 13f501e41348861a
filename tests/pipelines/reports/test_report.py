from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.experiments.demo import demo_grid, verdicts
from pipelines.reports.paired import compare
from pipelines.reports.report import find_runs, summary_table, write_report
from shared.system.errors import TideError


def fake_run(folder: Path, seed: int, cache: str, nll: float, distillation: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    config = {"seed": seed, "cache": f"c/{cache}", "distillation": distillation, "weight": 4.0}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    steps = [{"step": s, "denoise": 5.0 - s, "loss": 5.0 - s} for s in (1, 2)]
    steps.append({"step": 2, "eval_heldout_nll": nll})
    final = {
        "eval_heldout_nll": nll,
        "eval_heldout_bits_per_byte": nll / 2,
        "eval_heldout_accuracy": 0.25,
        "seconds": 10.0,
    }
    (folder / "history.json").write_text(json.dumps({"steps": steps, "final": final}))


def fill(folder: Path, gains: list[float]) -> None:
    """Runs of the demo in which distillation gains so much, by seed."""
    for name, variant in demo_grid(1).variants.items():
        alone = variant.train["distillation"] == {"type": "none"}
        kind = {"type": "calm", "temperature": 2.0, "tidal": {"axis": "both"}}
        for seed, gain in enumerate(gains):
            nll = 4.0 if alone else 4.0 - gain
            run = folder / f"{name}-seed{seed}"
            fake_run(run, seed, variant.cache, nll, {"type": "none"} if alone else kind)


def test_the_table_has_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    fill(tmp_path, [0.1, 0.2, 0.3])
    table = summary_table(find_runs(tmp_path))
    assert table.height == 5
    row = table.filter(table["student"] == "TIDE-Cross").to_dicts()[0]
    assert row["seeds"] == 3
    assert row["held-out NLL (nats/token)"] == "3.800 ± 0.100"
    assert row["objective"] == "calm, T 2.0, TIDAL both, weight 4"
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
    for i, (gains, words) in enumerate([([0.1, 0.2], "helped: "), ([0.1, -0.2], "some seeds"),
                                        ([-0.1, -0.2], "did not help")]):  # fmt: skip
        fill(tmp_path / str(i), gains)
        assert verdicts(find_runs(tmp_path / str(i)), grid).count(words) == 3
    with pytest.raises(TideError):
        find_runs(tmp_path / "none")


def test_runs_are_grouped_by_their_settings_never_by_their_folder(tmp_path: Path) -> None:
    """Two different experiments whose folders are both called `student` are no two seeds of one."""
    kinds: list[dict[str, Any]] = [{"type": "none"}, {"type": "calm", "temperature": 2.0}]
    for seed, (name, kind) in enumerate(zip(("monday", "tuesday"), kinds, strict=True)):
        fake_run(tmp_path / name / "student", seed, "tiny-cross", 4.0, kind)
    table = summary_table(find_runs(tmp_path))
    assert sorted(table["student"].to_list()) == ["monday/student", "tuesday/student"]
    assert table["seeds"].to_list() == [1, 1]
    fake_run(tmp_path / "monday" / "student-seed7", 7, "tiny-cross", 4.0, kinds[1])
    fake_run(tmp_path / "monday" / "student-seed8", 8, "tiny-cross", 4.0, {"type": "none"})
    names = {
        run.place.name: run.variant
        for run in find_runs(tmp_path)
        if run.place.parent.name == "monday"
    }
    assert names["student"] == names["student-seed8"] != names["student-seed7"]


def test_two_variants_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for seed, noise in enumerate((0.0, 0.5, -0.5)):
        fake_run(
            tmp_path / "a" / f"x-seed{seed}", seed, "tiny-cross", 4.0 + noise, {"type": "none"}
        )
        fake_run(tmp_path / "b" / f"y-seed{seed}", seed, "tiny-cross", 3.9 + noise + 0.001 * seed,
                 {"type": "calm", "temperature": 2.0})  # fmt: skip
    said = compare(tmp_path / "a", tmp_path / "b")
    assert 'distillation.type: "none" → "calm"' in said
    assert "| B | A | 3 | **-0.099 ± 0.002** |" in said
    with pytest.raises(TideError, match="2 variants"):
        compare(tmp_path, tmp_path / "a")
    fake_run(tmp_path / "c" / "z-seed9", 9, "tiny-cross", 4.0, {"type": "none"})
    with pytest.raises(TideError, match="seed"):
        compare(tmp_path / "a", tmp_path / "c")
