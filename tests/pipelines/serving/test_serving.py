"""The `openai` client against a running server: what it says is what `tide sample` says, whoever
else asks.
"""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import openai
import pytest

from pipelines.serving import server
from pipelines.serving.prompts import Prompts
from pipelines.serving.protocol import ApiError, ChatRequest, CompletionRequest, read_request
from pipelines.serving.server import ServeConfig, bind, served_name
from shared.system.files import TideError
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use, sample

BLOCK = 8
SAMPLING = SampleConfig(new_tokens=24, block=BLOCK)
CONFIG = ServeConfig("small", SAMPLING, port=0, batch=4, waiting=6, body_bytes=20_000)
CHATS: list[Any] = [
    [{"role": "user", "content": "Write `f`."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Now `g`, longer."}],
    [{"role": "user", "content": "Write `h`."}],
]


@pytest.fixture(scope="module")
def loaded(student: str) -> LoadedStudent:
    return load_for_use(student, "cpu")


@pytest.fixture(scope="module")
def address(loaded: LoadedStudent) -> Iterator[str]:
    with server.served(loaded, CONFIG) as place:
        yield place


def sampled(loaded: LoadedStudent, prompt: list[int], limit: int, **changes: Any) -> str:
    config = SampleConfig(new_tokens=limit, block=BLOCK, **changes)
    return loaded.tokenizer.text(sample(loaded.model, [prompt], loaded.special, config)[0])


@lru_cache  # kept, or a socket would be left open
def client(address: str, key: str = "none", timeout: float = 60) -> openai.OpenAI:
    place = f"{address}/v1"
    return openai.OpenAI(base_url=place, api_key=key, timeout=timeout, max_retries=0)


def create(address: str, **asked: Any) -> Any:
    usual: Any = {"model": "small", "messages": CHATS[0], "max_tokens": 8}
    return client(address).chat.completions.create(**{**usual, **asked})


def test_an_answer_is_the_samplers(loaded: LoadedStudent, address: str) -> None:
    """And what asks for nothing, or is not read, changes nothing."""
    neutral: Any = {"frequency_penalty": 0.0, "tools": [], "logprobs": False, "stream": None}
    neutral |= {"top_p": 1, "n": 1, "user": "me", "metadata": {"a": "b"}, "max_tokens": None}
    for limit, chat in zip((1, 8, 13), CHATS, strict=True):
        prompt = loaded.tokenizer.encode_prompt(chat)
        *begin, last = chat
        words, word = last["content"].split(" ", 1)
        parts = [{"type": "text", "text": f"{words} "}, {"type": "text", "text": word}]
        asked = [*begin, {**last, "content": parts}]
        got = create(address, messages=asked, max_completion_tokens=limit, **neutral)
        assert got.choices[0].message.content == sampled(loaded, prompt, limit)
        assert got.choices[0].finish_reason in ("length", "stop")
        assert got.usage.prompt_tokens == len(prompt)
        assert got.usage.completion_tokens <= limit


def test_settings_of_a_request(loaded: LoadedStudent, address: str) -> None:
    prompt = loaded.tokenizer.encode_prompt(CHATS[0])
    for wanted in (
        {"temperature": 1.5, "seed": 1, "top_p": 0.3, "top_k": 50},
        {"threshold": 0.01},
        {"temperature": 1.5, "seed": 1, "top_k": -1},
        {"steps_per_block": 2, "remasking": "random", "seed": 3},
    ):
        got = create(address, max_tokens=16, extra_body=wanted)
        assert got.choices[0].message.content == sampled(loaded, prompt, 16, **wanted)
    cold = create(address, max_tokens=16, temperature=1e-300)
    assert cold.choices[0].message.content == sampled(loaded, prompt, 16)
    warm = [create(address, temperature=2.0, max_tokens=24) for _ in range(4)]
    assert len({got.choices[0].message.content for got in warm}) > 1  # seeds of their own


def test_several_choices_have_seeds_of_their_own(loaded: LoadedStudent, address: str) -> None:
    texts = ["def f", "x"]
    ids = [loaded.tokenizer.encode([text])[0] for text in texts]
    wanted = [sampled(loaded, p, 8, temperature=1.0, seed=5 + i) for p in ids for i in range(2)]
    asked: Any = {"model": "small", "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    for prompt in (texts, ids):
        got = client(address).completions.create(prompt=prompt, **asked)
        assert [choice.text for choice in got.choices] == wanted
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]


def test_a_stream_comes_by_block_and_is_the_whole(loaded: LoadedStudent, address: str) -> None:
    asked: Any = {"messages": CHATS[1], "max_tokens": 24, "temperature": 1.5, "seed": 11}
    whole = create(address, **asked)
    chunks = list(create(address, **asked, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    blocks = -(-(len(loaded.tokenizer.encode_prompt(CHATS[1])) % BLOCK + 24) // BLOCK)
    assert len([text for text in texts if text]) == blocks  # one of each
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].usage == whole.usage
    asked = {"model": "small", "prompt": "def f", "max_tokens": 24, "stream": True}
    said = "".join(c.choices[0].text for c in client(address).completions.create(**asked))
    assert said == sampled(loaded, loaded.tokenizer.encode(["def f"])[0], 24)


def test_a_stop_text_ends_a_response(loaded: LoadedStudent, address: str) -> None:
    """Wherever it stands, over the edge of two blocks too; nothing of it is sent."""
    asked: Any = {"messages": CHATS[1], "max_tokens": 24, "temperature": 1.5, "seed": 11}
    text = create(address, **asked).choices[0].message.content
    first = sampled(loaded, loaded.tokenizer.encode_prompt(CHATS[1]), 8, temperature=1.5, seed=11)
    edge = text[len(first) - 2 : len(first) + 2]
    for stop in (edge, [text[3:6], "never there"]):
        wanted = text[: text.index(stop if isinstance(stop, str) else stop[0])]
        got = create(address, **asked, stop=stop).choices[0]
        assert (got.message.content, got.finish_reason) == (wanted, "stop")
        chunks = create(address, **asked, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted


def test_many_at_once_get_what_each_gets_alone(loaded: LoadedStudent, address: str) -> None:
    """And are decoded together, though their lengths, limits and temperatures are others."""
    together, rows = threading.Barrier(8), list[int]()
    embedding: Any = loaded.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))

    def ask(i: int) -> str:
        own: Any = {"messages": CHATS[i % 3], "max_tokens": 5 + 2 * i}
        together.wait()
        return create(address, **own, temperature=i / 4, seed=i).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    hook.remove()
    for i, answer in enumerate(answers):
        prompt = loaded.tokenizer.encode_prompt(CHATS[i % 3])
        assert answer == sampled(loaded, prompt, 5 + 2 * i, temperature=i / 4, seed=i)
    assert max(rows) > 1


def test_what_cannot_be_answered_is_explained(address: str) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "other"}, 404, "'small'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, ""),
        ({"messages": [*CHATS[0], {"role": "assistant", "content": "f"}]}, 400, ""),
        ({"max_tokens": 0}, 400, "`max_tokens`"),
        ({"messages": [{"role": "user", "content": "a b " * 4400}]}, 400, ""),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, 413, ""),
        ({"temperature": -1}, 400, "`temperature`"),
        ({"temperature": 1e39}, 400, "`temperature`"),
        ({"max_tokens": 2**63}, 400, "`max_tokens`"),
        ({"seed": 2**63}, 400, "`seed`"),
        ({"extra_body": {"top_k": 2**63}}, 400, "`top_k`"),
        ({"extra_body": {"min_tokens": 2**63}}, 400, "`min_tokens`"),
        ({"stop": "a" * 5000}, 400, "`stop`"),
        ({"frequency_penalty": 0.5}, 400, "`frequency_penalty`"),
        ({"n": 5}, 400, ""),
        ({"extra_body": {"topk": 5}}, 400, "`topk`"),
        ({"extra_body": {"steps_per_block": 9}}, 400, "steps_per_block"),
    ]
    for wrong, status, offender in cases:
        with pytest.raises(openai.APIStatusError) as error:
            create(address, **wrong)
        assert error.value.status_code == status, wrong
        assert offender in error.value.message


