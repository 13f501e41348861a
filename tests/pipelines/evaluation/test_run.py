"""lm-eval itself, on real rows where they are at hand, on made ones in the hub's layout otherwise."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluation.model import TideBD3LM
from pipelines.evaluation.recipe import Benchmark, choose
from pipelines.evaluation.results import read_scores
from pipelines.evaluation.run import EvalSettings, run_benchmarks
from pipelines.reports.report import write_report
from shared.system.errors import TideError
from tests.pipelines.evaluation import hub_rows
from tests.real_assets import human_eval

DATA = Path(os.environ.get("TIDE_DATA", Path(__file__).parents[4] / "shared" / "data"))
SHORT: dict[str, Any] = {"block_size": 8}


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**{"sampling": SHORT, "device": "cpu", "limit": 4, **changes})


def short(names: str) -> list[Benchmark]:
    return choose(names, None, new_tokens=8, steps=4)


@pytest.fixture(scope="module")
def gsm8k() -> Path:
    path = DATA / "gsm8k_train_head1500.jsonl"
    if not path.exists():
        pytest.skip(f"no GSM8K rows at {path} (set TIDE_DATA)")
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows like GSM8K's."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [
        {"question": f"What is {i} and {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[str]:
    """A student that knows what to say to prompts that hold these texts; the prompts that it was given."""
    asked: list[str] = []

    def answer(self: Any, requests: list[Instance], config: Any) -> list[str]:
        texts = [str(request.args[0]) for request in requests]
        asked.extend(texts)
        return [next((said for key, said in answers.items() if key in text), "") for text in texts]

    monkeypatch.setattr(TideBD3LM, "_answer", answer)
    return asked


def test_gsm8k_is_graded_by_lm_eval(
    student: str, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in gsm8k.read_text().splitlines()[:4]]
    results = [row["answer"].split("#### ")[1] for row in rows]
    right = {
        row["question"]: f"So the answer is {result}."
        for row, result in zip(rows, results, strict=True)
    }
    asked = says(monkeypatch, {**right, rows[3]["question"]: "It is 0."})
    (score,) = run_benchmarks(student, short("gsm8k"), settings(data={"gsm8k": gsm8k}), tmp_path)
    assert (score.value, score.rows, score.limited) == (0.75, 4, True)
    assert all(
        text.startswith("<|im_start|>user\nQ: ") for text in asked
    )  # the chat template, no shots
    assert all(text.endswith("<|im_start|>assistant\n") and text.count("Q:") == 1 for text in asked)


@pytest.mark.slow
def test_human_eval_is_graded_by_lm_eval(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 164 problems; every other answer is the solution, in the middle of chat, the rest loops or is wrong."""
    with gzip.open(human_eval(), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    right = {row["prompt"]: row["canonical_solution"] + "\n```\nThat is all." for row in rows[::2]}
    wrong = {
        row["prompt"]: "    while True: pass\n" if i % 40 == 0 else "    return None\n"
        for i, row in enumerate(rows[1::2])
    }
    asked = says(monkeypatch, right | wrong)
    ask = settings(limit=None, run_code=True, data={"humaneval": human_eval()})
    (score,) = run_benchmarks(student, short("humaneval"), ask, tmp_path)
    assert score.rows == len(asked) == 164
    assert score.value == 0.5
    assert not score.limited
    beginnings = [text.split("<|im_start|>assistant\n")[1] for text in asked]
    assert all(
        text.startswith("Here is the completed function:\n```python\n") for text in beginnings
    )


def test_code_is_run_with_consent_alone(student: str, tmp_path: Path) -> None:
    rows = hub_rows.write(tmp_path / "rows", "humaneval")
    with pytest.raises(TideError, match="humaneval runs the code"):
        run_benchmarks(
            student, short("humaneval"), settings(data={"humaneval": rows}), tmp_path / "out"
        )
    assert not list((tmp_path / "out").iterdir())


def test_a_finished_benchmark_is_kept_and_another_way_refused(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = settings(data={"gsm8k": sums})
    first = run_benchmarks(student, short("gsm8k"), ask, tmp_path)
    monkeypatch.setattr(
        "student_train.using.load.load_for_use", None
    )  # nothing is loaded a second time
    assert run_benchmarks(student, short("gsm8k"), ask, tmp_path) == first
    with pytest.raises(TideError, match="limit: 4 there, 5 now"):
        run_benchmarks(student, short("gsm8k"), settings(data={"gsm8k": sums}, limit=5), tmp_path)
    with pytest.raises(TideError, match="new_tokens: 8 there, 16 now"):
        run_benchmarks(student, choose("gsm8k", None, new_tokens=16, steps=4), ask, tmp_path)


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
    assert len(asked) == 4  # two before, two after
    assert again.value == whole.value
    answers = [(tmp_path / name / "gsm8k.samples.jsonl").read_text() for name in ("whole", "out")]
    assert answers[0] == answers[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock") == [
        "gsm8k.json", "gsm8k.samples.jsonl",
    ]  # fmt: skip


def test_what_is_wrong_is_said_before_the_model_loads(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_train.using.load.load_for_use", None)
    cases = [
        (short("gsm9k"), {}, "no task 'gsm9k'"),
        (short("gsm8k"), {}, "rows of gsm8k cannot be read"),
        (short("ai2_arc"), {}, "ai2_arc is a tag of 2 tasks"),
        (short("mmlu"), {}, "rows of mmlu cannot be read"),
        (short("gsm8k"), {"mbpp": sums}, "--data names mbpp"),
    ]
    for benchmarks, data, message in cases:
        with pytest.raises(TideError, match=message):
            run_benchmarks(student, benchmarks, settings(data=data), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TideError, match="cannot be made"):
        run_benchmarks(student, short("gsm8k"), settings(), tmp_path / "file" / "out")
    with pytest.raises(TideError, match="no folder"):
        run_benchmarks("./none", short("gsm8k"), settings(), tmp_path)
    lacks = [Benchmark("gsm8k", "G", "gsm8k_cot", metric="bleu,none", new_tokens=8)]
    monkeypatch.undo()
    with pytest.raises(TideError, match="reports no bleu,none; its answers are kept"):
        run_benchmarks(student, lacks, settings(data={"gsm8k": sums}), tmp_path)


def test_the_command_and_the_report(student: str, sums: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["eval", student, "--tasks", "gsm8k", "--data", f"gsm8k={sums}", "--limit", "2", "--new-tokens", "8",
         "--block", "8", "--steps", "2", "--device", "cpu"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert "| GSM8K | exact_match,flexible-extract |" in done.stdout
    assert "2 (limited)" in done.stdout
    run = Path(student).parent
    (score,) = read_scores(run / "eval")
    assert score.rows == 2
    text = write_report(run.parent).read_text()
    assert "paper" in text and "measured here" in text and f"{100 * score.value:.2f}*†" in text
    alone = write_report(run / "eval").read_text()  # a folder of scores without runs
    assert "measured here" in alone and "| eval " in alone
    for wrong in (
        ["--limit", "0"],
        ["--block", "0"],
        ["--steps", "0"],
        ["--remasking", "best"],
        ["--tasks", ","],
    ):
        with pytest.raises(TideError):
            CliRunner().invoke(
                app, ["eval", student, "--tasks", "gsm8k", *wrong], catch_exceptions=False
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gsm8k", "math", "bbh", "mmlu-pro", "hellaswag", "mmlu", "humaneval", "mbpp"]
)
def test_each_of_the_papers_tasks_runs_from_local_files(
    student: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up rows in the hub's layout; a student that always says the right thing, and one that never does."""
    rows = hub_rows.write(tmp_path / "rows", name)
    ask = settings(limit=2, run_code=True, data={name: rows})
    says(monkeypatch, {"": hub_rows.RIGHT[name]})
    (score,) = run_benchmarks(student, short(name), ask, tmp_path / "right")
    assert score.value == 1.0
    says(monkeypatch, {"": "nonsense"})
    (score,) = run_benchmarks(student, short(name), ask, tmp_path / "wrong")
    assert score.value == 0.0
    monkeypatch.undo()
    (score,) = run_benchmarks(student, short(name), ask, tmp_path / "real")
    assert 0 <= score.value <= 1


@pytest.mark.slow
def test_two_processes_share_a_benchmark(student: str, sums: Path, tmp_path: Path) -> None:
    arguments = [
        "eval",
        student,
        "--tasks",
        "gsm8k",
        "--data",
        f"gsm8k={sums}",
        "--new-tokens",
        "8",
        "--block",
        "8",
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [
            *start,
            "-m",
            "pipelines.cli",
            *arguments,
            "--output",
            str(tmp_path / name),
            "--device",
            "cpu",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| GSM8K |") == 1
    texts = [(tmp_path / name / "gsm8k.samples.jsonl").read_text() for name in ("one", "two")]
    answers = [
        {row["doc_id"]: row["resps"] for row in map(json.loads, text.splitlines())}
        for text in texts
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


@pytest.mark.slow
def test_lm_evals_own_command_line(student: str, tmp_path: Path) -> None:
    """A task of one's own, of likelihoods, by `--model tide_bd3lm`."""
    rows = [
        {"question": f"{i} + 1 =", "choices": [f" {i}", f" {i + 1}"], "answer": 1} for i in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    task = {"task": "my_sums", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    (tmp_path / "my_sums.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "pipelines.cli", "lm-eval", "run", "--model", "tide_bd3lm", "--model_args",
               f"pretrained={student},mc_num=4,block_size=8", "--tasks", str(tmp_path / "my_sums.yaml"),
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|my_sums|" in done.stdout
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["n-samples"]["my_sums"]["effective"] == 5
    command[command.index("--model_args") + 1] += ",depth=3"
    wrong = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2
    assert "tide: error: tide_bd3lm has no argument depth" in wrong.stderr
    assert "Traceback" not in wrong.stderr
