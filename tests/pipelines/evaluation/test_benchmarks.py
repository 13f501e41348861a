"""What there is to measure, the tables of what was measured, and scores of use."""

import itertools
from pathlib import Path

import pytest

from pipelines.evaluation import benchmarks, use_scores
from pipelines.evaluation.benchmarks import Score, choose, read_benchmarks
from pipelines.evaluation.use_scores import USE, fill, gaps_of, is_function, read_use, score_all
from shared.models.checkpoint import resolve
from shared.system.files import TideError
from student_train.using.student import load_for_use

STUDENT = resolve("embedded:student_train/tiny_students/cross")


def test_gaps_are_whole_lines_and_filled_together_as_alone() -> None:
    student = load_for_use(STUDENT, "cpu")
    gaps = list(itertools.islice(gaps_of(student), 5))
    for gap in gaps:
        line = student.tokenizer.decode(gap.ids[gap.places].tolist())
        assert line.strip() and "\n" not in line
    for threshold in (0.3, 0.999):
        for gap, (ids, steps) in zip(gaps, fill(student, gaps, threshold), strict=True):
            assert fill(student, [gap], threshold) == [(ids, steps)]
            assert len(ids) == len(gap.places) and student.special.mask not in ids
            assert steps == len(ids) if threshold == 0.999 else steps <= len(ids)


def test_scores_are_the_same_every_time_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_scores, "_LINES", 6)
    monkeypatch.setattr(use_scores, "_FUNCTIONS", 3)
    scores = use_scores.score_use(STUDENT)
    assert use_scores.score_use(STUDENT) == scores and 1 <= scores.tokens_per_step <= 32
    assert read_use(tmp_path) is None
    text = '{"lines": 0.5, "parse": 0.5, "tokens_per_step": 2.0, "threshold": 0.9}'
    (tmp_path / USE).write_text(text)
    score_all([tmp_path])  # there already: no model is looked for
    known = read_use(tmp_path)
    assert known is not None and known.lines == 0.5
    assert is_function("async def f():\n    pass")
    assert not any(map(is_function, ["x = 1", "def f(:", "def f(): pass\nx = 1", "", "\0"]))


def test_the_papers_tasks_and_scores() -> None:
    """A slip in one of 64 numbers would show in the averages, which the paper names."""
    eight = read_benchmarks()
    for name, benchmark in eight.items():
        size = 3 if name in ("hellaswag", "mmlu") else 256
        assert (benchmark.new_tokens, benchmark.steps) == (size, size) and benchmark.chat
        assert benchmark.shots == (3 if name == "bbh" else 0)
    averages = {name: sum(row.values()) / 8 for name, row in benchmarks.paper_scores().items()}
    said = {"cross-tokenizer: TIDE-Cross": 34.20, "shared tokenizer: TIDE-Shared": 33.55}
    for name, average in {**said, "BD3LM, undistilled": 32.67}.items():
        assert averages[name] == pytest.approx(average, abs=0.011)
    assert all(list(row) == list(eight) for row in benchmarks.paper_scores().values())


def test_names_of_benchmarks_and_places_of_rows(tmp_path: Path) -> None:
    one, other = choose("gsm8k,arc_easy", None, shots=5, chat=None)
    assert (one.task, one.shots, one.chat) == ("gsm8k_cot", 5, True)
    assert (other.task, other.shots, other.chat) == ("arc_easy", 5, False)
    assert len(choose("paper,gsm8k", None)) == 8
    recipe = tmp_path / "r.toml"
    recipe.write_text('[mine]\ntask = "piqa"\nshots = 1\n')
    assert [b.task for b in choose("all", recipe)] == ["piqa"]
    for text in ("[a]\nshots = 1\n", '[a]\ntask = "x"\nshot = 1\n'):
        recipe.write_text(text)
        with pytest.raises(TideError):
            choose("all", recipe)
    rows = tmp_path / "a.jsonl.gz"
    rows.touch()
    assert benchmarks.parse_places([f"x={rows}"]) == {"x": rows}
    assert benchmarks.local_rows(rows)["dataset_path"] == "json"
    assert benchmarks.local_rows(tmp_path) == {"dataset_path": str(tmp_path)}
    for wrong in ("x", "=y", f"x={tmp_path}/none"):
        with pytest.raises(TideError):
            benchmarks.parse_places([wrong])
    with pytest.raises(TideError):
        benchmarks.local_rows(recipe)


def test_tables_say_whose_a_row_is_and_what_it_lacks(tmp_path: Path) -> None:
    scores = [
        Score("gsm8k", "GSM8K", "acc,none", 0.25, 0.01, 9, True),
        Score("w", "W", "word_perplexity,none", 31.5, None, 9, False, own_rows=True),
    ]
    rows = benchmarks.score_table(scores).splitlines()[2:]
    assert rows[0] == "| GSM8K | acc,none | 25.00 % | 1.00 | 9 (limited) |"
    assert rows[1] == "| W | word_perplexity,none | 31.50 | – | 9 |"  # no share
    eight = [Score(n, b.title, "m", 0.5, 0.01, 9, False) for n, b in read_benchmarks().items()]
    table = benchmarks.beside_the_paper({"whole": eight, "part": scores}).to_dicts()
    assert [row["source"] for row in table] == ["paper"] * 8 + ["**measured here**"] * 2
    assert [row["average of 8"] for row in table[8:]] == ["–", "50.00"]
    assert (table[8]["GSM8K"], table[8]["W"], table[8]["MATH"]) == ("25.00*", "31.50†", "–")
    assert table[0]["GSM8K"] == "59.60"
