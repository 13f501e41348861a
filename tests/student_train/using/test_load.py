"""A student from a folder: its mask, block and ends are found by one rule, or an error says what
disagrees.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from shared.models.checkpoint import open_checkpoint
from shared.models.masks import stated_mask, student_mask
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from student_train.training.trainer import train_student
from student_train.using.settings import SampleConfig, Special
from student_train.using.student import choose_block, load_for_use, sample
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER
from tests.student_train.model.test_student import small
from tests.student_train.training.test_trainer import config


@pytest.fixture(scope="module")
def student(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student")
    train_student(config(caches["tiny-cross"], out, max_steps=2, heldout=None))
    return out / "model"


def edited(source: Path, target: Path, file: str = "config.json", **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, target))
    values = json.loads((folder / file).read_text())
    values.update(changes)
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def test_block_and_mask_of_training_are_recorded_and_used(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_for_use(str(student), "cpu")
    assert (loaded.block, loaded.special.mask) == (32, 2047)
    assert choose_block(None, loaded) == choose_block(32, loaded) == 32
    assert not capsys.readouterr().err
    assert choose_block(8, loaded) == 8
    assert "trained with blocks of 32 and is sampled with 8" in capsys.readouterr().err


def test_null_states_nothing_and_two_masks_are_an_error_that_shows_both(
    student: Path, tmp_path: Path
) -> None:
    assert (
        load_for_use(
            str(edited(student, tmp_path / "null", mask_token_id=None)), "cpu"
        ).special.mask
        == 2047
    )
    with pytest.raises(TideError, match=r"100.*2047"):
        load_for_use(str(edited(student, tmp_path / "other", mask_token_id=100)), "cpu")
    silent = edited(edited(student, tmp_path / "a", mask_token_id="absent"), tmp_path / "b", "tokenizer_config.json", mask_token="absent")  # fmt: skip  # noqa: E501
    with pytest.raises(TideError):
        load_for_use(str(silent), "cpu")


def test_an_end_of_text_or_an_ordinary_word_is_no_mask(student: Path, tmp_path: Path) -> None:
    plain = edited(student, tmp_path / "t", "tokenizer_config.json", mask_token="absent")
    tokenizer = Tokenizer.load(plain)
    eos = tokenizer.special_id("eos")
    for index in (eos, 100):
        folder = edited(plain, tmp_path / str(index), mask_token_id=index)
        with pytest.raises(TideError):
            stated_mask(open_checkpoint(str(folder)), tokenizer)
    with pytest.raises(TideError):
        student_mask(tokenizer, "the")
    assert student_mask(tokenizer, None) == ("<|mask|>", 2047)
    assert student_mask(tokenizer, "<|hole|>") == ("<|hole|>", len(tokenizer))
    named = Tokenizer.load(STUDENT_TOKENIZER)
    assert student_mask(named, None) == ("<|mask|>", 2047)
    with pytest.raises(TideError, match="hole"):
        student_mask(named, "<|hole|>")


class Scripted(torch.nn.Module):
    """A model whose head says what `says` tells for each position."""

    def __init__(self, says: Any) -> None:
        super().__init__()
        self.says, self.embedding, self.model = says, torch.nn.Embedding(60, 1), self

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Any, past_key_values: Any, position_ids: Any, **_: Any) -> Any:
        keys = torch.zeros(1, 1, input_ids.shape[1], 1)
        past_key_values.update(keys, keys, 0)
        return type("Output", (), {"last_hidden_state": position_ids[0, :, None][None].float()})

    def lm_head(self, rows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(rows), 60)
        for i, position in enumerate(rows[:, 0].long().tolist()):
            logits[i, self.says(position)] = 9.0
        return logits


def test_the_end_of_turn_ends_an_answer_and_ids_without_a_token_are_never_sampled() -> None:
    model = Scripted(lambda p: 41 if p == 13 else 7)
    special = Special(mask=49, pad=47, eos=48, ends=(41,))
    (answer,) = sample(model, [[1] * 8], special, SampleConfig(new_tokens=24, block=8))
    assert answer == [7] * 5
    (longer,) = sample(
        model, [[1] * 8], special, SampleConfig(new_tokens=24, block=8, min_new_tokens=6)
    )
    assert 41 not in longer and len(longer) > 5
    padded = Scripted(lambda _: 55)
    (answer,) = sample(
        padded, [[1] * 8], Special(49, 47, 48, vocabulary=50), SampleConfig(new_tokens=8, block=8)
    )
    assert max(answer, default=0) < 50
    (answer,) = sample(
        small(), [[1, 2]], Special(49, 47, 48, vocabulary=50), SampleConfig(new_tokens=8, block=8)
    )
    assert max(answer, default=0) < 50


def test_the_embedded_teachers_turns_end_in_a_token_of_their_own(student: Path) -> None:
    assert (
        load_for_use(str(student), "cpu").special.ends == ()
    )  # ChatML: the end of turn is EOS itself
    assert Tokenizer.load(TEACHER_TOKENIZER).turn_ends


def test_prompts_from_a_file(student: Path, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hi"}]
    rows = [{"prompt": "first\u2028second"}, {"messages": [{"role": "user", "content": parts}]}]
    path = tmp_path / "p.jsonl"
    arguments = ["sample", str(student), "--file", str(path), "--new-tokens", "32"]
    arguments += ["--device", "cpu"]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and len(done.stdout.split("\n")) == 3
    for row in ({"messages": [{"role": "user", "content": 7}]}, {"question_": "b"}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(TideError, match=r"p\.jsonl:1"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
