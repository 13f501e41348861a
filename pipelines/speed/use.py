"""What a student costs in use: tokens a second, memory and quality, against its teacher and autoregressive decoding.

The embedded pair; all answers are equally long. Quality is the teacher's NLL of blocks decoded after the true text of
held-out functions ("generative perplexity", in nats), at fixed masks, with the share of distinct tokens beside it,
since text that repeats itself can please a model too. The backbone was never trained to decode autoregressively: its
speed and memory are measured, its text is not judged.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import pyplot as plt
from rich.table import Table
from torch import Tensor

from pipelines.recipes.read import cache_config, train_config
from pipelines.speed.full_attention import sample_full_attention
from pipelines.speed.memory import in_process
from pipelines.speed.timing import side_by_side
from shared.data import iter_examples
from shared.diffusion.attention import full
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.settings.config import DataConfig
from student_train.training.trainer import train_student
from student_train.using.decoding import pad_left
from student_train.using.load import LoadedStudent, load_for_use
from student_train.using.sampler import sample_steps
from student_train.using.settings import SampleConfig
from teacher_cache.run.build import build_cache
from teacher_cache.teachers.registry import find_teacher

_TEACHER = "tiny-shared"
_DEMO = Path("runs/demo/TIDE-Shared-seed0/model")
_NEW, _BLOCK, _PROMPTS, _ROUNDS = 64, 32, 12, 2
_FUNCTIONS, _BLOCKS, _DRAWS = 24, 3, 8
"""Of the measure of quality: held-out functions, the most blocks of each, masks of each block."""
_STEPS = (32, 16, 8, 4, 2)
_THRESHOLDS = (0.9, 0.5, 0.2, 0.1)

Decode = Callable[[list[list[int]], int], tuple[Tensor, int]]
"""Prompts and a number of new tokens to those tokens, and how often the model ran."""


@dataclass(frozen=True)
class _Row:
    name: str
    passes: int
    speed: float
    """Tokens a second."""
    memory: int
    """Bytes beyond libraries and tokenizer: weights and all that decoding needs."""
    quality: tuple[float, float] | None
    """The teacher's NLL, nats a token, and the share of distinct tokens; None where text is not judged."""


