"""What training from a cache costs: both stages an example, and the LM head with its loss."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from pipelines.recipes.read import cache_config, train_config
from pipelines.speed import added_memory, in_process, side_by_side
from shared.settings.config import KL, Distillation, ReverseCalm, Tidal
from shared.system.hardware import bfloat16_in_hardware
from student_train.batches.collate import TargetReader, counts_of
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.losses.objective import Counts, LossSettings, fused_loss, objective, total
from student_train.losses.targets import ChunkTargets, Classes, Targets, TopKTargets
from student_train.model import load_student, train_on_loss
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import examples_of, load_engine, prepare_unit, run_units

BATCH = 8
ROWS, VOCABULARY, WIDTH, K, CLASSES = 512, 151_936, 512, 32, 64
OBJECTIVES = {"kl + TIDAL": KL(tidal=Tidal()), "reverse_calm": ReverseCalm()}


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
        read = TargetReader(opened.manifest, opened.layout)
        train_on_loss(model, run.config.lengths.block, read)
        data = BatchDataset(opened, train)

        # 3. The jobs.
        def whole() -> None:
            for path in cache.glob("draw=*/*.parquet"):
                path.unlink()
            run_units(run, engine, units)

        @torch.inference_mode()
        def layers_alone() -> None:
            for batch in batches:
                engine.hidden(batch)

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

        def load_batches() -> None:
            for number in range(examples // BATCH):
                data[number]

        seconds = side_by_side(
            {
                "a step from the cache": train_from_cache,
                "of it, reading and collating": load_batches,
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
            time = seconds["sliced"] / seconds["plain"]
            table.add_row(name, f"{masked / ROWS:.0%}", f"{time:.2f}", memory)
    return table


def head_job(
    way: str, distillation: Distillation, masked: int, vocabulary: int, half: bool
) -> Callable[[], object]:
    """A step of head and loss, `plain` or `sliced`. Its gradients are there before it, as in
    accumulation.
    """
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = (torch.randn(vocabulary, WIDTH) * 0.02).requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    torch.ones_like(head)  # a second gradient of the head, which a loss adds up, is no news later
    targets = made_up_targets(masked, vocabulary)
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


def made_up_targets(rows: int, vocabulary: int) -> Targets:
    """Random targets of a top-k with classes, and chunks of two tokens."""
    temperatures = (1.0, 2.0)
    ids = torch.randint(0, vocabulary, (rows, K))
    logp = torch.randn(rows, K).sort(dim=1, descending=True).values
    kept = torch.ones_like(ids, dtype=torch.bool)
    prior = torch.full((vocabulary,), -math.log(vocabulary))
    class_of = torch.arange(vocabulary) % CLASSES
    classes = Classes(class_of, CLASSES, dict.fromkeys(temperatures, prior))
    odds = dict.fromkeys(temperatures, torch.zeros(rows))
    mass = dict.fromkeys(temperatures, torch.full((rows, CLASSES), math.log(0.5 / CLASSES)))
    topk = TopKTargets(ids, logp, kept, odds, classes, mass, student_shaped=False)
    t = torch.rand(rows) * 0.9 + 0.1
    host = np.stack([np.arange(rows), np.arange(rows) // 2])  # rows, and each row's chunk
    chunks = ChunkTargets(*torch.from_numpy(host), -torch.rand(rows // 2), t[::2], host)
    return Targets(torch.randint(0, vocabulary, (rows,)), t, topk, chunks)
