"""Every `tide` command on the pages is run as it stands, in a folder with what the pages suppose, or named below."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.test_docs import PAGES, ROOT, shell_lines

NEEDS = {
    r"^(cache|prepare|train|verify|sample|publish) .*(llada|dream|wedlm|sdar|OWNER/NAME --license apache-2.0$)":
        "weights and tokenizers of the hub",
    r"^eval .*--tasks (paper|gsm8k,humaneval|arc_easy|gsm8k --limit|mmlu)": "data sets of the hub",
    r"^lm-eval ": "data sets of the hub",
    r"^(cache|train|ablate) .*runs/frontier": "an hour: tests/pipelines/experiments run a small grid",
    r"^ablate ": "an hour: tests/pipelines/experiments run a small grid",
    r"^bench --only serving": "minutes: tests/pipelines/speed/test_serving.py runs it smaller",
    r"^bench --only use": "minutes: tests/pipelines/speed/test_use.py runs it smaller",
}  # fmt: skip
"""Commands that are not run, and why."""


def lines() -> list[str]:
    """In the order of the pages, each once."""
    found = [
        line
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for line in shell_lines(page.read_text())
    ]
    found = [line[line.index(".venv/bin/tide ") :] for line in found]
    return list(dict.fromkeys(re.sub(r"\s+#.*$", "", line).strip() for line in found))


def reason(line: str) -> str | None:
    command = line.removeprefix(".venv/bin/tide ")
    return next((why for pattern, why in NEEDS.items() if re.search(pattern, command)), None)


def run(line: str, world: Path) -> subprocess.CompletedProcess[str]:
    command = line.replace(".venv/bin/tide", f"{sys.executable} -m pipelines.cli")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if " serve " in line:
        return served(command, world, environment)
    return subprocess.run(["bash", "-c", command], cwd=world, input="Write `f`.\n\n", capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip


def served(
    command: str, world: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Until it says that it serves, and then to the end."""
    command = re.sub(r"--port \d+", "--port 0", command)
    with subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=world, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        assert process.stderr is not None
        said = ""
        while "serving" not in said and (line := process.stderr.readline()):
            said += line
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    return subprocess.CompletedProcess(command, process.returncode, "", said)


def test_what_is_not_run_is_on_the_pages() -> None:
    commands = [line.removeprefix(".venv/bin/tide ") for line in lines()]
    for pattern in NEEDS:
        assert any(re.search(pattern, command) for command in commands), pattern
    assert sum(reason(line) is None for line in lines()) > 25


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user who followed the README stands: recipes, the demo's caches and runs, some runs more."""
    place = tmp_path_factory.mktemp("world")
    (place / "pipelines").symlink_to(ROOT / "pipelines")
    (place / "gsm8k.jsonl").write_text(
        '{"question": "What is 3 and 4?", "answer": "3 and 4 is 7. #### 7"}\n'
    )
    for teacher in ("tiny-cross", "tiny-shared"):
        small = "--set data.limit=24 --set noise.draws=2"
        done = run(
            f".venv/bin/tide cache --teacher {teacher} {small} --out runs/demo/caches/{teacher}",
            place,
        )
        assert done.returncode == 0, done.stderr
    for name, teacher in (
        ("demo/TIDE-Cross-seed0", "tiny-cross"),
        ("demo/undistilled-shared-seed0", "tiny-shared"),
    ):
        few = "--set max_steps=2 --set heldout.limit=8"
        done = run(f".venv/bin/tide train --teacher {teacher} --cache runs/demo/caches/{teacher} {few} "
                   f"--out runs/{name}", place)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name, other in (("NAME", 0), ("one", 0), ("other", 1)):
        shutil.copytree(place / "runs/demo/TIDE-Cross-seed0", place / "runs" / name)
        settings = place / "runs" / name / "run.json"
        settings.write_text(
            settings.read_text().replace('"weight_decay": 0.0', f'"weight_decay": {other / 10}')
        )
    return place


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in lines() if reason(line) is None])
def test_a_command_of_the_pages_runs(line: str, world: Path) -> None:
    if "runs/sums.jsonl" in line:  # the page makes it in the line before
        (world / "runs" / "sums.jsonl").write_text(
            '{"ask": "What is 3 and 4?", "say": "3 and 4 is 7.", "question": "What is 3 and 4?", '
            '"answer": "3 and 4 is 7. #### 7"}\n'
        )
    done = run(line, world)
    assert done.returncode == 0, done.stderr[-3000:]
