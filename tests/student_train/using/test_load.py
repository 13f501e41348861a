"""A student from a folder: mask, block and ends by one rule, or an error that says what disagrees;
the stops of its answers; its log-likelihoods against the mean over all orders of revealing.
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.models.checkpoint import open_checkpoint, stated_mask, student_mask
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.using.elbo import ElboConfig, log_likelihoods, masks
from student_train.using.student import LoadedStudent, Stops, load_for_use
from tests.conftest import STUDENT_TOKENIZER
from tests.student_train.places import SPECIAL, small, whole_logits


def edited(source: Path | str, target: Path, file: str = "config.json", **changes: Any) -> Path:
    folder = Path(shutil.copytree(source, target))
    values = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def test_mask_and_block_are_those_of_training(student: str, tmp_path: Path) -> None:
    loaded = load_for_use(student, "cpu")
    assert (loaded.block, loaded.special.mask) == (32, 2047)
    assert loaded.special.ends == ()  # ChatML: the end of turn is EOS itself
    assert (loaded.choose_block(None), loaded.choose_block(8)) == (32, 8)
    assert load_for_use(str(Path(student).parent), "cpu").special == loaded.special  # the run
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
    assert tiny.tokenizer.text(ids) == "one two"
    assert Stops.of(tiny, ["<|start_header_id|>"]).cut(ids) == ("one", True)
    assert Stops.of(tiny, ["<|start_header_id|>", "ne"]).cut(ids) == ("o", True)
    # What may begin a stop is held back.
    stops = Stops.of(tiny, ["\n\ndef", "STOP"])
    for text, held in (("x\n\nde", 4), ("x\n\ndx", 0), ("xST", 2), ("", 0), ("STOX", 0)):
        assert stops.may_begin(text) == held


# --- The bound on log-likelihoods, by whole passes ------------------------------------------------

CONTEXT = [1, 2, 3, 4, 5]
TOKENS = st.lists(st.integers(0, 46), min_size=1, max_size=11)


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def exact_bound(model: Any, context: list[int], tokens: list[int], size: int) -> float:
    """The mean over all orders of revealing each block, one whole pass a token: over what stands
    before it and the block with masks, blocks counted from position 0.
    """
    total, text = 0.0, context + tokens
    for start in range(len(context) // size * size, len(text), size):
        places = range(max(start, len(context)), min(start + size, len(text)))
        orders = list(itertools.permutations(places))
        for order in orders:
            ids = text[: places[0]] + [SPECIAL.mask] * (start + size - places[0])
            for at in order:
                logits = whole_logits(model, ids, 0, size)[at]
                total += float(logits.log_softmax(-1)[text[at]]) / len(orders)
                ids[at] = text[at]
    return total


def test_a_block_of_one_is_the_chain_rule(model: Any) -> None:
    tokens, config = [[7, 8, 9], [6]], ElboConfig(draws=1, block=1)
    expected = [exact_bound(model, CONTEXT, t, 1) for t in tokens]
    scores = log_likelihoods(model, [(CONTEXT, tokens)], SPECIAL, config)[0]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_the_mean_over_seeds_is_the_bound(model: Any) -> None:
    """Unbiased: the mean over many seeds is within three standard errors of it."""
    tokens, scores = [7, 8, 9, 10, 11], []
    for seed in range(400):
        config = ElboConfig(draws=16, block=4, seed=seed)
        scores += log_likelihoods(model, [(CONTEXT, [tokens])], SPECIAL, config)[0]
    error = float(torch.tensor(scores).std()) / math.sqrt(len(scores))
    mean = sum(scores) / len(scores)
    assert abs(mean - exact_bound(model, CONTEXT, tokens, 4)) < 3 * error < 0.09


@settings(max_examples=20)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
def test_answers_score_as_alone(model: Any, context: list[int], tokens: list[list[int]]) -> None:
    config = ElboConfig(draws=3, block=4)
    together = log_likelihoods(model, [(context, tokens)], SPECIAL, config)[0]
    alone = [log_likelihoods(model, [(context, [t])], SPECIAL, config)[0][0] for t in tokens]
    assert together == pytest.approx(alone, abs=2e-5)
    assert all(value < 0 for value in together)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student_train.using.elbo._TOKENS_PER_PASS", 8)
        passes = log_likelihoods(model, [(context, tokens)], SPECIAL, config)[0]
    assert passes == pytest.approx(alone, abs=2e-5)


@settings(max_examples=50)
@given(length=st.integers(1, 32), draws=st.integers(1, 64), seed=st.integers(0, 99))
def test_masks_are_fixed_and_weigh_each_count_alike(length: int, draws: int, seed: int) -> None:
    config, index = ElboConfig(draws=draws, seed=seed), seed % 10
    sets = masks(length, index, config)
    for (a, v), (b, w) in zip(sets, masks(length, index, config), strict=True):
        assert torch.equal(a, b) and v == w
    assert len(sets) == (1 if length == 1 else draws)
    counts = [int(mask.sum()) for mask, _ in sets]
    assert all(1 <= count <= length for count in counts)
    weighted = sum(weight * int(mask.sum()) for mask, weight in sets)
    assert weighted == pytest.approx(length)
    if length > 1 and draws % length == 0:  # stratified: each count equally often, to one
        assert all(abs(counts.count(n) - draws // length) <= 1 for n in range(1, length + 1))