def test_a_body_that_is_no_request(address: str) -> None:
    surrogate = b'{"model": "small", "prompt": "\\ud800"}'
    named = b'{"model": "small", "prompt": "x", "\\ud800": 1}'
    for body in (b"", b"[]", b'{"model": "small"}', b"\xff", b"[" * 5000, surrogate, named):
        request = urllib.request.Request(f"{address}/v1/completions", body)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        with error.value as answer:
            assert answer.status == 400
            assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_pages_of_other_origins(loaded: LoadedStudent) -> None:
    """May ask where they are named, also where a key is needed; others are not told the answer."""
    mine = "http://localhost:3000"
    config = replace(CONFIG, cors=(mine,), api_key="sesame")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-own"}
    with server.served(loaded, config) as place:
        for origin, allowed in ((mine, mine), ("http://evil.example", None)):
            for method, path, more in (
                ("OPTIONS", "/v1/completions", asks),
                ("GET", "/v1/models", {"Authorization": "Bearer sesame"}),
                ("GET", "/v1/models", {}),
            ):
                headers = {"Origin": origin, **more}
                request = urllib.request.Request(place + path, headers=headers, method=method)
                try:
                    answer = urllib.request.urlopen(request, timeout=20)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    assert answer.headers["Access-Control-Allow-Origin"] == allowed
    evil, text, form = "http://evil.example", "text/plain", "application/x-www-form-urlencoded"
    with server.served(loaded, replace(CONFIG, cors=(mine,))) as place:
        for origin, kind, status in (
            (evil, text, 403), ("null", form, 403), (evil, f"{text}; application/json", 403),
            (mine, text, 200), (None, form, 200),  # curl
            ("https://a.proxy", "Application/JSON; charset=utf-8", 200),  # its own page asks so
        ):  # fmt: skip
            body = json.dumps({"model": "small", "prompt": "def f", "max_tokens": 1}).encode()
            headers = {"Content-Type": kind, **({"Origin": origin} if origin else {})}
            request = urllib.request.Request(f"{place}/v1/completions", body, headers)
            try:
                answer = urllib.request.urlopen(request, timeout=20)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                assert answer.status == status, (origin, kind)
    for wrong in ("localhost:3000", f"{mine}/"):
        with pytest.raises(TideError):
            replace(CONFIG, cors=(wrong,))


