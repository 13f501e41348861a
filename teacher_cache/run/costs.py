"""What a stage-one run will cost: memory, tokens, FLOPs, bytes on disk. Arithmetic only; nothing is run.

FLOPs follow the usual count: two for every multiply-add of a weight that a token meets, four times width for every
pair of positions in attention, and the LM head at the rows that are read and at no other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache.columns import to_table
from shared.cache.fingerprint import CachedData, CachedStudent, CachedTeacher, Fingerprint
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit, table_bytes
from shared.cache.vocabulary import Vocabulary
from shared.settings.config import CacheConfig, TargetConfig
from teacher_cache.engines.packs import pack_requests
from teacher_cache.run.open import Run
from teacher_cache.run.work import prepare_unit
from teacher_cache.teachers.registry import BlockCausal, Full, TeacherEntry

_SAMPLE = 256


@dataclass(frozen=True)
class Workload:
    """Means over examples, for one draw of one example."""

    examples: int
    passes: float
    tokens: float
    """Columns that the teacher runs over, all passes together."""
    masked: float
    """Positions that are read, all passes together."""
    student_tokens: float
    chunks: float
    source: str
    """Where the numbers come from, in words."""


@dataclass(frozen=True)
class ModelSize:
    """A teacher's size. `active`: weights that a token meets, without embedding and head."""

    parameters: int
    active: int
    layers: int
    width: int
    head: int

    def flops(self, load: Workload, length: float) -> float:
        """FLOPs of one draw of one example whose passes are `length` columns long."""
        attention = 4 * self.layers * self.width * length * load.tokens
        return 2 * self.active * load.tokens + attention + 2 * self.head * load.masked


def size_of(model: Any) -> ModelSize:
    """Sizes of a stock transformers model, which may be on the meta device."""
    config = model.config
    parts = {name: p.numel() for name, p in model.named_parameters()}
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1.0
    stacked = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    outside = parts["model.embed_tokens.weight"] + parts.get("lm_head.weight", 0)
    total = sum(parts.values())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        parameters=total,
        active=round(total - outside - stacked * (1 - share)),
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * head_dim,
        head=parts["model.embed_tokens.weight"],
    )


def assumed_workload(
    entry: TeacherEntry, config: CacheConfig, examples: int, tokens: int, response: float
) -> Workload:
    """A workload from stated means: `tokens` of the teacher an example, a share `response` of them maskable.

    Half of the maskable tokens are masked on average over t; a student's token is taken to be a teacher's token.
    """
    passes = 2.0 if config.noise.comp_demo else 1.0
    masked = tokens * response / 2
    each = passes * tokens
    if not isinstance(
        entry.attention, Full
    ):  # what all passes of all draws have in common runs once (`engines.packs`)
        common = tokens * (1 - response) if isinstance(entry.attention, BlockCausal) else tokens
        each = common / config.noise.draws + passes * tokens * response
    chunks = masked if entry.student_tokens else masked * 0.8
    words = f"stated: {tokens} tokens an example, {response:.0%} of them response; chunks of 1.25 tokens across tokenizers"
    return Workload(examples, passes, each, masked, float(tokens), chunks, words)


def sampled_workload(run: Run) -> Workload:
    """The workload of the data itself, from its first examples under all draws."""
    examples = run.data.between(0, _SAMPLE)
    draws = range(run.manifest.draws)
    works = [prepare_unit(run, Unit(draw, 0), examples) for draw in draws]
    requests = [request for work in works for request in work.requests]
    packs = pack_requests(
        run.entry.attention, requests, int(run.entry.shift), run.config.engine.tokens_per_batch
    )
    items = [item for work in works for item in work.items]
    n = max(1, len(items))
    shared = run.shared is not None
    return Workload(
        examples=round(run.data.examples * len(items) / (len(draws) * max(1, len(examples)))),
        passes=len(requests) / n,
        tokens=sum(pack.width for pack in packs) / n,
        masked=sum(item.view.positions.size for item in items) / n,
        student_tokens=sum(len(item.example.student_ids) for item in items) / n,
        chunks=sum(item.view.positions.size if shared else len(item.draw.chunks) for item in items)
        / n,
        source=f"measured on the first {len(examples)} examples under {len(draws)} draws",
    )


