"""What of a student goes to the hub, and what is said where it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.publishing import gather, parse_target, upload
from shared.system.errors import TideError
from student_train.export import Format, export_student
from tests.pipelines.publishing.hub import Hub, running

NAMES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "LICENSE",
         "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.fixture
def run(student: str, tmp_path: Path) -> Path:
    """A run with a score, and with things that are nobody's business."""
    folder = tmp_path / "run"
    shutil.copytree(student, folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"pickle")
    (folder / "model" / "notes.py").write_text("print()\n")
    (folder / "model" / "LICENSE").write_text("Apache License\n")
    (folder / "eval").mkdir()
    score = {"name": "gsm8k", "title": "GSM8K", "metric": "exact_match", "value": 0.25,
             "error": 0.01, "rows": 1319, "settings": {"limit": None, "rows": None}}  # fmt: skip
    (folder / "eval" / "gsm8k.json").write_text(json.dumps(score))
    return folder


def test_a_dry_run_says_what_would_be_sent(run: Path) -> None:
    command = ["publish", str(run), "hf://me/small", "--dry-run"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and all(name in done.stdout for name in NAMES)
    assert "left out: notes.py, training_args.bin" in done.stdout


def test_the_card_has_scores_data_and_licence(run: Path) -> None:
    text = gather(run, "me/small", "apache-2.0").card
    card: Any = ModelCard(text)
    assert card.data.license == "apache-2.0"
    scores = "| GSM8K | exact_match | 25.00 % | 1.00 | 1319 |"
    for words in (scores, "* data: `", "tide sample me/small", "## Licence\n\napache-2.0"):
        assert words in text
    assert text.index("## Benchmarks") < text.index("## Licence")
    assert str(run.parent) not in text
    without: Any = ModelCard(gather(run / "model", "me/small", None).card)
    assert without.data.to_dict().get("license") is None
    own = "---\nlicense: mit\n---\n\n# Mine\n\n## Benchmarks\n\nnone\n"  # stays as it is
    (run / "model" / "README.md").write_text(own)
    assert gather(run, "me/small", None).card == own


@pytest.mark.slow
def test_what_goes_wrong_on_the_hub_is_explained(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = gather(run, "me/small", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running(Hub("secret")) as environment:
        for place, token in ((environment["HF_ENDPOINT"], "wrong"), ("http://127.0.0.1:9", "x")):
            api = HfApi(place, token)
            monkeypatch.setattr("pipelines.publishing.HfApi", lambda api=api: api)
            with pytest.raises(TideError):
                upload(contents, "me/small", private=False, message="m")


def test_targets_and_folders_that_are_none(run: Path, tmp_path: Path) -> None:
    for target in ("me/small", "hf://small", "hf://me/small/more", "hf://me/a b", "s3://me/small"):
        with pytest.raises(TideError):
            parse_target(target)
    for missing in ("none", "README.md", "model.safetensors"):
        (run / "model" / missing).unlink(missing_ok=True)
        with pytest.raises(TideError):
            gather(tmp_path / "none" if missing == "none" else run, "me/small", None)


def test_an_exported_student_keeps_its_card(run: Path, tmp_path: Path) -> None:
    layouts: tuple[Format, Format] = ("hf", "a2d")
    for layout in layouts:
        out = tmp_path / layout
        export_student(run / "model", out, layout)
        assert (out / "README.md").read_bytes() == (run / "model" / "README.md").read_bytes()
        said = json.loads((out / "config.json").read_text())
        assert (said["block_size"], said["mask_token_id"]) == (32, 2047)
        assert (out / "LICENSE").exists() and not (out / "notes.py").exists()
    one = load_file(run / "model" / "model.safetensors")
    two = load_file(tmp_path / "hf" / "model.safetensors")
    assert all((one[name] == two[name]).all() for name in one)
