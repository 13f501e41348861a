"""A student in use: sampling by steps and thresholds, likelihoods, requests to a server.

All responses are equally long. What fewer steps cost is said by the embedded teacher: its NLL of
blocks decoded after the true text of held-out functions, at fixed masks, with the share of distinct
tokens beside it, since text that repeats itself can please a model too.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np
import torch
from rich.table import Table

from pipelines.serving.server import ServeConfig, served
from pipelines.speed import side_by_side
from shared.data import iter_examples
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model, new_model
from shared.settings.config import DataConfig, StudentConfig
from student_train.using.elbo import ElboConfig, log_likelihoods_together
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use, sample_steps
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import Request, TargetSpec
from teacher_cache.teachers.registry import find_teacher

EMBEDDED = "student_train/tiny_students/shared"
# Of a width at which products and not Python take the time; its weights are random.
SHAPE = StudentConfig(hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=1536)
NEW, BLOCK, ROUNDS = 64, 32, 2
SAMPLING = SampleConfig(new_tokens=NEW, min_new_tokens=NEW, block=BLOCK)  # does not end early
DRAWS = 8  # masks of each judged block
WAYS: dict[str, dict[str, Any]] = {
    "1 token a step": {"steps_per_block": 32},
    "8 steps a block": {"steps_per_block": 8},
    "4 steps a block": {"steps_per_block": 4},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.2": {"threshold": 0.2},
}


def bench_use(shape: StudentConfig = SHAPE, prompts: int = 8) -> Table:
    """Tokens a second of each way, against the first of its kind."""
    title = f"{prompts} held-out prompts, {NEW} new tokens each, blocks of {BLOCK}"
    table = Table("what", "passes", "tokens/s", "ratio", "NLL", "distinct", title=title)
    torch.manual_seed(0)
    trained = load_for_use(EMBEDDED, "cpu")
    add_sampling(table, trained, prompts)
    fresh = new_model(shape, trained.tokenizer, trained.special.mask, 4096)
    student = replace(trained, model=fresh.eval())

    # Bounds of log p(answer | prompt), question by question and all questions in one batch.
    questions = [(prompt, [answer[:NEW]]) for prompt, answer in held_out(student, prompts)]
    config = ElboConfig(draws=4, block=BLOCK)

    def score(size: int) -> None:
        for start in range(0, prompts, size):
            part = questions[start : start + size]
            log_likelihoods_together(student.model, part, student.special, config)

    tokens = sum(len(answer) for _, (answer,) in questions)
    add_at_once(table, "likelihoods", "question", score, [1, prompts], tokens)
    add_serving(table, student, prompts)
    return table


def held_out(student: LoadedStudent, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of functions that nothing embedded was trained on, as ids."""
    chats = list(iter_examples(DataConfig("stdlib:heldout", limit=count)))
    answers = student.tokenizer.encode([chat.messages[-1]["content"] for chat in chats])
    prompts = [student.prompt(chat.messages[:-1]) for chat in chats]
    return list(zip(prompts, answers, strict=True))


def add_sampling(table: Table, student: LoadedStudent, prompts: int) -> None:
    """A row a way to sample, by the embedded student, since a threshold needs one that is sure."""
    pairs = held_out(student, 3 * prompts)
    asked = [prompt for prompt, _ in pairs[:prompts]]
    longer = [(prompt, answer) for prompt, answer in pairs if len(answer) >= 2 * BLOCK]
    # Blocks with the true text before them.
    blocks = [(prompt + answer[:BLOCK], answer[BLOCK : 2 * BLOCK]) for prompt, answer in longer]
    contexts = [context for context, _ in blocks]
    passes: dict[str, int] = {}

    def decode(way: str) -> None:
        config = replace(SAMPLING, **WAYS[way])
        *_, (_, passes[way]) = sample_steps(student.model, asked, student.special, config)

    seconds = side_by_side({way: partial(decode, way) for way in WAYS}, ROUNDS)
    first = next(iter(WAYS))
    for way, changes in WAYS.items():
        config = replace(SAMPLING, new_tokens=BLOCK, min_new_tokens=BLOCK, **changes)
        *_, (tokens, _) = sample_steps(student.model, contexts, student.special, config)
        nll, distinct = judge(student, list(zip(contexts, tokens, strict=True)))
        speed, ratio = prompts * NEW / seconds[way], seconds[first] / seconds[way]
        cells = (str(passes[way]), f"{speed:.0f}", f"{ratio:.2f}", f"{nll:.2f}", f"{distinct:.2f}")
        table.add_row(f"sampling, {way}", *cells)
    nll, distinct = judge(student, blocks)
    table.add_row("(the true text)", "–", "–", "–", f"{nll:.2f}", f"{distinct:.2f}")


def judge(student: LoadedStudent, blocks: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """The teacher's NLL of blocks given their contexts, nats a token, and their share of distinct
    tokens. `DRAWS` copies of a block have 1/16, 3/16, … of it masked, at the same places each.
    """
    entry = find_teacher("tiny-shared")
    teacher = load_model(open_checkpoint(resolve(entry.model)), entry.architecture, torch.float32)
    engine = TransformersEngine(teacher, entry.attention, TargetSpec(0, 1.0, (1.0,)))
    random, hidden = torch.Generator().manual_seed(0), []  # places in a block
    for draw in range(DRAWS):
        order = torch.randperm(BLOCK, generator=random)
        hidden.append(order[: 1 + int(BLOCK * (draw + 0.5) / DRAWS)].sort().values.numpy())
    requests = []
    for context, block in blocks:
        ids = np.array(context + block, np.int32)
        for places in hidden:
            read = (len(context) + places).astype(np.int32)
            noised = ids.copy()
            noised[read] = student.special.mask
            requests.append(Request(noised, read, ids[read]))
    nll = np.mean([-scores["gold_logp"].mean() for scores in engine.score(requests)])
    return float(nll), float(np.mean([len(set(block)) / len(block) for _, block in blocks]))


def add_serving(table: Table, student: LoadedStudent, prompts: int) -> None:
    """The same number of requests through HTTP, so many at once."""
    settings = replace(SAMPLING, steps_per_block=8)
    config = ServeConfig("student", settings, batch=prompts, port=0)
    with served(student, config) as address:

        def ask(number: int) -> None:
            message = {"role": "user", "content": f"Write `f{number}`."}
            body = json.dumps({"model": config.name, "messages": [message]}).encode()
            headers, path = {"content-type": "application/json"}, "/v1/chat/completions"
            with urlopen(HttpRequest(address + path, body, headers)) as answer:
                made = json.load(answer)["usage"]["completion_tokens"]
            if made != NEW:
                raise RuntimeError(f"a response has {made} tokens and not {NEW}")

        def ask_all(count: int) -> None:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(ask, range(prompts)))

        sizes = sorted({1, min(4, prompts), prompts})
        add_at_once(table, "serving", "request", ask_all, sizes, prompts * NEW)


def add_at_once(
    table: Table, kind: str, noun: str, job: Callable[[int], None], sizes: list[int], tokens: int
) -> None:
    """A row for each number of questions or requests that are worked on at once."""
    seconds = side_by_side({str(size): partial(job, size) for size in sizes}, ROUNDS)
    for size in sizes:
        speed, ratio = tokens / seconds[str(size)], seconds["1"] / seconds[str(size)]
        name = f"{kind}, {size} {noun}{'s' if size > 1 else ''} at once"
        table.add_row(name, "", f"{speed:.0f}", f"{ratio:.2f}", "", "")
