"""What training from a cache costs: both stages an example, the head and its loss, large caches."""

import dataclasses
import os
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch
from rich.table import Table

from pipelines.plan.costs import Workload, even_layout, made_up_fingerprint, random_rows
from pipelines.recipes.read import cache_config, train_config
from pipelines.speed import added_memory, in_process, side_by_side
from shared.cache import ledger
from shared.cache.manifest import Manifest
from shared.cache.shards import TABLES, Unit, read_table, save_tables, write_shard
from shared.settings.config import KL, CacheConfig, ReverseCalm, Tidal, TrainConfig
from shared.settings.data import TargetConfig
from shared.system.hardware import bfloat16_in_hardware, high_water
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.losses.objective import Counts, LossSettings, fused_loss, objective, total
from student_train.model import load_student, train_on_loss
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import examples_of, load_engine, prepare_unit, run_units

VOCABULARY = 151_936  # Qwen3's
BATCH = 8  # examples of a step
ROWS, WIDTH = 512, 512  # of the LM head's input
OBJECTIVES = {"kl + TIDAL": KL(tidal=Tidal()), "reverse_calm": ReverseCalm()}
DRAWS, SHARD = 4, 512  # of the large cache: draws, and rows of a shard
CONFIG = CacheConfig(targets=TargetConfig(signals=("topk",)))
LOAD = Workload(1, 2, 1024, 150, 300, 0, "")


