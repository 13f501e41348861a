"""Questions share passes and score as alone; what is too long is scored in pieces."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from pipelines.evaluation.model import TideBD3LM
from student_train.using.elbo import (
    ElboConfig,
    log_likelihoods,
    log_likelihoods_together,
    pieces,
    score_questions,
)
from student_train.using.settings import Special
from student_train.using.student import LoadedStudent, load_for_use
from tests.student_train.places import small

SPECIAL = Special(mask=49, pad=47, eos=48)
ids = st.lists(st.integers(0, 46), min_size=1, max_size=13)


@pytest.fixture(scope="module")
def model() -> Any:
    return small().double()


@pytest.fixture(scope="module")
def loaded(student: str) -> LoadedStudent:
    return load_for_use(student, "cpu")


@settings(max_examples=40, deadline=None)
@given(
    questions=st.lists(
        st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4
    )
)
def test_questions_scored_together_score_as_alone(model: Any, questions: list[Any]) -> None:
    config = ElboConfig(draws=3, block=4)
    together = log_likelihoods_together(model, questions, SPECIAL, config)
    for found, (context, tokens) in zip(together, questions, strict=True):
        assert found == pytest.approx(
            log_likelihoods(model, context, tokens, SPECIAL, config), abs=1e-5
        )


def test_they_share_passes(model: Any) -> None:
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: passes.append(len(args[0]))
    )
    questions = [([1, 2, 3], [[4], [5]]), ([6], [[7], [8]]), ([9] * 7, [[1], [2]])]
    log_likelihoods_together(model, questions, SPECIAL, ElboConfig(draws=3, block=4))
    hook.remove()
    assert passes == [3, 3]  # the contexts, and all copies


@given(
    context=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    tokens=st.lists(st.integers(10, 19), min_size=1, max_size=200),
    length=st.integers(8, 60),
)
def test_pieces_are_the_continuation_and_fit(
    context: list[int], tokens: list[int], length: int
) -> None:
    block = 4
    found = pieces(context, tokens, length, block)
    assert [token for _, piece in found for token in piece] == tokens
    text, at = context + tokens, len(context)
    for before, piece in found:
        assert before and text[:at][-len(before) :] == before
        padded = -(-len(before) // block) * block
        assert len(found) == 1 or padded + len(piece) <= length
        at += len(piece)
    if len(tokens) <= length - block:
        assert len(found) == 1 and len(found[0][0]) + len(tokens) <= length


def test_an_over_long_answer_is_scored_and_ends_no_benchmark(loaded: LoadedStudent) -> None:
    elbo = ElboConfig(draws=2, block=8)
    context, long = loaded.tokenizer.encode(["def f(x):\n", "    return x\n" * 30])
    questions = [(context, [long, long[:5]]), (context, [long[:5]])]
    scores = dict(score_questions(loaded, questions, elbo, 32, 2))
    parts = [(c, [t]) for c, t in pieces(context, long, 32, 8)]
    assert len(parts) > 1
    wanted = sum(log_likelihoods(loaded.model, c, t, loaded.special, elbo)[0] for c, t in parts)
    assert scores[0][0] == (pytest.approx(wanted, abs=1e-4), False)
    assert scores[0][1][0] == pytest.approx(scores[1][0][0], abs=1e-4)
    model = TideBD3LM(loaded, block_size=8, mc_num=2, max_length=32)
    asks = [("def f(x):\n", "    return x\n" * 30), ("def f(x):\n", " y")]
    asked = [Instance("loglikelihood", {}, a, i) for i, a in enumerate(asks)]
    assert all(value < 0 for value, _ in model.loglikelihood(asked, disable_tqdm=True))


def test_a_task_that_wants_more_than_the_student_has_gets_what_there_is(
    loaded: LoadedStudent,
) -> None:
    model = TideBD3LM(loaded, block_size=8, max_length=40, steps=5)
    request = Instance("generate_until", {}, ("x", {"until": [], "max_gen_toks": 32_768}), 0)  # type: ignore[arg-type]
    (answer,) = model.generate_until([request], disable_tqdm=True)
    assert isinstance(answer, str)
    assert model._settings({"max_gen_toks": 32_768}, 0).new_tokens == 32
