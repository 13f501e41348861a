"""A student from a folder: mask, block and ends by one rule, or an error that says what disagrees;
the stops of its answers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from shared.models.checkpoint import open_checkpoint, stated_mask, student_mask
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.using.settings import SampleConfig, Special
from student_train.using.student import LoadedStudent, Stops, load_for_use, sample
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER


def edited(source: Path | str, target: Path, file: str = "config.json", **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, target))
    values = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def test_mask_and_block_of_training_are_used_and_two_masks_are_an_error(
    student: str, tmp_path: Path
) -> None:
    loaded = load_for_use(student, "cpu")
    assert (loaded.block, loaded.special.mask) == (32, 2047)
    assert loaded.special.ends == ()  # ChatML: the end of turn is EOS itself
    assert (loaded.choose_block(None), loaded.choose_block(8)) == (32, 8)
    null = edited(student, tmp_path / "null", mask_token_id=None)
    assert load_for_use(str(null), "cpu").special.mask == 2047
    with pytest.raises(TideError, match=r"100.*2047"):
        load_for_use(str(edited(student, tmp_path / "other", mask_token_id=100)), "cpu")
    silent = edited(student, tmp_path / "a", mask_token_id="absent")
    silent = edited(silent, tmp_path / "b", "tokenizer_config.json", mask_token="absent")
    with pytest.raises(TideError):
        load_for_use(str(silent), "cpu")


def test_an_end_of_text_or_an_ordinary_word_is_no_mask(student: str, tmp_path: Path) -> None:
    plain = edited(student, tmp_path / "t", "tokenizer_config.json", mask_token="absent")
    tokenizer = Tokenizer.load(plain)
    for index in (tokenizer.special_id("eos"), 100):
        folder = edited(plain, tmp_path / str(index), mask_token_id=index)
        with pytest.raises(TideError):
            stated_mask(open_checkpoint(str(folder)), tokenizer)
    assert student_mask(tokenizer, None) == ("<|mask|>", 2047)
    assert student_mask(tokenizer, "<|hole|>") == ("<|hole|>", len(tokenizer))
    named = Tokenizer.load(STUDENT_TOKENIZER)
    assert student_mask(named, None) == ("<|mask|>", 2047)
    for one, word in ((tokenizer, "the"), (named, "<|hole|>")):
        with pytest.raises(TideError, match=word.strip("<|>")):
            student_mask(one, word)


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
    config = SampleConfig(new_tokens=24, block=8)
    assert sample(model, [[1] * 8], special, config) == [[7] * 5]
    later = SampleConfig(new_tokens=24, block=8, min_new_tokens=6)
    (longer,) = sample(model, [[1] * 8], special, later)
    assert 41 not in longer and len(longer) > 5
    padded = Special(49, 47, 48, vocabulary=50)
    (answer,) = sample(Scripted(lambda _: 55), [[1] * 8], padded, config)
    assert max(answer, default=0) < 50
    assert Tokenizer.load(TEACHER_TOKENIZER).turn_ends  # a token of its own


def test_prompts_from_a_file(student: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hi"}]
    rows = [{"prompt": "first\u2028second"}, {"messages": [{"role": "user", "content": parts}]}]
    path = tmp_path / "p.jsonl"
    arguments = ["sample", student, "--file", str(path), "--new-tokens", "32", "--device", "cpu"]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and len(done.stdout.split("\n")) == 3
    path.write_text(json.dumps({"question_": "b"}) + "\n")
    with pytest.raises(TideError, match=r"p\.jsonl:1"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def tiny() -> LoadedStudent:
    return load_for_use("student_train/tiny_students/shared", "cpu")


def test_the_first_stop_counts_and_nothing_of_it_is_left(tiny: LoadedStudent) -> None:
    ids = tiny.tokenizer.encode(["return one, two"])[0]
    assert Stops.of(tiny, ["", "none"]).cut(ids) == ("return one, two", False)
    assert Stops.of(tiny, "one").cut(ids) == ("return ", True)
    assert Stops.of(tiny, ["two", ","]).cut(ids) == ("return one", True)
    # A special token is found among the ids: the text has none.
    start = tiny.tokenizer.special_id("", "<|start_header_id|>")
    ids = [*tiny.tokenizer.encode(["one"])[0], start, *tiny.tokenizer.encode([" two"])[0]]
    assert tiny.text(ids) == "one two"
    assert Stops.of(tiny, ["<|start_header_id|>"]).cut(ids) == ("one", True)
    assert Stops.of(tiny, ["<|start_header_id|>", "ne"]).cut(ids) == ("o", True)


def test_what_may_begin_a_stop(tiny: LoadedStudent) -> None:
    stops = Stops.of(tiny, ["\n\ndef", "STOP"])
    for text, held in (("x\n\nde", 4), ("x\n\ndx", 0), ("xST", 2), ("", 0), ("STOX", 0)):
        assert stops.may_begin(text) == held
    assert Stops.of(tiny, None).may_begin("x") == 0