def test_a_request_leaves_a_line_without_its_text(
    loaded: LoadedStudent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with server.served(loaded, replace(CONFIG, log=True)) as place:
        made = create(place).usage
        list(create(place, stream=True))
        with pytest.raises(openai.NotFoundError):
            client(place).models.retrieve("gpt")
        wait_for(place, 0, 0)
        with socket.create_connection(("127.0.0.1", int(place.rpartition(":")[2]))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            half.sendall(b"Content-Length: 9\r\n\r\n{")
        deadline = time.monotonic() + 20
        while "/v1/completions 499" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    told = [record for record in caplog.records if record.name == "pipelines.serving.front"]
    lines = [record.getMessage() for record in told]
    counts = f"{made.prompt_tokens} + {made.completion_tokens} tokens"
    assert sorted(counts in line for line in lines) == [False, False, True, True]
    assert sum("/v1/completions 499" in line for line in lines) == 1  # hung up amid its request
    assert sum("/v1/chat/completions 200" in line for line in lines) == 2
    assert not [line for line in lines if CHATS[0][0]["content"] in line]


def test_steps_of_a_stream_are_told_where_they_are_asked_for(
    loaded: LoadedStudent, address: str
) -> None:
    """Each step has one token more; the last one is the text."""
    limit = BLOCK - len(loaded.tokenizer.encode(["def f"])[0])
    asked: Any = {"model": "small", "prompt": "def f", "max_tokens": limit, "stream": True}
    extra: Any = {"include_steps": True}
    chunks = list(client(address).completions.create(**asked, stream_options=extra))
    steps = [step for chunk in chunks if (step := getattr(chunk.choices[0], "step", None))]
    known = [[token for token in step["tokens"] if token] for step in steps]
    assert [len(tokens) for tokens in known[:limit]] == [*range(1, limit + 1)]
    assert all(0 < token["probability"] <= 1 for token in known[-1])
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert "".join(token["token"] for token in known[-1]) == text
    assert not [
        c for c in client(address).completions.create(**asked) if hasattr(c.choices[0], "step")
    ]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_what_asks_for_nothing_is_as_good_as_left_out(kind: type[Any]) -> None:
    """null for whatever is optional, and for the rest the values that switch it off, no others."""
    must = {"model": "m", "messages": CHATS[0], "prompt": "x"}
    must = {name: must[name] for name in ("model", *kind.model_fields) if name in must}
    plain = read_request(kind, json.dumps(must).encode())
    null = dict.fromkeys({*kind.model_fields, "prediction", "tools"} - must.keys())
    off: Any = {"top_logprobs": 0, "reasoning_effort": "none", "tool_choice": "none", "tools": []}
    off |= {"response_format": {"type": "text"}, "repetition_penalty": 1.0, "min_p": 0}
    off |= {"logit_bias": {"5": 0}, "echo": False, "seed": -1, "ignore_eos": False, "suffix": ""}
    off |= {"skip_special_tokens": True, "chat_template_kwargs": {}, "logprobs": False}
    off |= {"early_stopping": False, "verbosity": "medium", "mirostat": 0, "mirostat_tau": 5.0}
    assert read_request(kind, json.dumps(must | null).encode()) == plain
    assert read_request(kind, json.dumps(must | off).encode()) == plain
    tools: Any = {"tools": [{"type": "function"}], "tool_choice": "none"}
    assert read_request(kind, json.dumps(must | tools).encode()) == plain
    greedy: Any = {"do_sample": False, "temperature": 0.7}
    assert read_request(kind, json.dumps(must | greedy).encode()).temperature == 0
    on = {"logprobs": 0, "min_p": 0.1, "repetition_penalty": 0, "ignore_eos": True, "echo": 0}
    for name, value in on.items():
        with pytest.raises(ApiError):
            read_request(kind, json.dumps(must | {name: value}).encode())


def test_a_large_prompt_holds_nobody_up(loaded: LoadedStudent) -> None:
    """It is tokenised elsewhere while the tokenizer here is held, and given up after a while."""
    messages = [{"role": "user", "content": "x <|im_end|>"}] * 200
    tokenizer, held = loaded.tokenizer, threading.Lock()
    wanted = [tokenizer.encode_prompt(messages)]
    prompts = Prompts(tokenizer, held, 60.0)
    with held:
        assert asyncio.run(prompts.encode(messages, True, True)) == wanted
        prompts._seconds = 0.0
        assert isinstance(asyncio.run(prompts.encode(messages, True, True)), str)
    assert asyncio.run(prompts.encode(messages, True, False)) == wanted


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
    with error.value as refusal:
        assert refusal.code == 400 and "localhost" in json.load(refusal)["error"]["message"]


def test_a_key_where_one_is_asked_for(loaded: LoadedStudent) -> None:
    config = ServeConfig("small", CONFIG.sampling, port=0, api_key="sesame")
    assert "sesame" not in repr(config)
    with server.served(loaded, config) as place:
        assert [model.id for model in client(place, "sesame").models.list()] == ["small"]
        with pytest.raises(openai.AuthenticationError):
            client(place).models.list()
        with pytest.raises(openai.AuthenticationError):
            create(place)
        wait_for(place, 0, 0)  # whoever asks may know


def wait_for(address: str, *load: int) -> None:
    """Until so many are under way and so many wait."""
    deadline, found = time.monotonic() + 30, None
    while found != load:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
        with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
            state = json.load(answer)
        found = (state["running"], state["waiting"])


@contextmanager
def slow(model: Any) -> Iterator[threading.Event]:
    """Every pass of the model waits until it may go on."""
    go = threading.Event()
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: go.wait(20) and None)
    try:
        yield go
    finally:
        go.set()
        hook.remove()


def test_beyond_the_limit_requests_are_turned_away(loaded: LoadedStudent, address: str) -> None:
    """Four under way, six wait, the next gets 503; and all that waited are answered."""
    with ThreadPoolExecutor(10) as pool, slow(loaded.model):
        waiting = []
        for number in range(10):
            waiting.append(pool.submit(create, address))
            wait_for(address, 1, number)  # the first is being decoded, and the batch is closed
        with pytest.raises(openai.InternalServerError):
            create(address)
    answers = {answer.result().choices[0].message.content for answer in waiting}
    assert answers == {sampled(loaded, loaded.tokenizer.encode_prompt(CHATS[0]), 8)}


def test_who_hangs_up_leaves_the_batch(loaded: LoadedStudent, address: str) -> None:
    """Streamed or not."""
    with slow(loaded.model) as go:
        asked: Any = {"model": "small", "prompt": "x", "max_tokens": 3000}
        stream = client(address).completions.create(**asked, stream=True)
        wait_for(address, 1, 0)
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client(address, timeout=0.3).completions.create(**asked)
        go.set()
        wait_for(address, 0, 0)


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
    assert got.choices[0].message.content == sampled(
        loaded, loaded.tokenizer.encode_prompt(CHATS[0]), 8
    )
    assert "out of memory" in caplog.text


def test_a_server_that_stops_tells_those_who_wait(loaded: LoadedStudent) -> None:
    with ThreadPoolExecutor(1) as pool:
        with slow(loaded.model) as go, server.served(loaded, CONFIG) as place:
            answer = pool.submit(create, place, max_tokens=3000)
            wait_for(place, 1, 0)
            threading.Timer(0.5, go.set).start()
        assert isinstance(answer.exception(), openai.InternalServerError)


def test_the_name_of_a_student_and_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert served_name(str(tmp_path / "mine" / "model")) == "mine"
    assert served_name(str(tmp_path / "mine")) == "mine"
    assert served_name("owner/name") == "owner/name"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TideError):
        bind(ServeConfig("small", port=taken.getsockname()[1]))
