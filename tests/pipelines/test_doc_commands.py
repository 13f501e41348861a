"""Every `tide` command on the pages is run as it stands, where a user of the README stands."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.test_docs import PAGES, ROOT, shell_lines

# Commands that are not run, and why.
NEEDS = {
    r"^(cache|prepare|train|verify|sample|chat|publish) .*(llada|dream|wedlm|sdar|OWNER/NAME --license apache-2.0$)": "weights and tokenizers of the hub",  # noqa: E501
    r"^eval .*--tasks (paper|gsm8k,humaneval|arc_easy|gsm8k --limit|mmlu)": "data sets of the hub",
    r"^lm-eval ": "data sets of the hub",
    r"^ablate |^(cache|train) .*runs/frontier": "an hour: tests of ablate run a small grid",
    r"^bench ": "minutes: tests/pipelines/speed runs the tables smaller",
}


def run(line: str, world: Path) -> None:
    """Run a line; a server until it says that it serves."""
    command = line.replace(".venv/bin/tide", f"{sys.executable} -m pipelines.cli")
    command = re.sub(r"--port \d+", "--port 0", command)
    options: dict[str, Any] = {"cwd": world, "text": True, "stderr": subprocess.PIPE}
    options["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    if " serve " not in line:
        asked = "Write `f`.\n\n"
        done = subprocess.run(["bash", "-c", command], input=asked, check=False, **options)
        assert done.returncode == 0, (line, done.stderr[-3000:])
        return
    with subprocess.Popen(["bash", "-c", f"exec {command}"], **options) as process:
        said = ""
        assert process.stderr is not None
        while "serving" not in said and (text := process.stderr.readline()):
            said += text
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 0, (line, said)


@pytest.mark.slow
def test_the_commands_of_the_pages_run(tmp_path: Path) -> None:
    # 1. recipes, the demo's caches and runs, some runs more
    tide = ".venv/bin/tide"
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    row = '{"ask": "What is 3 and 4?", "say": "7.", "question": "What is 3 and 4?", "answer": "#### 7"}\n'  # noqa: E501
    (tmp_path / "gsm8k.jsonl").write_text(row)
    for teacher, name in (("tiny-cross", "TIDE-Cross"), ("tiny-shared", "undistilled-shared")):
        cache = f"runs/demo/caches/{teacher}"
        small = "--set data.limit=24 --set noise.draws=2"
        run(f"{tide} cache --teacher {teacher} {small} --out {cache}", tmp_path)
        small = f"--set max_steps=2 --set heldout.limit=8 --out runs/demo/{name}-seed0"
        run(f"{tide} train --teacher {teacher} --cache {cache} {small}", tmp_path)
    for name, decay in (("NAME", 0.0), ("one", 0.0), ("other", 0.1)):
        shutil.copytree(tmp_path / "runs/demo/TIDE-Cross-seed0", tmp_path / "runs" / name)
        settings = tmp_path / "runs" / name / "run.json"
        text = settings.read_text().replace('"weight_decay": 0.0', f'"weight_decay": {decay}')
        settings.write_text(text)
    # 2. every line of every page, once, in their order
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    lines = [re.sub(r"\s+#.*$", "", line).strip() for page in pages for line in shell_lines(page)]
    for line in dict.fromkeys(lines):
        if any(re.search(pattern, line.removeprefix(f"{tide} ")) for pattern in NEEDS):
            continue
        if "runs/sums.jsonl" in line:  # the page makes it in the line before
            (tmp_path / "runs/sums.jsonl").write_text(row)
        run(line, tmp_path)