def bench_stages(examples: int = 96) -> Table:
    """What the teacher costs once, and what it would cost in every step: time of an example ÷ its
    step of training from the cache. The embedded teacher, the student of its recipe, one draw.
    """
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        # 1. A cache, and the requests that it came from.
        cache = Path(folder) / "cache"
        changes = [f"data.limit={examples}", f"shard_examples={examples // 4}", "noise.draws=1"]
        config = cache_config("tiny-shared", None, changes, out=cache)
        build_cache(config)
        run = open_or_begin(config)
        engine = load_engine(run)
        assert isinstance(engine, TransformersEngine)
        units, requests = run.manifest.units(), []
        for unit in units:
            requests += prepare_unit(run, unit, examples_of(run, unit)).requests
        batches = [engine.batch(packs) for packs in engine.batches(requests)]
        # 2. The student that reads it.
        train = train_config("tiny-shared", None, [f"batch_size={BATCH}"], cache=cache)
        opened = OpenCache(train)
        torch.manual_seed(0)
        model, _ = load_student(train.student, cache, opened.manifest)
        read = TargetReader(opened.layout, model.config.vocab_size)
        train_on_loss(model, run.config.lengths.block, read)
        data = BatchDataset(opened, train)

        # 3. The jobs.
        def whole() -> None:
            for path in cache.glob("shards/*/*.parquet"):
                path.unlink()
            run_units(run, engine, units)

        def train_from_cache() -> None:
            for number in range(examples // BATCH):
                batch = data[number]
                counts = counts_of(batch["counts"])
                settings = LossSettings(train.distillation, train.weight, counts, 0.5)
                model.zero_grad()
                loss, _ = model(batch=batch, settings=settings)
                loss.backward()

        def train_with_teacher() -> None:
            engine.score(requests)
            train_from_cache()

        @torch.inference_mode()
        def layers_alone() -> None:
            for batch in batches:
                engine.hidden(batch)

        seconds = side_by_side(
            {
                "a step from the cache": train_from_cache,
                "of it, reading and collating": lambda: [data[i] for i in range(examples // BATCH)],
                "a step with the teacher in the loop": train_with_teacher,
                "stage one, from text to shards": whole,
                "of it, passes, head and top-k": lambda: engine.score(requests),
                "of it, layers alone": layers_alone,
            },
            rounds=3,
        )
    title = f"The embedded teacher and its student, {examples} examples, one draw"
    table = Table("an example", "÷ a step from the cache", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{value / seconds['a step from the cache']:.2f}")
    return table


def bench_head(vocabulary: int = VOCABULARY) -> Table:
    """Head and loss in slices ÷ plain logits of whole sequences, at a real vocabulary."""
    half = bfloat16_in_hardware(torch.device("cpu"))
    title = (
        f"LM head and loss in slices ÷ plain over the whole sequence, forward and backward: "
        f"{ROWS} rows, {vocabulary:,} tokens, width {WIDTH}, {'bfloat16' if half else 'float32'}"
    )
    names = ("objective", "rows masked", "time", "memory beyond inputs and gradients")
    table = Table(*names, title=title)
    for name, settings in OBJECTIVES.items():
        for masked in (ROWS, ROWS // 2):
            case = (settings, masked, vocabulary, half)
            jobs = {way: head_job(way, *case) for way in ("plain", "sliced")}
            seconds, memory = side_by_side(jobs, rounds=2), ""
            if masked == ROWS:
                held = {way: in_process(added_memory, head_job, way, *case) for way in jobs}
                memory = f"{max(1, held['sliced']) / max(1, held['plain']):.2f}"
            ratio = seconds["sliced"] / seconds["plain"]
            table.add_row(name, f"{masked / ROWS:.0%}", f"{ratio:.2f}", memory)
    return table


def head_job(
    way: str, distillation: KL | ReverseCalm, masked: int, vocabulary: int, half: bool
) -> Callable[[], object]:
    """A step of head and loss on made-up targets, whose gradients are there before it."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = (torch.randn(vocabulary, WIDTH) * 0.02).requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    torch.ones_like(head)  # a second gradient of the head, which a loss adds up, is no news later
    config = CacheConfig(targets=TargetConfig(signals=("topk", "chunks")))
    load = Workload(1, 1, masked, masked, masked, masked, "")
    manifest = Manifest(made_up_fingerprint(config, True, vocabulary, 0), 1, 1, 1)
    batch = collate(random_rows(load, config, vocabulary, 1), manifest)
    targets = TargetReader(even_layout(config.targets, vocabulary), vocabulary)(batch)
    counts = Counts(*torch.full((3,), float(masked)))
    settings = LossSettings(distillation, 1.0, counts, 0.5)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if way == "sliced":
                loss, _ = fused_loss(hidden[:masked], head, targets, settings)
            else:  # logits of all rows, of which the masked ones are read
                logits = torch.nn.functional.linear(hidden, head)[:masked]
                sums = objective(logits, targets, distillation, settings.progress)
                loss = total(sums, counts, distillation, settings.weight)
        loss.backward()

    return run


def bench_loader(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> Table:
    """What the start of training, a resumed run and reading take of large caches: a row a size."""
    kept = f"k {CONFIG.targets.k}, {VOCABULARY:,} tokens, {DRAWS} draws"
    columns = ("rows", "shards", "start of training s", "of it ledger s", "memory of it MB",
               "first batch of epoch 9 s", "read positions/s", "to targets", "checked")  # fmt: skip
    table = Table(*columns, title=f"A made-up cache, {kept}; one thread")
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
            cache = Path(folder) / "cache"
            shards = make_cache(cache, rows)
            table.add_row(f"{rows:,}", f"{shards:,}", *in_process(measure_cache, cache))
    return table


def make_cache(cache: Path, rows: int) -> int:
    """Write a cache in which all parts of a draw are links to one shard; how many there are."""
    layout = even_layout(CONFIG.targets, VOCABULARY)
    assert layout.tables is not None
    save_tables(cache / TABLES, layout.tables)
    fingerprint = made_up_fingerprint(CONFIG, True, VOCABULARY, 0)
    fingerprint = dataclasses.replace(fingerprint, tables=layout.tables.digest)
    manifest = Manifest(fingerprint, DRAWS, -(-rows // SHARD), rows)
    manifest.save(cache)
    entries = {}
    for draw in range(DRAWS):
        made = random_rows(LOAD, CONFIG, VOCABULARY, SHARD, draw)
        first = Unit(draw, 0).path(cache)
        masked = sum(row.masked.size for row in made)
        counts = {"masked": masked, "cache": manifest.digest, "draw": draw}
        content = write_shard(first, made, layout, counts)
        entry = ledger.Entry.of(content, {**counts, "rows": len(made)})
        for part in range(manifest.parts):
            entries[Unit(draw, part)] = entry
            if part:
                os.link(first, Unit(draw, part).path(cache))
    ledger.save_ledger(cache, manifest, entries)
    ledger.remember(cache)
    return len(entries)


def measure_cache(cache: Path) -> list[str]:
    """The cells of a row. In a process of its own, for its memory."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    config = TrainConfig(cache=cache, batch_size=32, epochs=10.0)
    before, started = high_water(), time.perf_counter()
    opened = OpenCache(config)
    data = BatchDataset(opened, config)
    start, memory = time.perf_counter() - started, high_water() - before
    manifest, layout, unit = opened.manifest, opened.layout, Unit(0, 0)
    load = timeit.timeit(lambda: ledger.load_ledger(cache, manifest), number=1)
    resume = timeit.timeit(lambda: data.rows(len(data) - 1), number=1)
    cells = [f"{start:.2f}", f"{load:.2f}", f"{memory / 1e6:.0f}", f"{resume:.2f}"]

    path, job = unit.path(cache), (unit, opened.ledger[unit])
    content, rows = path.read_bytes(), read_table(path, layout).rows(path, layout)
    read, part = TargetReader(layout, VOCABULARY), rows[:32]
    for count, work in (
        (SHARD, lambda: read_table(path, layout, content).rows(path, layout)),
        (len(part), lambda: read(collate(part, manifest))),
        (SHARD, lambda: ledger.inspect_shard(cache, manifest, layout, job)),
    ):
        best = min(timeit.repeat(work, number=1, repeat=5))
        cells.append(f"{LOAD.masked * count / best:,.0f}")
    return cells
