"""The `openai` client against a running server: what it says is what `tide sample` says, whoever else asks."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
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
CHATS = [
    [{"role": "user", "content": "Write `f`."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And now `g`, which is longer."},
    ],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Write "}, {"type": "text", "text": "`h`."}],
        }
    ],
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
    (ids,) = sample(
        loaded.model,
        [prompt],
        loaded.special,
        SampleConfig(new_tokens=whole, block=BLOCK, **changes),
    )
    return loaded.text(ids[:limit])


def prompt_of(loaded: LoadedStudent, chat: Any) -> list[int]:
    texts = [
        "".join(p["text"] for p in m["content"]) if isinstance(m["content"], list) else m["content"]
        for m in chat
    ]
    return loaded.prompt(
        [{"role": m["role"], "content": text} for m, text in zip(chat, texts, strict=True)]
    )


@pytest.mark.parametrize("limit", [1, 8, 13])
def test_an_answer_is_the_samplers(loaded: LoadedStudent, address: str, limit: int) -> None:
    for chat in CHATS:
        prompt = prompt_of(loaded, chat)
        got = client(address).chat.completions.create(
            model="small", messages=chat, max_completion_tokens=limit
        )  # type: ignore[arg-type]
        assert got.choices[0].message.content == sampled(loaded, prompt, limit)
        assert got.choices[0].finish_reason in ("length", "stop")
        assert got.usage is not None and got.usage.prompt_tokens == len(prompt)
        assert got.usage.completion_tokens <= limit


def test_settings_of_a_request(loaded: LoadedStudent, address: str) -> None:
    prompt = prompt_of(loaded, CHATS[0])
    for given, meant in [
        ({"temperature": 1.2, "seed": 7}, {"temperature": 1.2, "seed": 7}),
        ({"extra_body": {"threshold": 0.01}}, {"threshold": 0.01}),
        ({"temperature": 1.5, "seed": 1, "top_p": 0.3, "extra_body": {"top_k": 50}},
         {"temperature": 1.5, "seed": 1, "top_p": 0.3, "top_k": 50}),
        ({"extra_body": {"steps_per_block": 2, "remasking": "random"}, "seed": 3},
         {"steps_per_block": 2, "remasking": "random", "seed": 3}),
    ]:  # fmt: skip
        got = client(address).chat.completions.create(
            model="small", messages=CHATS[0], max_tokens=16, **given
        )  # type: ignore[call-overload]
        assert got.choices[0].message.content == sampled(loaded, prompt, 16, **meant)
    warm: Any = {"model": "small", "messages": CHATS[0], "temperature": 2.0, "max_tokens": 24}
    texts = {
        client(address).chat.completions.create(**warm).choices[0].message.content for _ in range(4)
    }
    assert len(texts) > 1  # without a seed each has noise of its own


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
    asked: Any = {
        "model": "small",
        "messages": CHATS[1],
        "max_tokens": 24,
        "temperature": 1.5,
        "seed": 11,
    }
    whole = client(address).chat.completions.create(**asked)
    chunks = list(
        client(address).chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) == 3  # one of each block
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].usage == whole.usage
    text = client(address).completions.create(
        model="small", prompt="def f", max_tokens=24, stream=True
    )
    assert "".join(c.choices[0].text for c in text) == sampled(
        loaded, loaded.tokenizer.encode(["def f"])[0], 24
    )


def test_a_stop_text_ends_a_response(loaded: LoadedStudent, address: str) -> None:
    """Wherever it stands, over the edge of two blocks too, streamed or whole; nothing of it is sent."""
    asked: Any = {
        "model": "small",
        "messages": CHATS[1],
        "max_tokens": 24,
        "temperature": 1.5,
        "seed": 11,
    }
    text = client(address).chat.completions.create(**asked).choices[0].message.content
    assert text is not None
    ids = prompt_of(loaded, CHATS[1])
    first = sampled(loaded, ids, 8, temperature=1.5, seed=11)
    edge = text[len(first) - 2 : len(first) + 2]
    for stop in (edge, [text[3:6], "never there"]):
        wanted = text[: text.index(stop if isinstance(stop, str) else stop[0])]
        got = client(address).chat.completions.create(**asked, stop=stop).choices[0]
        assert (got.message.content, got.finish_reason) == (wanted, "stop")
        chunks = client(address).chat.completions.create(**asked, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted


def test_many_at_once_get_what_each_gets_alone(loaded: LoadedStudent, address: str) -> None:
    """Eight clients, released together, of other lengths, limits and temperatures; and they were decoded together."""
    asked = [
        {"messages": CHATS[i % 3], "max_tokens": 5 + 2 * i, "temperature": i / 4, "seed": i}
        for i in range(8)
    ]
    answers: list[Any] = [None] * 8
    together = threading.Barrier(8)
    passes: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: passes.append(len(args[0]))
    )

    def ask(i: int) -> None:
        together.wait()
        answers[i] = (
            client(address)
            .chat.completions.create(model="small", **asked[i])
            .choices[0]
            .message.content
        )  # type: ignore[call-overload]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    for i, given in enumerate(asked):
        wanted = sampled(
            loaded, prompt_of(loaded, CHATS[i % 3]), given["max_tokens"], temperature=i / 4, seed=i
        )
        assert answers[i] == wanted
    assert max(passes) > 1


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"model": "other"}, 404, "there is 'small'"),
        ({"messages": []}, 400, "no messages"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text"),
        ({"messages": [*CHATS[0], {"role": "assistant", "content": "f"}]}, 400, "the last message is the assistant's"),
        ({"max_tokens": 0}, 400, "`max_tokens` is 0"),
        ({"max_tokens": 10**9}, 400, "more than the student's"),
        ({"messages": [{"role": "user", "content": "a b " * 4400}]}, 400, "more than the student's"),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, 413, "more than 20,000 bytes"),
        ({"temperature": -1}, 400, "`temperature` is -1"),
        ({"top_p": 1.5}, 400, "`top_p` is 1.5"),
        ({"extra_body": {"top_k": 0}}, 400, "`top_k` is 0"),
        ({"frequency_penalty": 0.5}, 400, "`frequency_penalty` is '0.5': this server cannot do it"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "`tools`"),
        ({"logprobs": True}, 400, "`logprobs`"),
        ({"n": 5}, 400, "at most 4"),
        ({"extra_body": {"topk": 5}}, 400, "no `topk`"),
        ({"extra_body": {"steps_per_block": 9}}, 400, "must be 1 to 8"),
        ({"extra_body": {"min_tokens": 99}}, 400, "min_new_tokens is 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_explained(
    address: str, given: Any, status: int, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client(address).chat.completions.create(
            **{"model": "small", "messages": CHATS[0], "max_tokens": 8, **given}
        )
    assert error.value.status_code == status
    assert words in error.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "small"}',
        b"\xff",
        b"[" * 5000,
        b'{"model": "small", "prompt": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_request(address: str, body: bytes) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/v1/completions", body), timeout=20
        )
    with error.value as answer:
        assert answer.status == 400
        assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_neutral_values_and_what_is_not_read_are_taken(loaded: LoadedStudent, address: str) -> None:
    got = client(address).chat.completions.create(
        model="small", messages=CHATS[0], max_tokens=8, top_p=1, frequency_penalty=0, user="me", tools=[], n=1,  # type: ignore[arg-type]
        response_format={"type": "text"}, logprobs=False, metadata={"a": "b"},
    )  # fmt: skip
    assert got.choices[0].message.content == sampled(loaded, prompt_of(loaded, CHATS[0]), 8)


def test_models_and_health(address: str) -> None:
    assert [model.id for model in client(address).models.list()] == ["small"]
    assert client(address).models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="there is 'small'"):
        client(address).models.retrieve("gpt")
    with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
        assert json.load(answer) == {"status": "ok", "running": 0, "waiting": 0, "batch": 4}


def test_a_page_under_another_name_is_not_answered(address: str) -> None:
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
        for call in (client(place).models.list,
                     lambda: client(place).completions.create(model="small", prompt="x")):  # fmt: skip
            with pytest.raises(openai.AuthenticationError, match="API key"):
                call()
        with urllib.request.urlopen(f"{place}/health", timeout=20) as answer:
            assert answer.status == 200


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

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: Any) -> None:
        self.go.set()
        self._hook.remove()


def test_beyond_the_limit_requests_are_turned_away(loaded: LoadedStudent, address: str) -> None:
    """Four under way, six wait, the next gets 503; and all that waited are answered."""
    answers: list[str] = []

    def ask() -> None:
        got = client(address).chat.completions.create(
            model="small", messages=CHATS[0], max_tokens=8
        )  # type: ignore[arg-type]
        answers.append(got.choices[0].message.content or "")

    threads = [threading.Thread(target=ask) for _ in range(10)]
    with Slow(loaded.model):
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(
                address, (min(number + 1, 1), number)
            )  # the first is being decoded, and the batch is closed
            if number == 9:
                break
        with pytest.raises(openai.InternalServerError, match="too many requests"):
            client(address).chat.completions.create(model="small", messages=CHATS[0])  # type: ignore[arg-type]
    for thread in threads:
        thread.join()
    assert answers == [sampled(loaded, prompt_of(loaded, CHATS[0]), 8)] * 10


def test_who_hangs_up_leaves_the_batch(loaded: LoadedStudent, address: str) -> None:
    """Streamed or not."""
    with Slow(loaded.model) as slow:
        stream = client(address).completions.create(
            model="small", prompt="x", max_tokens=3000, stream=True
        )
        wait_for(address, (1, 0))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client(address, timeout=0.3).completions.create(
                model="small", prompt="x", max_tokens=3000
            )
        slow.go.set()
        wait_for(address, (0, 0))


def test_a_failure_is_told_and_the_next_request_is_answered(
    loaded: LoadedStudent, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(fail)
    asked: Any = {"model": "small", "messages": CHATS[0], "max_tokens": 8}
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client(address).chat.completions.create(**asked)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(client(address).chat.completions.create(**asked, stream=True))
    hook.remove()
    got = client(address).chat.completions.create(**asked)
    assert got.choices[0].message.content == sampled(loaded, prompt_of(loaded, CHATS[0]), 8)
    assert "out of memory" in caplog.text


def test_a_server_that_stops_tells_those_who_wait(loaded: LoadedStudent) -> None:
    failed: list[Exception] = []
    with Slow(loaded.model) as slow, served(loaded, CONFIG) as place:

        def ask() -> None:
            try:
                client(place).completions.create(model="small", prompt="x", max_tokens=3000)
            except openai.APIError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(place, (1, 0))
        threading.Timer(0.5, slow.go.set).start()
    thread.join()
    assert len(failed) == 1 and "the server is stopping" in str(failed[0])
