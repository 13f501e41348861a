from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.evaluation.data import local_rows, parse_places
from pipelines.evaluation.recipe import choose, paper_benchmarks
from pipelines.evaluation.results import Score
from pipelines.evaluation.table import beside_the_paper, paper_scores, score_table
from shared.system.errors import TideError


def test_the_papers_tasks_and_settings() -> None:
    found = paper_benchmarks()
    assert list(found) == [
        "gsm8k",
        "math",
        "bbh",
        "mmlu-pro",
        "hellaswag",
        "mmlu",
        "humaneval",
        "mbpp",
    ]
    for name, benchmark in found.items():
        size = 3 if name in ("hellaswag", "mmlu") else 256
        assert (benchmark.new_tokens, benchmark.steps) == (size, size)
        assert benchmark.shots == (3 if name == "bbh" else 0)
        assert benchmark.chat


def test_averages_of_the_papers_rows_are_those_it_names() -> None:
    """DESIGN, section 1, and the paper's abstract: a slip in one of 64 numbers would show."""
    averages = {name: round(sum(row.values()) / 8, 2) for name, row in paper_scores().items()}
    assert averages["cross-tokenizer: TIDE-Cross"] == pytest.approx(34.20, abs=0.011)
    assert averages["shared tokenizer: TIDE-Shared"] == pytest.approx(33.55, abs=0.011)
    assert averages["BD3LM, undistilled"] == pytest.approx(32.67, abs=0.011)
    assert paper_scores()["shared tokenizer: TIDE-Shared"]["humaneval"] == 48.78
    assert all(set(row) == set(paper_benchmarks()) for row in paper_scores().values())


def test_names_are_of_the_recipe_or_of_lm_eval(tmp_path: Path) -> None:
    one, other = choose("gsm8k,arc_easy", None, shots=5, chat=None)
    assert (one.task, one.shots, one.chat) == ("gsm8k_cot", 5, True)
    assert (other.task, other.shots, other.chat) == ("arc_easy", 5, False)
    assert len(choose("paper,gsm8k", None)) == 8
    (tmp_path / "r.toml").write_text('[mine]\ntask = "piqa"\nshots = 1\n')
    assert [b.task for b in choose("all", tmp_path / "r.toml")] == ["piqa"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nshots = 1\n", "a in .* is no benchmark"),
        ('[a]\ntask = "x"\nshot = 1\n', "unknown shot"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(TideError, match=message):
        choose("all", tmp_path / "r.toml")
    with pytest.raises(TideError, match="no task is named"):
        choose(" , ", None)


def test_places_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").touch()
    (tmp_path / "a.txt").touch()
    assert parse_places([f"x={tmp_path}/a.jsonl.gz"]) == {"x": tmp_path / "a.jsonl.gz"}
    assert local_rows(tmp_path / "a.jsonl.gz")["dataset_path"] == "json"
    assert local_rows(tmp_path) == {"dataset_path": str(tmp_path)}
    for wrong in ("x", "=y", f"x={tmp_path}/none"):
        with pytest.raises(TideError, match="--data"):
            parse_places([wrong])
    with pytest.raises(TideError, match="no file of rows"):
        local_rows(tmp_path / "a.txt")


def test_perplexities_are_no_shares(tmp_path: Path) -> None:
    scores = [
        Score("a", "A", "acc,none", 0.25, 0.01, 9, False, tmp_path),
        Score("w", "W", "word_perplexity,none", 31.5, None, 9, True, tmp_path),
    ]
    rows = score_table(scores).splitlines()[2:]
    assert rows[0] == "| A | acc,none | 25.00 % | 1.00 | 9 |"
    assert rows[1] == "| W | word_perplexity,none | 31.50 | – | 9 (limited) |"
    assert beside_the_paper({"mine": scores}).to_dicts()[-1]["W"] == "31.50*"


def test_every_row_says_whose_it_is(tmp_path: Path) -> None:
    eight = [
        Score(n, b.title, "m", 0.5, 0.01, 9, False, tmp_path) for n, b in paper_benchmarks().items()
    ]
    part = [
        Score("gsm8k", "GSM8K", "m", 0.25, None, 4, True, tmp_path),
        Score("piqa", "PIQA", "m", 0.1, None, 4, False, tmp_path, own_rows=True),
    ]
    table = beside_the_paper({"whole": eight, "part": part}).to_dicts()
    assert [row["source"] for row in table] == ["paper"] * 8 + ["**measured here**"] * 2
    assert [row["average of 8"] for row in table[8:]] == ["–", "50.00"]
    assert (table[8]["GSM8K"], table[8]["PIQA"], table[8]["MATH"]) == ("25.00*", "10.00†", "–")
    assert table[0]["GSM8K"] == "59.60"
