"""What a stage-one run will cost: memory, tokens, FLOPs, bytes on disk. Nothing is run.

FLOPs follow the usual count: two for every multiply-add of a weight that a token meets, four times
the width for every pair of positions in attention, the LM head at the rows that are read alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache.levels import to_table
from shared.cache.manifest import CachedData, CachedStudent, CachedTeacher, Fingerprint
from shared.cache.row import CacheRow, Layout, Tables, TokenMap
from shared.cache.shards import Unit, table_bytes
from shared.settings.config import CacheConfig, TargetConfig
from teacher_cache.engines.packs import pack_requests
from teacher_cache.run.open import Run
from teacher_cache.run.work import prepare_unit
from teacher_cache.teachers.registry import BlockCausal, Full, TeacherEntry

_SAMPLE = 256  # examples
_WEIGHED = 64  # rows
_RANK = 128  # taken for an automatic one


@dataclass(frozen=True)
class Workload:
    """Means over examples, for one draw of one example."""

    examples: int
    passes: float
    tokens: float  # that the teacher runs over, all passes together
    masked: float  # positions that are read, all passes together
    student_tokens: float
    chunks: float
    source: str  # where the numbers come from, in words


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
    stacked = sum(p.numel() for p in model.parameters() if p.dim() == 3)  # weights of experts
    head = parts["model.embed_tokens.weight"]
    total, outside = sum(parts.values()), head + parts.get("lm_head.weight", 0)
    active = round(total - outside - stacked * (1 - share))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return ModelSize(total, active, config.num_hidden_layers, width, head)


def assumed_workload(
    entry: TeacherEntry, config: CacheConfig, examples: int, tokens: int, response: float
) -> Workload:
    """A workload from stated means: `tokens` an example (of either side), a share `response` of
    them maskable, of which half are masked on average over t.
    """
    passes = 2.0 if config.noise.comp_demo else 1.0
    masked = tokens * response / 2
    each = passes * tokens
    if not isinstance(entry.attention, Full):
        # What all passes of all draws have in common runs once (`engines.packs`).
        common = tokens * (1 - response) if isinstance(entry.attention, BlockCausal) else tokens
        each = common / config.noise.draws + passes * tokens * response
    chunks = masked if entry.student_tokens else masked * 0.8
    words = f"stated: {tokens} tokens an example, {response:.0%} of them response; "
    words += "chunks of 1.25 tokens across tokenizers"
    return Workload(examples, passes, each, masked, float(tokens), chunks, words)


def sampled_workload(run: Run) -> Workload:
    """The workload of the data itself, from its first examples under all draws."""
    examples, draws = run.data.between(0, _SAMPLE), run.manifest.draws
    works = [prepare_unit(run, Unit(draw, 0), examples) for draw in range(draws)]
    requests = [request for work in works for request in work.requests]
    shift, most = int(run.entry.shift), run.config.engine.tokens_per_batch
    packs = pack_requests(run.entry.attention, requests, shift, most)
    items = [item for work in works for item in work.items]
    masked = sum(item.view.positions.size for item in items)
    student = sum(len(item.example.student_ids) for item in items)
    chunks = sum(len(item.draw.chunks) for item in items) if run.shared is None else masked
    sums = (len(requests), sum(len(pack.ids) for pack in packs), masked, student, chunks)
    words = f"measured on the first {len(examples)} examples under {draws} draws"
    means = [total / max(1, len(items)) for total in sums]
    return Workload(run.data.examples, *means, source=words)


def bytes_per_draw(load: Workload, config: CacheConfig, vocabulary: int, own: bool) -> float:
    """Bytes of one row on disk: a shard of `random_rows` is weighed."""
    rows = random_rows(load, config, vocabulary, _WEIGHED, own=own)
    layout = even_layout(config.targets, vocabulary)
    return len(table_bytes(to_table(rows, layout), layout, {})) / len(rows)


def even_layout(
    targets: TargetConfig, vocabulary: int, width: int = 1, student: int | None = None
) -> Layout:
    """A layout before there is a pilot sample: every id as likely as another. `student`: tokens of
    a student with a tokenizer of its own, to each of which as many of the teacher's lead.
    """
    tables, temperatures = None, targets.stored_temperatures
    token_map = None
    if student is not None:
        ids, ones = np.arange(vocabulary, dtype=np.int32), np.ones(vocabulary, np.float32)
        lengths = ids * 0 + 1, np.ones(student, np.int32)
        token_map = TokenMap(ids, ids * 0, ids % student, ones, *lengths)
    if "topk" in targets.signals:
        rank, random = targets.rank or _RANK, np.random.default_rng(0)
        tables = Tables(
            rank_of=np.arange(vocabulary, dtype=np.int32), shared=np.ones(vocabulary, bool),
            mean=random.normal(0, 2, vocabulary).astype(np.float32),
            calibration=np.zeros((len(temperatures), vocabulary), np.float32),
            directions=random.integers(-127, 128, (vocabulary, rank), np.int8),
            scales=np.full(rank, 0.01, np.float32), encoder=np.zeros((rank, width), np.float32),
            center=np.zeros(width, np.float32), token_map=token_map,
            step=targets.step if targets.values == "levels" else 0.0,
        )  # fmt: skip
    return Layout(temperatures, targets.values, tables)


def made_up_fingerprint(
    config: CacheConfig, student_tokens: bool, vocabulary: int, mask_id: int
) -> Fingerprint:
    """As of a cache whose rows are `random_rows`."""
    teacher = CachedTeacher("", "", {}, False, student_tokens, mask_id, vocabulary, "", "", "")
    student = CachedStudent("", "", mask_id, "", vocabulary)
    data = CachedData("", 0, config.shard_examples, (), None)
    return Fingerprint.of(config, teacher, student, data)


def random_rows(
    load: Workload, config: CacheConfig, vocab: int, size: int, draw: int = 0, own: bool = False
) -> list[CacheRow]:
    """Rows of random values as in a cache. `own`: of a teacher with a tokenizer of its own."""
    targets, n = config.targets, max(1, round(load.masked))
    length, chunks = max(1, n, round(load.student_tokens)), max(1, round(load.chunks))
    k, rank = targets.k, targets.rank or _RANK
    spread = 10 / np.sqrt(np.arange(1, rank + 1))  # steps, as of the embedded teacher
    rows = []
    for i in range(size):
        random = np.random.default_rng(i)
        masked = np.sort(random.choice(length, n, replace=False)).astype(np.int32)
        values: dict[str, Any] = {"example_id": f"{random.integers(1 << 60):016x}", "draw": draw}
        values |= {"label": "", "t": 0.5, "masked": masked}
        values["spans"] = np.array([[0, length]], np.int32)
        values["student_ids"] = random.integers(0, vocab, length, np.int32)
        values["split"] = random.random(n) < 0.5
        values["gold_logp"] = -random.exponential(2, n).astype(np.float32)
        values["logsumexp"] = random.normal(0, 4, n).astype(np.float32)
        values["teacher_ids"] = random.integers(0, vocab, length, np.int32) if own else None
        values["teacher_masked"] = masked if own else None
        if "topk" in targets.signals:
            logits = -np.sort(-random.normal(0, 2, (n, k)).astype(np.float32), axis=1)
            logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.2
            frequent = np.exp(random.uniform(0, np.log(vocab), n * k)) - 1  # have small ids
            values["topk_sizes"] = np.full(n, k, np.int32)
            values["topk_ids"], values["topk_logp"] = frequent.astype(np.int32), logp.reshape(-1)
            values["tail_code"] = random.normal(0, spread, (n, rank)).round().clip(-127, 127)
            level = random.normal(0, 1, (n, len(targets.stored_temperatures)))
            values["tail_level"] = level.astype(np.float32)
        if "chunks" in targets.signals:
            starts = np.sort(random.choice(length, chunks, replace=chunks > length))
            spans = np.stack([starts, starts + 1], axis=1).astype(np.int32)
            values["chunk_student"] = values["chunk_teacher"] = spans
            values["chunk_logp"] = -random.random(chunks).astype(np.float32)
        rows.append(CacheRow(**values))
    return rows
