"""What joining requests buys: the same requests to a server, one after the other and several at once.

Through HTTP, as a client sees it. The student has random weights at a width where its products and not Python take the
time; all responses are equally long.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from rich.table import Table

from pipelines.serving.background import served
from pipelines.serving.run import check_installed
from pipelines.serving.settings import ServeConfig
from pipelines.speed.timing import side_by_side
from shared.models.loading import new_model
from shared.settings.config import StudentConfig
from student_train.using.load import LoadedStudent, load_for_use
from student_train.using.settings import SampleConfig

_EMBEDDED = "student_train/tiny_students/shared"
_SHAPE = StudentConfig(hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=1536)
_POSITIONS = 4096
_REQUESTS, _NEW = 16, 64
_SAMPLING = SampleConfig(new_tokens=_NEW, min_new_tokens=_NEW, block=32, steps_per_block=8)
_AT_ONCE = (1, 4, 16)


def bench_serving() -> Table:
    """Tokens a second of all requests together, and how long one takes."""
    check_installed()
    title = f"`tide serve`: {_REQUESTS} requests of {_NEW} tokens, {_SAMPLING.steps_per_block} steps a block of 32"
    table = Table("requests at once", "tokens/s", "÷ one by one", "seconds a request", title=title)
    config = ServeConfig("student", _SAMPLING, batch=max(_AT_ONCE), port=0)
    with served(_student(), config) as address:
        waited: dict[int, list[float]] = {count: [] for count in _AT_ONCE}
        jobs: dict[str, Callable[[], object]] = {
            str(n): lambda n=n: waited[n].extend(_ask_all(address, config.name, n))
            for n in _AT_ONCE
        }
        seconds = side_by_side(jobs, rounds=3)
    for count in _AT_ONCE:
        speed = [_REQUESTS * _NEW / seconds[str(n)] for n in (count, 1)]
        one = statistics.median(waited[count])
        table.add_row(str(count), f"{speed[0]:.0f}", f"{speed[0] / speed[1]:.2f}", f"{one:.2f}")
    return table


def _student() -> LoadedStudent:
    """Random weights behind the embedded student's tokenizer."""
    torch.manual_seed(0)
    embedded = load_for_use(_EMBEDDED, "cpu")
    model = new_model(_SHAPE, embedded.tokenizer, embedded.special.mask, _POSITIONS)
    return dataclasses.replace(embedded, model=model.eval())


def _ask_all(address: str, model: str, at_once: int) -> list[float]:
    """Seconds that each request took."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(
            pool.map(lambda number: _ask(address, model, f"Write `f{number}`."), range(_REQUESTS))
        )


def _ask(address: str, model: str, prompt: str) -> float:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    started = time.perf_counter()
    try:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]})
        connection.request(
            "POST", "/v1/chat/completions", body, {"content-type": "application/json"}
        )
        answer = json.load(connection.getresponse())
    finally:
        connection.close()
    if answer["usage"]["completion_tokens"] != _NEW:
        raise RuntimeError(
            f"a response has {answer['usage']['completion_tokens']} tokens and not {_NEW}"
        )
    return time.perf_counter() - started
