"""A hundred thousand rows through the command: all of them, in bounded memory."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    stream = random.Random(0)
    words = ["alpha", "beta", "gamma", "def", "return", "class", "import", "for", "if", "self"]

    def text(most: int) -> str:
        return " ".join(stream.choices(words, k=stream.randint(5, most)))

    with (tmp_path / "d.jsonl").open("w") as file:
        for i in range(100_000):
            chat = [
                {"role": "user", "content": f"{i}: {text(30)}"},
                {"role": "assistant", "content": text(80)},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    settings = ["--set", "data.limit=100000", "--set", "lengths={student=256, teacher=256}"]
    places = ["--data", str(tmp_path / "d.jsonl"), "--prepared", str(tmp_path / "p")]
    command = [sys.executable, "-m", "pipelines.cli", "prepare", *places, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usable           100,000, taken 100,000" in done.stdout
    peak = re.search(r"peak memory of the largest process: ([\d,]+) MiB", done.stdout)
    assert peak is not None and int(peak[1].replace(",", "")) < 1500
    print(peak[0])
