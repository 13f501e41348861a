"""The paper's efficiency table: memory and seconds of a response, with random weights."""

from typing import Any, NamedTuple

import torch
from accelerate.utils import get_max_memory
from rich.table import Table

from pipelines.speed import in_process, side_by_side
from shared.models.loading import meta_model, random_model
from shared.system.hardware import choose_device, choose_precision, high_water, torch_dtype
from student_train.using.settings import SampleConfig, Special
from student_train.using.student import sample
from teacher_cache.teachers.registry import published_shape

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
    special = Special(mask=network.config.vocab_size - 1, pad=0, eos=0)
    config = SampleConfig(new_tokens=tokens, min_new_tokens=tokens, block=model.block)
    jobs: Any = {"": lambda: sample(network, [[1] * PROMPT], special, config)}
    seconds = side_by_side(jobs, rounds=1)[""]
    held = high_water() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    return held / GIB, seconds
