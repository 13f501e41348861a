"""A student as a model of lm-eval: what it says, and what it gives to what others said."""

import importlib.metadata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model

from pipelines.evaluation.model import TideBD3LM, register_model
from shared.system.files import TideError
from student_train.using.elbo import ElboConfig, log_likelihoods, pieces, score_questions
from student_train.using.settings import SampleConfig, Special
from student_train.using.student import LoadedStudent, load_for_use, sample
from tests.student_train.places import small

PROMPTS = ["Write `f`.", "And now write `g`, which is a longer prompt than that.", "h", "Sort it."]
SMALL: dict[str, Any] = {"block_size": 8, "max_new_tokens": 20, "mc_num": 4}
ELBO = ElboConfig(draws=4, block=8)
SPECIAL = Special(mask=49, eos=48)
ids = st.lists(st.integers(0, 46), min_size=1, max_size=13)


@pytest.fixture(scope="module")
def loaded(student: str) -> LoadedStudent:
    """Of random weights, wide enough that it talks, and never of special tokens."""
    found = load_for_use(student, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
        found.model.lm_head.weight[2040:] = 0
    return found


def generate(loaded: LoadedStudent, texts: list[str], own: Any, **options: Any) -> list[str]:
    model = TideBD3LM(loaded, **{**SMALL, **own})
    asked = [(text, {"until": [], **options}) for text in texts]
    requests = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(asked)]
    return model.generate_until(requests, disable_tqdm=True)


def likelihoods(model: TideBD3LM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.loglikelihood(requests, disable_tqdm=True)


def chats(loaded: LoadedStudent) -> list[str]:
    model = TideBD3LM(loaded)
    return [model.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


def test_answers_are_those_of_tide_sample(loaded: LoadedStudent) -> None:
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    wanted = list(loaded.answer(asked, SampleConfig(new_tokens=20, block=8), batch=4))
    assert generate(loaded, chats(loaded), {"batch_size": 3}) == wanted
    assert any(wanted)


def test_a_response_that_was_begun_stays_open(loaded: LoadedStudent) -> None:
    model, said = TideBD3LM(loaded), {"role": "assistant", "content": "It is\n"}
    asked = [{"role": "user", "content": "1 + 1?"}, said, {"role": "user", "content": "2 + 2?"}]
    begun = model.apply_chat_template([*asked, said], add_generation_prompt=False)
    assert begun == model.apply_chat_template(asked) + "It is\n"


def test_a_stop_text_cuts_the_answer_and_ends_sampling(loaded: LoadedStudent) -> None:
    own, (context, other, *_) = {"max_new_tokens": 64, "steps": 16}, chats(loaded)
    (whole,) = generate(loaded, [context], own)
    stop = whole[3]
    passes: list[int] = []
    hook = loaded.model.model.register_forward_hook(lambda *_: passes.append(1))
    (short,) = generate(loaded, [context], own, until=[stop, "never"])
    few = len(passes)
    assert generate(loaded, [context], own, until="never") == [whole]
    many = len(passes) - few
    assert generate(loaded, [context, other], own, until=[stop])[0] == short
    hook.remove()
    assert short == whole[: whole.index(stop)]
    assert few < many


def test_the_task_says_how_to_sample_where_the_model_does_not(loaded: LoadedStudent) -> None:
    def ask(copies: int = 1, own: Any = None, **options: Any) -> list[str]:
        asked, own = {"max_gen_toks": 8, **options}, {"max_new_tokens": None, **(own or {})}
        return generate(loaded, chats(loaded)[:1] * copies, own, **asked)

    (short,), (long,) = ask(), ask(max_gen_toks=24)
    assert long.startswith(short) and len(long) > len(short)
    assert ask(temperature=3.0, do_sample=False) == [short]
    assert ask(max_gen_toks=-1, max_tokens=8) == [short]  # −1: no limit of that name
    assert ask(temperature=3.0) != [short]  # a temperature is enough
    warm = ask(3, temperature=3.0, do_sample=True)
    assert len(set(warm)) == 3  # repeats of one request get noise of their own
    assert warm == ask(3, temperature=3.0, top_k=0, top_p=1.0)
    off = {"top_k": -1, "batch_size": "auto:4"}  # as lm-eval and other models know them
    assert warm == ask(3, own=off, temperature=3.0)
    leasts: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}]
    for least in leasts:  # of the likeliest alone: greedy again
        assert ask(temperature=3.0, **least) == ask(own=least, temperature=3.0) == [short]


def test_likelihoods_are_elbos_and_greedy_is_what_sampling_gives(loaded: LoadedStudent) -> None:
    model = TideBD3LM(loaded, **SMALL)
    context = chats(loaded)[0]
    ids = model.tok_encode(context)
    (greedy,) = sample(loaded.model, [ids], loaded.special, SampleConfig(new_tokens=8, block=8))
    texts = [loaded.tokenizer.decode(greedy[:n]) for n in range(1, 9)]
    said = [text for n, text in enumerate(texts, 1) if model.tok_encode(text) == greedy[:n]][-1]
    function = "def f(x):\n    return x"
    pairs = [(context, said), (context, " no"), ("", function), (context, said + " no")]
    found = likelihoods(model, pairs)
    assert [is_greedy for _, is_greedy in found] == [True, False, False, False]
    for (value, _), (text, continuation) in zip(found, pairs, strict=True):
        start = model.tok_encode(text) or [model.eot_token_id]
        tokens = model.tok_encode(continuation)
        wanted = log_likelihoods(loaded.model, [(start, [tokens])], loaded.special, ELBO)[0][0]
        assert value == pytest.approx(wanted, abs=1e-4)
    # spaces between the two are the continuation's
    ((moved, _),) = likelihoods(model, [(f"{context} ", "no")])
    assert moved == pytest.approx(found[1][0], abs=1e-4)


