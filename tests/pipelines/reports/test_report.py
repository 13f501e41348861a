from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.experiments.demo import PAIRS, VARIANTS, verdicts
from pipelines.reports.report import find_runs, summary_table, write_report
from shared.errors import TideError


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
    for variant in VARIANTS:
        for seed, gain in enumerate(gains):
            nll = 4.0 - (gain if variant.distilled else 0)
            kind = {"type": "calm", "temperature": 2.0, "tidal": {"axis": "both"}}
            fake_run(
                folder / f"{variant.name}-seed{seed}", seed, variant.recipe, nll,
                kind if variant.distilled else {"type": "none"},
            )  # fmt: skip


def test_the_table_has_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    fill(tmp_path, [0.1, 0.2, 0.3])
    table = summary_table(find_runs(tmp_path))
    assert table.height == len(VARIANTS)
    row = table.filter(table["student"] == "TIDE-Cross").to_dicts()[0]
    assert row["seeds"] == 3
    assert row["held-out NLL (nats/token)"] == "3.800 ± 0.100"
    assert row["objective"] == "calm, T 2.0, TIDAL both, weight 4"
    text = write_report(tmp_path).read_text()
    assert "| TIDE-Shared" in text
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("gains", "words"),
    [([0.1, 0.2], "helped: "), ([0.1, -0.2], "helped for some seeds only"), ([-0.1, -0.2], "did not help")],
)
def test_the_verdict_follows_the_numbers(tmp_path: Path, gains: list[float], words: str) -> None:
    fill(tmp_path, gains)
    assert verdicts(find_runs(tmp_path)).count(words) == len(PAIRS)


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="holds no finished runs"):
        find_runs(tmp_path)
