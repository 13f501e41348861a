"""A student to the hub and back: what is loaded from there answers as the run's own does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pipelines.publishing import gather, parse_target
from shared.system.errors import TideError
from student_train.model.export import Format, export_student
from tests.pipelines.publishing.hub import Hub, running

NAMES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def run(student: str, tmp_path: Path) -> Path:
    """A run with a score, and with things that are nobody's business."""
    folder = tmp_path / "run"
    shutil.copytree(student, folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"pickle")
    (folder / "model" / "notes.py").write_text("print()\n")
    (folder / "model" / "LICENSE").write_text("Apache License\n")
    (folder / "eval").mkdir()
    score = {"name": "gsm8k", "title": "GSM8K", "metric": "exact_match", "value": 0.25, "error": 0.01, "rows": 1319,
             "settings": {"limit": None, "rows": None}}  # fmt: skip
    (folder / "eval" / "gsm8k.json").write_text(json.dumps(score))
    return folder


@pytest.fixture
def hub() -> Iterator[tuple[Hub, dict[str, str]]]:
    made = Hub("secret")
    with running(made) as environment:
        yield made, environment


def tide(
    arguments: list[str], environment: dict[str, str], token: str = "secret"
) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    whole = {**os.environ, "HF_TOKEN": token, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=whole)
    return done.returncode, done.stdout, done.stderr


def test_published_downloaded_and_answering_as_before(
    run: Path, hub: tuple[Hub, dict[str, str]], tmp_path: Path
) -> None:
    made, environment = hub
    environment |= {"HF_HOME": str(tmp_path / "hf")}
    publish = ["publish", str(run), "hf://me/small"]
    code, said, error = tide([*publish, "--license", "apache-2.0", "--private"], environment)
    assert code == 0, error
    assert said.splitlines()[-1] == f"{made.address}/me/small/commit/{'0' * 39}1"
    assert "left out: notes.py, training_args.bin" in said
    files = made.repositories["me/small"]
    assert set(files) == {*NAMES, "LICENSE"} and made.private["me/small"]
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    options = ["--new-tokens", "16", "--block", "8", "--device", "cpu"]
    _, own, _ = tide(["sample", str(run / "model"), "Write `f`.", *options], environment)
    code, theirs, error = tide(["sample", "me/small", "Write `f`.", *options], environment)
    assert code == 0, error
    assert theirs == own
    before = len(made.uploads)
    code, _, error = tide(
        ["publish", str(run), "hf://me/small"], environment
    )  # again: the weights are there
    assert code == 0, error
    assert len(made.uploads) == before


def test_the_card_has_scores_data_and_licence(run: Path) -> None:
    contents = gather(run, "me/small", "apache-2.0")
    card: Any = ModelCard(contents.card)
    assert card.data.license == "apache-2.0"
    scores = "| GSM8K | exact_match | 25.00 % | 1.00 | 1319 |"
    for words in (scores, "* data: `", "tide sample me/small", "## Licence\n\napache-2.0"):
        assert words in contents.card
    assert contents.card.index("## Benchmarks") < contents.card.index("## Licence")
    assert str(run.parent) not in contents.card
    without = gather(run / "model", "me/small", None).card
    assert (
        "None is stated yet" in without and ModelCard(without).data.to_dict().get("license") is None
    )


def test_a_card_of_ones_own_stays(run: Path) -> None:
    (run / "model" / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# Mine\n\n## Benchmarks\n\nnone\n"
    )
    text = gather(run, "me/small", None).card
    assert text == "---\nlicense: mit\n---\n\n# Mine\n\n## Benchmarks\n\nnone\n"


def test_a_dry_run_needs_no_network(run: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code, said, error = tide(["publish", str(run), "hf://me/small", "--dry-run"], nowhere)
    assert code == 0, error
    assert all(name in said for name in NAMES) and said.endswith("nothing was sent\n")


@pytest.mark.slow
def test_what_goes_wrong_is_explained(
    run: Path, hub: tuple[Hub, dict[str, str]], tmp_path: Path
) -> None:
    made, environment = hub
    environment |= {"HF_HOME": str(tmp_path / "hf")}
    code, _, said = tide(["publish", str(run), "hf://me/small"], environment, token="wrong")
    assert code == 2 and "hf auth login" in said
    made.damage = True
    code, _, said = tide(["publish", str(run), "hf://me/small"], environment)
    assert code == 2 and "model.safetensors did not arrive at me/small as it was sent" in said
    code, _, said = tide(
        ["publish", str(run), "hf://me/small"], {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    assert code == 2 and "Traceback" not in said


def test_targets_that_are_none() -> None:
    for target in ("me/small", "hf://small", "hf://me/small/more", "hf://me/a b", "s3://me/small"):
        with pytest.raises(TideError):
            parse_target(target)


def test_folders_that_are_no_student(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TideError):
        gather(tmp_path / "none", "me/small", None)
    (run / "model" / "README.md").unlink()
    with pytest.raises(TideError):
        gather(run, "me/small", None)
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(TideError):
        gather(run, "me/small", None)


def test_an_exported_student_keeps_its_card(run: Path, tmp_path: Path) -> None:
    layouts: tuple[Format, Format] = ("hf", "a2d")
    for layout in layouts:
        out = tmp_path / layout
        export_student(run / "model", out, layout)
        assert (out / "README.md").read_bytes() == (run / "model" / "README.md").read_bytes()
        said = json.loads((out / "config.json").read_text())
        assert (said["block_size"], said["mask_token_id"]) == (32, 2047)
        assert (out / "LICENSE").exists() and not (out / "notes.py").exists()
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 1  # its end of turn is its EOS
    one, two = (
        load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "hf")
    )
    assert all((one[name] == two[name]).all() for name in one)