def bytes_per_draw(load: Workload, config: CacheConfig, vocabulary: int, own_tokens: bool) -> float:
    """Bytes of one row on disk: a shard of rows of this size, with random ids and logits, is written and weighed."""
    rows = random_rows(load, config, vocabulary, 64, own_tokens=own_tokens)
    layout = even_layout(config.targets, vocabulary)
    return len(table_bytes(to_table(rows, layout), layout, {})) / len(rows)


def even_layout(targets: TargetConfig, vocabulary: int) -> Layout:
    """A layout before there is a pilot sample: classes of one size, every id as likely as the others."""
    tables = None
    if "topk" in targets.signals:
        class_of = (np.arange(vocabulary) % targets.classes).astype(np.int32)
        prior = np.full((len(targets.stored_temperatures), vocabulary), 1 / vocabulary, np.float32)
        tables = Vocabulary(class_of, np.arange(vocabulary, dtype=np.int32), prior)
    return Layout(targets.stored_temperatures, targets.values, tables)


def made_up_fingerprint(
    config: CacheConfig, student_tokens: bool, vocabulary: int, mask_id: int
) -> Fingerprint:
    """As of a cache whose rows are `random_rows`."""
    teacher = CachedTeacher("", "", {}, False, student_tokens, mask_id, vocabulary, "", "", "")
    student = CachedStudent("", "", mask_id, "", vocabulary)
    data = CachedData("", 0, config.shard_examples, (), None)
    return Fingerprint.of(config, teacher, student, data)


def random_rows(
    load: Workload,
    config: CacheConfig,
    vocabulary: int,
    count: int,
    draw: int = 0,
    own_tokens: bool = False,
) -> list[CacheRow]:
    """Rows of this size with random values such as a cache holds."""
    made = (
        _random_row(load, config, vocabulary, own_tokens, np.random.default_rng(i))
        for i in range(count)
    )
    return [dataclasses.replace(row, draw=draw) for row in made]


def _random_row(
    load: Workload,
    config: CacheConfig,
    vocabulary: int,
    own_tokens: bool,
    random: np.random.Generator,
) -> CacheRow:
    length, masked, chunks = (
        max(1, round(x)) for x in (load.student_tokens, load.masked, load.chunks)
    )
    length, targets = max(length, masked), config.targets
    temperatures, k = (
        len(targets.stored_temperatures),
        targets.k if "topk" in targets.signals else 0,
    )
    with_chunks = "chunks" in targets.signals

    def ids(n: int) -> np.ndarray:
        return random.integers(0, vocabulary, n, np.int32)

    def often(n: int) -> np.ndarray:  # as lists have them: frequent ids have small ranks
        return (np.exp(random.uniform(0, np.log(vocabulary), n)) - 1).astype(np.int32)

    def spans(n: int) -> np.ndarray:
        starts = np.sort(random.choice(length, n, replace=n > length)).astype(np.int32)
        return np.stack([starts, starts + 1], axis=1)

    logits = -np.sort(-random.normal(0, 2, (masked, k)).astype(np.float32), axis=1)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.2 if k else logits
    classes = targets.classes if k and targets.classes > 1 else 0
    shares = random.dirichlet(np.full(max(1, classes), 0.3), (masked, temperatures)).astype(
        np.float32
    )
    places = np.sort(random.choice(length, masked, replace=False)).astype(np.int32)
    return CacheRow(
        example_id=f"{random.integers(1 << 60):016x}",
        label="",
        draw=0,
        t=0.5,
        student_ids=ids(length),
        spans=np.array([[0, length]], np.int32),
        masked=places,
        teacher_ids=ids(length) if own_tokens else None,
        teacher_masked=places if own_tokens else None,
        split=random.random(masked) < 0.5,
        gold_logp=-random.exponential(2, masked).astype(np.float32),
        logsumexp=random.normal(0, 4, masked).astype(np.float32),
        topk_sizes=np.full(masked, k, np.int32) if k else None,
        topk_ids=often(masked * k) if k else None,
        topk_logp=logp.reshape(-1) if k else None,
        tail_odds=random.normal(0, 1, (masked, temperatures)).astype(np.float32) if k else None,
        class_mass=np.log(0.3 * shares + 1e-12) if classes else None,
        chunk_student=spans(chunks) if with_chunks else None,
        chunk_teacher=spans(chunks) if with_chunks else None,
        chunk_logp=-random.random(chunks).astype(np.float32) if with_chunks else None,
    )


def in_bytes(value: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
