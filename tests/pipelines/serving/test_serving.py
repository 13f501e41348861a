"""The `openai` client against a running server: what it says is what `tide sample` says, whoever
else asks.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from pipelines.serving.server import ServeConfig
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use, sample
from tests.pipelines.serving.running import client, served

BLOCK = 8
CONFIG = ServeConfig(
    "small", SampleConfig(new_tokens=24, block=BLOCK), port=0, batch=4, waiting=6, body_bytes=20_000
)
PARTS = [{"type": "text", "text": "Write "}, {"type": "text", "text": "`h`."}]
CHATS: list[Any] = [
    [{"role": "user", "content": "Write `f`."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Now `g`, longer."}],
    [{"role": "user", "content": PARTS}],
]


@pytest.fixture(scope="module")
def loaded(student: str) -> LoadedStudent:
    return load_for_use(student, "cpu")


@pytest.fixture(scope="module")
def address(loaded: LoadedStudent) -> Iterator[str]:
    with served(loaded, CONFIG) as place:
        yield place


def sampled(loaded: LoadedStudent, prompt: list[int], limit: int, **changes: Any) -> str:
    """By whole blocks, cut to the limit."""
    whole = -(-limit // BLOCK) * BLOCK
    config = SampleConfig(new_tokens=whole, block=BLOCK, **changes)
    (ids,) = sample(loaded.model, [prompt], loaded.special, config)
    return loaded.text(ids[:limit])


def prompt_of(loaded: LoadedStudent, chat: Any) -> list[int]:
    if chat is CHATS[2]:  # its parts put together
        chat = [{"role": "user", "content": "Write `h`."}]
    return loaded.prompt(chat)


def create(address: str, **asked: Any) -> Any:
    asked = {"model": "small", "messages": CHATS[0], "max_tokens": 8, **asked}
    return client(address).chat.completions.create(**asked)


def test_an_answer_is_the_samplers(loaded: LoadedStudent, address: str) -> None:
    for limit, chat in zip((1, 8, 13), CHATS, strict=True):
        prompt = prompt_of(loaded, chat)
        got = create(address, messages=chat, max_completion_tokens=limit, max_tokens=None)
        assert got.choices[0].message.content == sampled(loaded, prompt, limit)
        assert got.choices[0].finish_reason in ("length", "stop")
        assert got.usage.prompt_tokens == len(prompt)
        assert got.usage.completion_tokens <= limit


def test_settings_of_a_request(loaded: LoadedStudent, address: str) -> None:
    prompt = prompt_of(loaded, CHATS[0])
    for given in (
        {"temperature": 1.5, "seed": 1, "top_p": 0.3, "top_k": 50},
        {"threshold": 0.01},
        {"steps_per_block": 2, "remasking": "random", "seed": 3},
    ):
        own = {key: given[key] for key in given.keys() - {"temperature", "seed", "top_p"}}
        others = {key: given[key] for key in given.keys() - own.keys()}
        got = create(address, max_tokens=16, **others, extra_body=own)
        assert got.choices[0].message.content == sampled(loaded, prompt, 16, **given)
    warm = [create(address, temperature=2.0, max_tokens=24) for _ in range(4)]
    assert len({got.choices[0].message.content for got in warm}) > 1  # seeds of their own


def test_several_choices_have_seeds_of_their_own(loaded: LoadedStudent, address: str) -> None:
    got = client(address).completions.create(
        model="small", prompt=["def f", "x"], n=2, temperature=1.0, seed=5, max_tokens=8
    )
    prompts = [loaded.tokenizer.encode([text])[0] for text in ("def f", "x")]
    wanted = [sampled(loaded, p, 8, temperature=1.0, seed=5 + i) for p in prompts for i in range(2)]
    assert [choice.text for choice in got.choices] == wanted
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    by_ids = client(address).completions.create(
        model="small", prompt=prompts, n=2, temperature=1.0, seed=5, max_tokens=8
    )
    assert [choice.text for choice in by_ids.choices] == wanted


def test_a_stream_comes_by_block_and_is_the_whole(loaded: LoadedStudent, address: str) -> None:
    asked: Any = {"messages": CHATS[1], "max_tokens": 24, "temperature": 1.5, "seed": 11}
    whole = create(address, **asked)
    chunks = list(create(address, **asked, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) == 3  # one of each block
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].usage == whole.usage
    asked = {"model": "small", "prompt": "def f", "max_tokens": 24, "stream": True}
    said = "".join(c.choices[0].text for c in client(address).completions.create(**asked))
    assert said == sampled(loaded, loaded.tokenizer.encode(["def f"])[0], 24)


def test_a_stop_text_ends_a_response(loaded: LoadedStudent, address: str) -> None:
    """Wherever it stands, over the edge of two blocks too, streamed or whole; nothing of it is
    sent.
    """
    asked: Any = {"messages": CHATS[1], "max_tokens": 24, "temperature": 1.5, "seed": 11}
    text = create(address, **asked).choices[0].message.content
    assert text is not None
    ids = prompt_of(loaded, CHATS[1])
    first = sampled(loaded, ids, 8, temperature=1.5, seed=11)
    edge = text[len(first) - 2 : len(first) + 2]
    for stop in (edge, [text[3:6], "never there"]):
        wanted = text[: text.index(stop if isinstance(stop, str) else stop[0])]
        got = create(address, **asked, stop=stop).choices[0]
        assert (got.message.content, got.finish_reason) == (wanted, "stop")
        chunks = create(address, **asked, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted


def test_many_at_once_get_what_each_gets_alone(loaded: LoadedStudent, address: str) -> None:
    """Eight clients, released together, of other lengths, limits and temperatures; and they were
    decoded together.
    """
    together = threading.Barrier(8)
    passes: list[int] = []
    embedding = loaded.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, args, _o: passes.append(len(args[0])))

    def ask(i: int) -> str:
        own: Any = {"messages": CHATS[i % 3], "max_tokens": 5 + 2 * i}
        together.wait()
        return create(address, **own, temperature=i / 4, seed=i).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    hook.remove()
    for i, answer in enumerate(answers):
        prompt = prompt_of(loaded, CHATS[i % 3])
        assert answer == sampled(loaded, prompt, 5 + 2 * i, temperature=i / 4, seed=i)
    assert max(passes) > 1


def test_what_cannot_be_answered_is_explained(address: str) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "other"}, 404, "'small'"),
        ({"messages": []}, 400, ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, ""),
        ({"messages": [*CHATS[0], {"role": "assistant", "content": "f"}]}, 400, ""),
        ({"max_tokens": 0}, 400, "`max_tokens`"),
        ({"max_tokens": 10**9}, 400, ""),
        ({"messages": [{"role": "user", "content": "a b " * 4400}]}, 400, ""),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, 413, ""),
        ({"temperature": -1}, 400, "`temperature`"),
        ({"temperature": 1e39}, 400, "`temperature`"),
        ({"frequency_penalty": 0.5}, 400, "`frequency_penalty`"),
        ({"logprobs": True}, 400, "`logprobs`"),
        ({"n": 5}, 400, ""),
        ({"extra_body": {"topk": 5}}, 400, "`topk`"),
        ({"extra_body": {"steps_per_block": 9}}, 400, "steps_per_block"),
    ]
    for given, status, offender in cases:
        with pytest.raises(openai.APIStatusError) as error:
            create(address, **given)
        assert error.value.status_code == status, given
        assert offender in error.value.message


def test_a_body_that_is_no_request(address: str) -> None:
    surrogate = b'{"model": "small", "prompt": "\\ud800"}'
    for body in (b"", b"[]", b'{"model": "small"}', b"\xff", b"[" * 5000, surrogate):
        request = urllib.request.Request(f"{address}/v1/completions", body)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        with error.value as answer:
            assert answer.status == 400
            assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_neutral_values_and_what_is_not_read_are_taken(loaded: LoadedStudent, address: str) -> None:
    neutral: Any = {"frequency_penalty": 0.0, "tools": [], "logprobs": False, "stream": None}
    neutral |= {"top_p": 1, "n": 1, "response_format": {"type": "text"}}
    got = create(address, **neutral, user="me", metadata={"a": "b"})
    assert got.choices[0].message.content == sampled(loaded, prompt_of(loaded, CHATS[0]), 8)


def test_models_and_health(address: str) -> None:
    assert [model.id for model in client(address).models.list()] == ["small"]
    assert client(address).models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client(address).models.retrieve("gpt")
    with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
        assert json.load(answer) == {"status": "ok", "running": 0, "waiting": 0, "batch": 4}
    # A page under another name is not answered
    request = urllib.request.Request(f"{address}/health", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    error.value.close()
    assert error.value.code == 400


def test_a_key_where_one_is_asked_for(loaded: LoadedStudent) -> None:
    config = ServeConfig("small", CONFIG.sampling, port=0, api_key="sesame")
    assert "sesame" not in repr(config)
    with served(loaded, config) as place:
        assert [model.id for model in client(place, api_key="sesame").models.list()] == ["small"]
        with pytest.raises(openai.AuthenticationError):
            client(place).models.list()
        with pytest.raises(openai.AuthenticationError):
            create(place)
        assert load_of(place) == (0, 0)  # whoever asks


def load_of(address: str) -> tuple[int, int]:
    with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
        state = json.load(answer)
    return state["running"], state["waiting"]


def wait_for(address: str, load: tuple[int, int]) -> None:
    deadline = time.monotonic() + 30
    while load_of(address) != load:
        assert time.monotonic() < deadline, load_of(address)
        time.sleep(0.02)


class Slow:
    """Every pass of the model waits until it may go on."""

    def __init__(self, model: Any) -> None:
        self.go = threading.Event()
        self._hook = model.get_input_embeddings().register_forward_pre_hook(
            lambda *_: self.go.wait(20) and None
        )

    def __enter__(self) -> "Slow":
        return self

    def __exit__(self, *_: Any) -> None:
        self.go.set()
        self._hook.remove()


def test_beyond_the_limit_requests_are_turned_away(loaded: LoadedStudent, address: str) -> None:
    """Four under way, six wait, the next gets 503; and all that waited are answered."""
    with ThreadPoolExecutor(10) as pool, Slow(loaded.model):
        waiting = []
        for number in range(10):
            waiting.append(pool.submit(create, address))
            wait_for(address, (1, number))  # the first is being decoded, and the batch is closed
        with pytest.raises(openai.InternalServerError):
            create(address)
    answers = {answer.result().choices[0].message.content for answer in waiting}
    assert answers == {sampled(loaded, prompt_of(loaded, CHATS[0]), 8)}


def test_who_hangs_up_leaves_the_batch(loaded: LoadedStudent, address: str) -> None:
    """Streamed or not."""
    with Slow(loaded.model) as slow:
        asked: Any = {"model": "small", "prompt": "x", "max_tokens": 3000}
        stream = client(address).completions.create(**asked, stream=True)
        wait_for(address, (1, 0))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client(address, timeout=0.3).completions.create(**asked)
        slow.go.set()
        wait_for(address, (0, 0))


def test_a_failure_is_told_and_the_next_request_is_answered(
    loaded: LoadedStudent, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        create(address)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(create(address, stream=True))
    hook.remove()
    got = create(address)
    assert got.choices[0].message.content == sampled(loaded, prompt_of(loaded, CHATS[0]), 8)
    assert "out of memory" in caplog.text


def test_a_server_that_stops_tells_those_who_wait(loaded: LoadedStudent) -> None:
    with ThreadPoolExecutor(1) as pool:
        with Slow(loaded.model) as slow, served(loaded, CONFIG) as place:
            answer = pool.submit(create, place, max_tokens=3000)
            wait_for(place, (1, 0))
            threading.Timer(0.5, slow.go.set).start()
        assert isinstance(answer.exception(), openai.InternalServerError)