def bench_use(figure: Path = Path("runs/bench/use.png")) -> Table:
    """Measure, draw `figure`, and return the table. Takes the demo's student where there is one, else trains one."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        place = _DEMO if _DEMO.is_dir() else _train(Path(folder))
        rows, truth = _measure(place)
    _draw(rows, truth[0], figure)
    title = f"{_PROMPTS} held-out prompts at a time, {_NEW} tokens each, blocks of {_BLOCK}"
    table = Table(
        "decoding", "passes", "tokens/s", "÷ teacher", "memory, MB", "NLL", "distinct", title=title
    )
    for row in rows:
        judged = (
            ("–", "–")
            if row.quality is None
            else (f"{row.quality[0]:.2f}", f"{row.quality[1]:.2f}")
        )
        cells = (
            f"{row.speed:.0f}",
            f"{row.speed / rows[0].speed:.1f}",
            f"{row.memory / 1e6:.0f}",
            *judged,
        )
        table.add_row(row.name, str(row.passes), *cells)
    table.add_row("(the true text)", *"––––", f"{truth[0]:.2f}", f"{truth[1]:.2f}")
    return table


def _train(folder: Path) -> Path:
    """The embedded student of the tiny-shared recipe."""
    build_cache(cache_config(_TEACHER, None, [], out=folder / "cache"))
    train_student(train_config(_TEACHER, None, [], cache=folder / "cache", out=folder / "run"))
    return folder / "run" / "model"


def _load_teacher() -> Any:
    entry = find_teacher(_TEACHER)
    model: Any = load_model(
        open_checkpoint(resolve(entry.model)), entry.architecture, torch.float32
    )
    return model.eval()


def _measure(place: Path) -> tuple[list[_Row], tuple[float, float]]:
    """Every way to decode, and the quality of the true text."""
    student, teacher = load_for_use(str(place), "cpu"), _load_teacher()
    prompts = _prompts(student)
    ways = {**_teacher_ways(student, teacher), **_student_ways(student)}
    jobs = {name: lambda way=way: way(prompts, _NEW) for name, way in ways.items()}
    passes = {name: job()[1] for name, job in jobs.items()}
    seconds = side_by_side(jobs, _ROUNDS)
    blocks = _blocks(student)
    mask = student.special.mask
    judged = {
        name: None
        if name.startswith("autoregressive")
        else _quality(teacher, mask, _after(way, blocks))
        for name, way in ways.items()
    }
    kinds = {name.split(",")[0] for name in ways}
    memory = {kind: in_process(_prepare, kind, str(place)) for kind in sorted(kinds)}
    made = len(prompts) * _NEW
    rows = [_Row(n, passes[n], made / seconds[n], memory[n.split(",")[0]], judged[n]) for n in ways]
    return rows, _quality(teacher, mask, blocks)


def _prompts(student: LoadedStudent) -> list[list[int]]:
    chats = itertools.islice(iter_examples(DataConfig("stdlib:heldout")), _PROMPTS)
    return [student.prompt(chat.messages[:-1]) for chat in chats]


def _teacher_ways(student: LoadedStudent, teacher: Any) -> dict[str, Decode]:
    """The first of them is what others are compared with."""

    def way(per_step: int) -> Decode:
        return lambda prompts, new: sample_full_attention(
            teacher, prompts, student.special, new, _BLOCK, per_step
        )

    return {"teacher, 1 token a step": way(1), "teacher, 4 tokens a step": way(4)}


def _student_ways(student: LoadedStudent) -> dict[str, Decode]:
    """Nothing ends early, so all make the same number of tokens."""

    def way(**settings: Any) -> Decode:
        def decode(prompts: list[list[int]], new: int) -> tuple[Tensor, int]:
            config = SampleConfig(new_tokens=new, min_new_tokens=new, block=_BLOCK, **settings)
            *_, (tokens, passes) = sample_steps(student.model, prompts, student.special, config)
            return tokens, passes

        return decode

    return {
        **{f"student, {n} steps a block": way(steps_per_block=n) for n in _STEPS},
        **{f"student, threshold {t}": way(threshold=t) for t in _THRESHOLDS},
        "autoregressive, same backbone": lambda prompts, new: _autoregressive(
            student, prompts, new
        ),
    }


def _autoregressive(
    student: LoadedStudent, prompts: list[list[int]], new: int
) -> tuple[Tensor, int]:
    """Greedy decoding of the student's weights under causal attention, with transformers' cache."""
    ids, valid = pad_left(prompts, 1, student.special.pad)
    output = student.model.generate(
        input_ids=ids,
        attention_mask=valid.long(),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=student.special.pad,
    )
    return output[:, ids.shape[1] :], new


def _blocks(student: LoadedStudent) -> list[tuple[list[int], list[int]]]:
    """Whole blocks of held-out functions, each with the true text before it."""
    found = []
    for chat in itertools.islice(iter_examples(DataConfig("stdlib:heldout")), _FUNCTIONS):
        prompt = student.prompt(chat.messages[:-1])
        answer = student.tokenizer.encode([chat.messages[-1]["content"]])[0]
        starts = range(0, min(len(answer) - _BLOCK + 1, _BLOCKS * _BLOCK), _BLOCK)
        found += [(prompt + answer[:start], answer[start : start + _BLOCK]) for start in starts]
    return found


def _after(
    decode: Decode, blocks: list[tuple[list[int], list[int]]]
) -> list[tuple[list[int], list[int]]]:
    """The same contexts with decoded blocks."""
    found = []
    for start in range(0, len(blocks), _PROMPTS):
        contexts = [context for context, _ in blocks[start : start + _PROMPTS]]
        tokens, _ = decode(contexts, _BLOCK)
        found += list(zip(contexts, tokens.tolist(), strict=True))
    return found


@torch.no_grad()
def _quality(
    teacher: Any, mask: int, blocks: list[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """The teacher's NLL of the blocks given their contexts, nats a token, and the share of distinct tokens.

    Fixed masks: a block's `_DRAWS` copies have 1/16, 3/16, … of it masked, the same places in every block.
    """
    generator = torch.Generator().manual_seed(0)
    counts = [1 + int(_BLOCK * (draw + 0.5) / _DRAWS) for draw in range(_DRAWS)]
    hidden = torch.zeros(_DRAWS, _BLOCK, dtype=torch.bool)
    for draw, count in enumerate(counts):
        hidden[draw, torch.randperm(_BLOCK, generator=generator)[:count]] = True
    weights = 1.0 / torch.tensor(counts)
    found = []
    for context, block in blocks:
        gold = torch.tensor([block] * _DRAWS)
        noised = gold.masked_fill(hidden, mask)
        ids = torch.cat([torch.tensor([context] * _DRAWS), noised], dim=1)
        seen = full(torch.ones_like(ids, dtype=torch.bool))
        states = teacher.model(
            input_ids=ids, attention_mask=seen, use_cache=False
        ).last_hidden_state
        logp = (
            teacher.lm_head(states[:, -_BLOCK:])
            .float()
            .log_softmax(dim=-1)
            .gather(-1, gold[..., None])[..., 0]
        )
        found.append(float(-((logp * hidden).sum(dim=1) * weights).mean()))
    return statistics.mean(found), statistics.mean(
        len(set(block)) / len(block) for _, block in blocks
    )


def _prepare(kind: str, place: str) -> Callable[[], object]:
    """Loads libraries and tokenizer; the job loads the one model and decodes."""
    student = load_for_use(place, "cpu")
    prompts = _prompts(student)

    def job() -> object:
        if kind == "teacher":
            return _teacher_ways(student, _load_teacher())["teacher, 1 token a step"](prompts, _NEW)
        ways = _student_ways(load_for_use(place, "cpu"))
        return next(way for name, way in ways.items() if name.startswith(kind))(prompts, _NEW)

    return job


def _together(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Points with their labels; neighbours too close to be read apart get one label, at the first of them."""
    found: list[tuple[float, float, str]] = []
    for speed, nll, text in points:
        if found and abs(math.log(speed / found[-1][0])) < 0.35 and abs(nll - found[-1][1]) < 0.3:
            found[-1] = (*found[-1][:2], f"{found[-1][2]}, {text}")
        else:
            found.append((speed, nll, text))
    return found


