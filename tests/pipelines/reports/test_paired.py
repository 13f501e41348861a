"""Paired differences: the interval is Student's, and pairing removes what seeds have in common."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.evaluation.use_scores import USE
from pipelines.reports.paired import differences, final, paired, paired_table
from pipelines.reports.report import find_runs, summary_table
from tests.pipelines.reports.test_report import fake_run


@given(
    st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=3, max_size=9).filter(
        lambda v: np.std(v) > 1e-3
    )
)
def test_the_interval_is_scipy_s_for_one_sample(values: list[float]) -> None:
    found = paired(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.half is not None
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], [low, high], rtol=1e-9, atol=1e-12
    )
    assert paired([0.25]).text() == "+0.250"  # one seed has no interval
    assert found.text().startswith("**") == bool(low > 0 or high < 0)


def test_what_seeds_have_in_common_does_not_count(tmp_path: Path) -> None:
    for seed, level in enumerate((4.0, 5.0, 6.0)):
        for name, more in (("plain", 0.0), ("other", -0.1)):
            fake_run(tmp_path / f"{name}-seed{seed}", seed, "c", level + more, {"type": "none"})
    fake_run(tmp_path / "plain-seed9", 9, "c", 1.0, {"type": "none"})  # a seed that only one has
    runs = find_runs(tmp_path)
    found = differences(runs, "plain", "other", final("nll"))
    assert found == pytest.approx([-0.1] * 3)
    table = paired_table(runs, [("plain", "other")])
    assert "| other | plain | 3 | **-0.100 ± 0.000** |" in table
    assert "lines exact" not in table  # nobody measured it


def test_use_is_in_the_tables_where_it_was_measured(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name in ("plain", "other"):
            run = tmp_path / f"{name}-seed{seed}"
            fake_run(run, seed, "c", 4.0, {"type": "none"})
            more = 0.01 * (seed + 1) if name == "other" else 0.0
            use = {"lines": 0.1 + more, "parse": 0.5, "tokens_per_step": 2.0, "threshold": 0.9}
            (run / USE).write_text(json.dumps(use))
    runs = find_runs(tmp_path)
    assert summary_table(runs).to_dicts()[0]["tokens a step"] == "2.00 ± 0.00"
    assert "+0.015 ±" in paired_table(runs, [("plain", "other")])