def test_a_whole_text_is_scored_in_windows(loaded: LoadedStudent) -> None:
    text = "def f(x):\n    return x\n" * 4
    tokens = TideBD3LM(loaded).tok_encode(text)
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    asked = [([loaded.special.eos], [tokens])]
    ((whole,),) = log_likelihoods(loaded.model, asked, loaded.special, ELBO)
    model = TideBD3LM(loaded, **SMALL)
    assert model.loglikelihood_rolling(request, disable_tqdm=True) == pytest.approx([whole])
    short = TideBD3LM(loaded, **SMALL, max_length=16 + len(tokens) // 2)
    (cut,) = short.loglikelihood_rolling(request, disable_tqdm=True)
    assert cut != pytest.approx(whole) and cut < 0


def test_a_long_prompt_loses_its_beginning(loaded: LoadedStudent) -> None:
    text = "x y z " * 50
    (answer,) = generate(loaded, [text], {"max_length": 20 + 8})
    tail = loaded.tokenizer.encode([text])[0][-4:]  # with 20 tokens more: three whole blocks
    (wanted,) = sample(loaded.model, [tail], loaded.special, SampleConfig(new_tokens=20, block=8))
    assert answer == loaded.tokenizer.text(wanted)


def test_tokens_and_steps_of_an_answer(loaded: LoadedStudent) -> None:
    """Steps are shared out over its blocks; a task may ask for more tokens than there can be."""
    for tokens, steps, wanted in ((256, 64, 8), (3, 3, 3), (256, None, None), (64, 1, 1)):
        model = TideBD3LM(loaded, block_size=32, max_new_tokens=tokens, steps=steps)
        assert model._settings({}, 0).steps_per_block == wanted
    short = TideBD3LM(loaded, block_size=8, max_length=40)
    assert short._settings({"max_gen_toks": 32_768}, 0).new_tokens == 32


def test_wrong_arguments_are_explained(loaded: LoadedStudent) -> None:
    wrong: list[Any] = [{"parallelize": True}, {"mc_num": 0}, {"block_size": 0}, {"threshold": 2.0}]
    wrong += [{"temperature": 1e39}, {"guidance": -1.0}, {"top_k": -2}]
    for own in (*wrong, {**SMALL, "max_length": 27}):
        with pytest.raises(TideError):
            TideBD3LM(loaded, **own)


def test_lm_eval_finds_the_model_by_name_or_entry_point() -> None:
    register_model()
    register_model()
    assert get_model("tide_bd3lm") is TideBD3LM
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="tide_bd3lm")
    registry: Registry[Any] = Registry("model")  # as later releases of lm-eval keep plugins
    registry.register("tide_bd3lm", target=entry)
    assert registry.get("tide_bd3lm") is TideBD3LM


@pytest.fixture(scope="module")
def double() -> Any:
    return small().double()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_questions_scored_together_score_as_alone(double: Any, questions: list[Any]) -> None:
    config = ElboConfig(draws=3, block=4)
    together = log_likelihoods(double, questions, SPECIAL, config)
    for found, (context, tokens) in zip(together, questions, strict=True):
        alone = log_likelihoods(double, [(context, tokens)], SPECIAL, config)[0]
        assert found == pytest.approx(alone, abs=1e-5)


def test_they_share_passes(double: Any) -> None:
    passes: list[int] = []
    embedding = double.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, args, _o: passes.append(len(args[0])))
    questions = [([1, 2, 3], [[4], [5]]), ([6], [[7], [8]]), ([9] * 7, [[1], [2]])]
    log_likelihoods(double, questions, SPECIAL, ElboConfig(draws=3, block=4))
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
    block, text, at = 4, context + tokens, len(context)
    found = pieces(context, tokens, length, block)
    assert [token for _, piece in found for token in piece] == tokens
    for before, piece in found:
        assert before and text[:at][-len(before) :] == before
        assert -(-(len(before) + len(piece)) // block) * block <= length
        at += len(piece)
    if len(tokens) <= length // block * block - block:
        assert len(found) == 1 and len(found[0][0]) + len(tokens) <= length


def test_an_over_long_answer_is_scored_and_ends_no_benchmark(loaded: LoadedStudent) -> None:
    texts = ("def f(x):\n", "    return x\n" * 30)
    context, long = loaded.tokenizer.encode(list(texts))
    questions = [(context, [long, long[:5]]), (context, [long[:5]])]
    scores = dict(score_questions(loaded, questions, ELBO, 32, 2))
    parts = [(c, [t]) for c, t in pieces(context, long, 32, 8)]
    assert len(parts) > 1
    wanted = sum(log_likelihoods(loaded.model, [q], loaded.special, ELBO)[0][0] for q in parts)
    assert scores[0][0] == (pytest.approx(wanted, abs=1e-4), False)
    assert scores[0][1][0] == pytest.approx(scores[1][0][0], abs=1e-4)
    model = TideBD3LM(loaded, **SMALL, max_length=32)
    assert all(value < 0 for value, _ in likelihoods(model, [texts, (texts[0], " y")]))