def _draw(rows: list[_Row], truth: float, path: Path) -> None:
    """Quality against speed; the best lie at the upper right."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for label, mark in (
        ("teacher", "s"),
        ("student, threshold", "^"),
        ("student, steps a block", "o"),
    ):
        mine = [
            (r.speed, r.quality[0], r.name) for r in rows if r.quality and _group(r.name) == label
        ]
        axis.plot(
            [speed for speed, _, _ in mine],
            [nll for _, nll, _ in mine],
            mark + "-",
            label=label,
            linewidth=1,
        )
        short = [(speed, nll, name.partition(", ")[2].removeprefix("threshold ").removesuffix(" steps a block"))
                 for speed, nll, name in mine]  # fmt: skip
        below = mark == "^"  # where two lines meet, their labels stand on either side
        for speed, nll, text in _together(short):
            axis.annotate(
                text,
                (speed, nll),
                textcoords="offset points",
                xytext=(4, -13 if below else 6),
                fontsize=8,
            )
    for row in rows:
        if row.quality is None:
            axis.axvline(row.speed, linestyle=":", color="grey", label=f"{row.name} (speed alone)")
    axis.axhline(truth, linestyle="--", color="grey", linewidth=1, label="the true text")
    axis.set(
        xscale="log",
        xlabel="tokens a second",
        ylabel="teacher's NLL, nats a token (better is higher up)",
    )
    axis.margins(y=0.12)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _group(name: str) -> str:
    kind, _, how = name.partition(", ")
    if kind != "student":
        return kind
    return "student, threshold" if how.startswith("threshold") else "student, steps a block"
