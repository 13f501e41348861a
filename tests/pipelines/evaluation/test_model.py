import copy
import importlib.metadata
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import Registry, get_model

from pipelines.evaluation.model import TideBD3LM, register_model
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.using.elbo import ElboConfig, log_likelihoods
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use, sample

PROMPTS = ["Write `f`.", "And now write `g`, which is a longer prompt than that.", "h", "Sort it."]
SMALL: dict[str, Any] = {"block_size": 8, "max_new_tokens": 20, "mc_num": 4}


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


def asks(contexts: list[str], **options: Any) -> list[Instance]:
    arguments = [(context, {"until": [], **options}) for context in contexts]
    return [Instance("generate_until", {}, pair, i) for i, pair in enumerate(arguments)]


def generate(
    loaded: LoadedStudent, contexts: list[str], settings: dict[str, Any], **options: Any
) -> list[str]:
    model = TideBD3LM(loaded, **{**SMALL, **settings})
    return model.generate_until(asks(contexts, **options), disable_tqdm=True)


def chats(loaded: LoadedStudent) -> list[str]:
    model = TideBD3LM(loaded)
    return [model.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


def test_answers_are_those_of_tide_sample(loaded: LoadedStudent) -> None:
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    wanted = list(loaded.answer(asked, SampleConfig(new_tokens=20, block=8), batch=4))
    assert generate(loaded, chats(loaded), {"batch_size": 3}) == wanted
    assert any(wanted)


def test_the_chat_template_ends_in_its_empty_think_block(loaded: LoadedStudent) -> None:
    """As Qwen3's; a response that was begun comes behind it."""
    backend = copy.deepcopy(loaded.tokenizer.backend)
    backend.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
        "loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    thinks = replace(loaded, tokenizer=Tokenizer(backend, "think"), block=None)
    model = TideBD3LM(thinks)
    shots = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    asked = [*shots, {"role": "user", "content": "2 + 2?"}]
    text = model.apply_chat_template(asked)
    assert text.endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text.count("<think>") == 1
    said = {"role": "assistant", "content": "It is\n"}
    begun = model.apply_chat_template([*asked, said], add_generation_prompt=False)
    assert begun == text + "It is\n"


def test_a_stop_text_cuts_the_answer_and_ends_sampling(loaded: LoadedStudent) -> None:
    settings = {"max_new_tokens": 64, "steps": 16}
    (whole,) = generate(loaded, chats(loaded)[:1], settings)
    stop = whole[3]
    passes: list[int] = []
    hook = loaded.model.model.register_forward_hook(lambda *_: passes.append(1))
    (short,) = generate(loaded, chats(loaded)[:1], settings, until=[stop, "never"])
    few = len(passes)
    assert generate(loaded, chats(loaded)[:1], settings, until="never") == [whole]
    many = len(passes) - few
    both = generate(loaded, chats(loaded)[:2], settings, until=[stop])
    assert both[0] == short
    hook.remove()
    assert short == whole[: whole.index(stop)]
    assert few < many


def test_tokens_and_noise_come_from_the_task_where_the_model_leaves_them(
    loaded: LoadedStudent,
) -> None:
    context = chats(loaded)[:1]

    def ask(copies: int = 1, own: Any = None, **options: Any) -> list[str]:
        settings = {"max_new_tokens": None, **(own or {})}
        return generate(loaded, context * copies, settings, **{"max_gen_toks": 8, **options})

    (short,), (long,) = ask(), ask(max_gen_toks=24)
    assert long.startswith(short) and len(long) > len(short)
    assert ask(temperature=3.0, do_sample=False) == [short]
    assert ask(temperature=3.0) != [short]  # a temperature is enough
    warm = ask(3, temperature=3.0, do_sample=True)
    assert len(set(warm)) == 3  # repeats of one request get noise of their own
    assert warm == ask(3, temperature=3.0, top_k=0, top_p=1.0)
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
    requests = [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, False, False]
    config = ElboConfig(draws=4, block=8)
    for (value, _), (text, continuation) in zip(found, pairs, strict=True):
        start = model.tok_encode(text) or [model.eot_token_id]
        tokens = model.tok_encode(continuation)
        wanted = log_likelihoods(loaded.model, start, [tokens], loaded.special, config)[0]
        assert value == pytest.approx(wanted, abs=1e-4)


def test_spaces_between_context_and_continuation_go_to_the_continuation(
    loaded: LoadedStudent,
) -> None:
    model = TideBD3LM(loaded)
    pair = model._encode_pair("Answer:  ", "yes")
    assert pair == (model.tok_encode("Answer:"), model.tok_encode("  yes"))
    assert model._encode_pair("assistant\n", "yes")[1] == model.tok_encode("yes")


def test_a_whole_text_is_scored_in_windows(loaded: LoadedStudent) -> None:
    text = "def f(x):\n    return x\n" * 4
    tokens = TideBD3LM(loaded).tok_encode(text)
    config = ElboConfig(draws=4, block=8)
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    whole = log_likelihoods(loaded.model, [loaded.special.eos], [tokens], loaded.special, config)[0]
    model = TideBD3LM(loaded, **SMALL)
    assert model.loglikelihood_rolling(request, disable_tqdm=True) == pytest.approx([whole])
    short = TideBD3LM(loaded, **SMALL, max_length=16 + len(tokens) // 2)
    (cut,) = short.loglikelihood_rolling(request, disable_tqdm=True)
    assert cut != pytest.approx(whole) and cut < 0


def test_a_long_prompt_loses_its_beginning(loaded: LoadedStudent) -> None:
    model = TideBD3LM(loaded, **SMALL, max_length=20 + 8)
    (answer,) = model.generate_until(asks(["x y z " * 50]), disable_tqdm=True)
    tail = model.tok_encode("x y z " * 50)[-8:]
    (wanted,) = sample(loaded.model, [tail], loaded.special, SampleConfig(new_tokens=20, block=8))
    assert answer == loaded.text(wanted)
    assert model.truncated == 1
    with pytest.raises(TideError):
        TideBD3LM(loaded, **SMALL, max_length=27).generate_until(asks(["x"]), disable_tqdm=True)


def test_wrong_arguments_are_explained(loaded: LoadedStudent) -> None:
    for wrong in ({"parallelize": True}, {"mc_num": 0}, {"block_size": 0}, {"threshold": 2.0}):
        with pytest.raises(TideError):
            TideBD3LM(loaded, **wrong)  # type: ignore


def test_steps_are_shared_out_over_blocks(loaded: LoadedStudent) -> None:
    for tokens, steps, wanted in ((256, 64, 8), (3, 3, 3), (256, None, None), (64, 1, 1)):
        model = TideBD3LM(loaded, block_size=32, max_new_tokens=tokens, steps=steps)
        assert model._settings({}, 0).steps_per_block == wanted


def test_lm_eval_finds_the_model_by_name_or_entry_point() -> None:
    register_model()
    register_model()
    assert get_model("tide_bd3lm") is TideBD3LM
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="tide_bd3lm")
    registry: Registry[Any] = Registry("model")  # as later releases of lm-eval keep plugins
    registry.register("tide_bd3lm", target=entry)
    assert registry.get("tide_bd3lm") is TideBD3LM
