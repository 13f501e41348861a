"""lm-eval itself, on real rows where they are at hand, else on made ones in the hub's layout."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluation import benchmarks
from pipelines.evaluation.benchmarks import Benchmark, Score, choose, read_benchmarks
from pipelines.evaluation.model import TideBD3LM
from pipelines.evaluation.run import EvalSettings, run_benchmarks
from pipelines.experiments.report import write_report
from shared.system.files import TideError
from tests.pipelines.evaluation import hub_rows
from tests.real_assets import human_eval


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**{"sampling": {"block_size": 8}, "device": "cpu", "limit": 4, **changes})


def short(names: str) -> list[Benchmark]:
    return choose(names, None, new_tokens=8, steps=4)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows like GSM8K's."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[str]:
    """A student that knows what to say to prompts with these texts; the prompts it was given."""
    asked: list[str] = []

    def answer(self: Any, requests: list[Instance], config: Any) -> list[str]:
        texts = [str(request.args[0]) for request in requests]
        asked.extend(texts)
        return [next((said for key, said in answers.items() if key in text), "") for text in texts]

    monkeypatch.setattr(TideBD3LM, "_answer", answer)
    return asked


def test_gsm8k_is_graded_by_lm_eval(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {f"What is {i} and": f"So the answer is {2 * i}." for i in range(3)}
    asked = says(monkeypatch, {**right, "What is 3": "It is 0."})
    (score,) = run_benchmarks(student, short("gsm8k"), settings(data={"gsm8k": sums}), tmp_path)
    assert (score.value, score.rows, score.limited) == (0.75, 4, True)
    for text in asked:  # the chat template, no shots
        assert text.startswith("<|im_start|>user\nQ: ") and text.count("Q:") == 1
        assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.slow
def test_human_eval_is_graded_by_lm_eval(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other answer is the solution, in the middle of chat, the rest loops or is wrong."""
    with gzip.open(human_eval(), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    says_what = {row["prompt"]: row["canonical_solution"] + "\n```\nThat is all." for row in rows}
    for i, row in enumerate(rows[1::2]):
        says_what[row["prompt"]] = "    return None\n" if i % 40 else "    while True: pass\n"
    asked = says(monkeypatch, says_what)
    ask = settings(limit=None, run_code=True, data={"humaneval": human_eval()})
    (score,) = run_benchmarks(student, short("humaneval"), ask, tmp_path)
    assert score.rows == len(asked) == 164 and score.value == 0.5 and not score.limited


def test_a_finished_benchmark_is_kept_and_another_way_refused(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = settings(data={"gsm8k": sums})
    first = run_benchmarks(student, short("gsm8k"), ask, tmp_path)
    monkeypatch.setattr("pipelines.evaluation.run.load_for_use", None)  # nothing is loaded again
    assert run_benchmarks(student, short("gsm8k"), ask, tmp_path) == first
    with pytest.raises(TideError, match="limit"):
        run_benchmarks(student, short("gsm8k"), settings(data={"gsm8k": sums}, limit=5), tmp_path)


def test_an_interrupted_benchmark_goes_on_where_it_was(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = settings(data={"gsm8k": sums}, batch=1)
    (whole,) = run_benchmarks(student, short("gsm8k"), ask, tmp_path / "whole")
    real, asked = TideBD3LM._answer, []

    def breaks(self: Any, requests: list[Instance], config: Any) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(requests[0])
        return real(self, requests, config)

    monkeypatch.setattr(TideBD3LM, "_answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks(student, short("gsm8k"), ask, tmp_path / "out")
    monkeypatch.setattr(TideBD3LM, "_answer", lambda *a: asked.append(a[1][0]) or real(*a))
    (again,) = run_benchmarks(student, short("gsm8k"), ask, tmp_path / "out")
    assert len(asked) == 4 and again.value == whole.value  # two before, two after
    answers = [(tmp_path / name / "gsm8k.samples.jsonl").read_text() for name in ("whole", "out")]
    assert answers[0] == answers[1]
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left - {".lock"} == {"gsm8k.json", "gsm8k.samples.jsonl"}


def test_what_is_wrong_is_said_before_the_model_loads(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.run.load_for_use", None)
    code = hub_rows.write(tmp_path / "rows", "humaneval")
    for names, data, offender in [
        ("gsm9k", {}, "gsm9k"),
        ("gsm8k", {}, "rows of gsm8k"),
        ("ai2_arc", {}, "arc_easy"),  # a tag: its tasks are named
        ("gsm8k", {"mbpp": sums}, "mbpp"),
        ("humaneval", {"humaneval": code}, "--confirm-run-unsafe-code"),
    ]:
        with pytest.raises(TideError, match=offender):
            run_benchmarks(student, short(names), settings(data=data), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(TideError):
        run_benchmarks(student, short("gsm8k"), settings(), tmp_path / "file" / "out")
    lacks = [Benchmark("gsm8k", "G", "gsm8k_cot", metric="bleu,none", new_tokens=8)]
    monkeypatch.undo()
    with pytest.raises(TideError, match="bleu,none"):
        run_benchmarks(student, lacks, settings(data={"gsm8k": sums}), tmp_path)


def test_the_command_and_the_report(student: str, sums: Path) -> None:
    options = ["--limit=2", "--new-tokens=8", "--block=8", "--steps=2", "--device=cpu"]
    command = ["eval", student, "--tasks=gsm8k", "--data", f"gsm8k={sums}", *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "| GSM8K | exact_match,flexible-extract |" in done.stdout
    alone = write_report(Path(student).parent / "eval").read_text()  # scores without runs
    assert "measured here" in alone and "| eval " in alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gsm8k", "math", "bbh", "mmlu-pro", "hellaswag", "mmlu", "humaneval", "mbpp"]
)
def test_each_of_the_papers_tasks_runs_from_local_files(
    student: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in the hub's layout; a student that always says the right thing, and one that never."""
    rows = hub_rows.write(tmp_path / "rows", name)
    ask = settings(limit=2, run_code=True, data={name: rows})
    for answer, value in ((hub_rows.RIGHT[name], 1.0), ("nonsense", 0.0)):
        says(monkeypatch, {"": answer})
        (score,) = run_benchmarks(student, short(name), ask, tmp_path / str(value))
        assert score.value == value
    monkeypatch.undo()
    (score,) = run_benchmarks(student, short(name), ask, tmp_path / "real")
    assert 0 <= score.value <= 1


def tide(*arguments: str, start: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *start, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_share_a_benchmark(student: str, sums: Path, tmp_path: Path) -> None:
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    answers = []
    for name, start in (("one", ()), ("two", two)):
        options = ["--new-tokens=8", "--block=8", "--device=cpu", f"--output={tmp_path / name}"]
        command = ["eval", student, "--tasks=gsm8k", f"--data=gsm8k={sums}", *options]
        done = tide(*command, start=start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| GSM8K |") == 1
        lines = (tmp_path / name / "gsm8k.samples.jsonl").read_text().splitlines()
        answers.append({row["doc_id"]: row["resps"] for row in map(json.loads, lines)})
    assert answers[0] == answers[1] and len(answers[0]) == 6


@pytest.mark.slow
def test_lm_evals_own_command_line(student: str, tmp_path: Path) -> None:
    """A task of one's own, of likelihoods, by `--model tide_bd3lm`."""
    rows = [{"question": f"{i} + 1 =", "choices": [f" {i}", f" {i + 1}"]} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    task = {
        "task": "my_sums", "dataset_path": "json", "test_split": "test", "metric_list": [acc],
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": 1,
    }  # fmt: skip
    (tmp_path / "my_sums.yaml").write_text(json.dumps(task))
    model = f"pretrained={student},mc_num=4,block_size=8"
    places = ["--tasks", str(tmp_path / "my_sums.yaml"), "--output_path", str(tmp_path / "out")]
    command = ["lm-eval", "run", "--model", "tide_bd3lm", *places, "--model_args"]
    done = tide(*command, model)
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["n-samples"]["my_sums"]["effective"] == 5


def test_the_papers_tasks_and_scores() -> None:
    """A slip in one of 64 numbers would show in the averages, which the paper names."""
    eight = read_benchmarks()
    for name, benchmark in eight.items():
        size = 3 if name in ("hellaswag", "mmlu") else 256
        assert (benchmark.new_tokens, benchmark.steps) == (size, size) and benchmark.chat
        assert benchmark.shots == (3 if name == "bbh" else 0)
    averages = {name: sum(row.values()) / 8 for name, row in benchmarks.paper_scores().items()}
    assert averages["cross-tokenizer: TIDE-Cross"] == pytest.approx(34.20, abs=0.011)
    assert averages["shared tokenizer: TIDE-Shared"] == pytest.approx(33.55, abs=0.011)
    assert averages["BD3LM, undistilled"] == pytest.approx(32.67, abs=0.011)
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
