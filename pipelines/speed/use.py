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
from typing import Any, NamedTuple
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np
import torch
from accelerate.utils import get_max_memory
from rich.table import Table

from pipelines.serving.server import ServeConfig, served
from pipelines.speed import in_process, side_by_side
from shared.data.reading import iter_examples
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model, meta_model, new_model, random_model
from shared.settings.config import DataConfig, StudentConfig
from shared.system.hardware import choose_device, choose_precision, high_water, torch_dtype
from student_train.using.elbo import ElboConfig, log_likelihoods
from student_train.using.settings import SampleConfig, Special
from student_train.using.student import LoadedStudent, load_for_use, sample, sample_steps
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import Request, TargetSpec
from teacher_cache.teachers.registry import find_teacher, published_shape

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
            log_likelihoods(student.model, part, student.special, config)

    tokens = sum(len(answer) for _, (answer,) in questions)
    add_at_once(table, "likelihoods", "question", score, [1, prompts], tokens)
    add_serving(table, student, prompts)
    return table


def held_out(student: LoadedStudent, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of functions that nothing embedded was trained on, as ids."""
    chats = list(iter_examples(DataConfig("stdlib:heldout", limit=count)))
    answers = student.tokenizer.encode([chat.messages[-1]["content"] for chat in chats])
    prompts = [student.tokenizer.encode_prompt(chat.messages[:-1]) for chat in chats]
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


# --- The paper's efficiency table -----------------------------------------------------------------

GIB, PROMPT = 2**30, 64


class Model(NamedTuple):
    """A row. The paper's "GB" are 2^30 bytes: WeDLM's weights alone are 16.4 · 10^9."""

    name: str
    architecture: str
    shape: str  # a table of shapes.toml
    paper: tuple[float | None, float | None]  # its memory, and seconds, where they are known here
    block: int = 32  # of tokens, each pass settles one


MODELS = (
    Model("BD3LM, 0.6B", "qwen3", "qwen3-0.6b", (1.4, 6.25)),
    Model("Qwen3, 0.6B, autoregressive", "qwen3", "qwen3-0.6b", (1.2, None), block=1),
    Model("WeDLM, 8B", "qwen3", "qwen3-8b", (15.5, None)),
    Model("LLaDA2.0-mini, 16B MoE", "llada2_moe", "llada2-mini", (31.3, 32.55)),
)


def bench_paper(tokens: int = 256) -> Table:
    """A row a model; of one that there is no memory for, what it needs."""
    device = choose_device()
    precision = choose_precision("auto", device)
    free = get_max_memory()[0 if device.type == "cuda" else device.type]
    columns = [f"{what}{of}" for what in ("GiB", "s") for of in ("", ", paper", " ÷", " ÷, paper")]
    title = f"A prompt of {PROMPT} tokens, a response of {tokens} (the paper: 256, on an H100); "
    table = Table("model", *columns, title=f"{title}{precision} on {device.type}; ÷ the first row")
    first: Any = None
    for model in MODELS:
        raw: Any = published_shape(model.shape)
        weights = meta_model(model.architecture, raw).num_parameters()
        needed = 1.1 * weights * torch_dtype(precision).itemsize  # more: keys, values, logits
        if needed > free:
            table.add_row(model.name, f"needs {needed / GIB:.1f}, {free / GIB:.1f} are free")
            continue
        measured = in_process(measure, model, tokens, str(device), precision)
        first, cells = first or measured, []
        columns = zip(measured, first, model.paper, MODELS[0].paper, strict=True)
        for value, own, stated, of in columns:
            known = (str(stated), f"{stated / of:.1f}") if stated and of else ("–", "–")
            cells += [f"{value:.2f}", known[0], f"{value / own:.1f}", known[1]]
        table.add_row(model.name, *cells)
    return table


def measure(model: Model, tokens: int, device: str, precision: str) -> tuple[float, float]:
    """GiB at the peak, weights and all, and seconds of a response after the first."""
    before = high_water()
    raw: Any = published_shape(model.shape)
    network = random_model(model.architecture, raw, torch_dtype(precision), device)
    special = Special(mask=network.config.vocab_size - 1, eos=0)
    config = SampleConfig(new_tokens=tokens, min_new_tokens=tokens, block=model.block)
    jobs: Any = {"": lambda: sample(network, [[1] * PROMPT], special, config)}
    seconds = side_by_side(jobs, rounds=1)[""]
    held = high_water() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    return held / GIB, seconds
