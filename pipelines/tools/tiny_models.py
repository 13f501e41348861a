"""`make tiny-teacher` and `make tiny-student`: train the embedded models on the standard-library
corpus.

The teacher is a Llama of 6 M parameters under full attention, trained as LLaDA is; the students,
one for each tokenizer, are pre-trained by block diffusion over [x_t ; x_0]: what a student is
before it is distilled. Both by cross-entropy at masked tokens, t uniform. Half of the examples hide
response tokens only, half any token; every masked token weighs the same: 1/t has the same best
model, and more noise on the way to it.
"""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pipelines.tools.tiny_tokenizers import train_student_tokenizer, train_teacher_tokenizer
from shared.aligned.examples import Prepared, Preparer
from shared.data import iter_examples
from shared.data.stdlib_corpus import corpus_origin
from shared.diffusion.noise import generator
from shared.models.checkpoint import resolve
from shared.models.loading import new_model
from shared.settings.config import DataConfig, LengthConfig, ModelShape, StudentConfig
from shared.system.files import refuse_unwritable
from shared.system.hardware import choose_device, choose_precision, hardware_line
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import places_of_draws
from student_train.training.heldout import (
    Predict,
    masked_nll,
    prepare_heldout,
    student_predictor,
    teacher_predictor,
)

TOKENIZERS = {
    "cross": Path(resolve("embedded:student_train/tiny_tokenizer")),
    "shared": Path(resolve("embedded:teacher_cache.teachers/tiny")),
}
"""The folders of the tokenizers: the student's own, and the teacher's."""


@dataclass(frozen=True)
class TinyConfig:
    """Shape and schedule. The defaults, with 4 epochs for the teacher, made the embedded models."""

    shape: ModelShape
    positions: int
    epochs: int
    length: int = 256
    block: int = 32
    tokens_per_batch: int = 4096
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0
    smallest_time: float = 0.02
    precision: str = "auto"

    @property
    def lengths(self) -> LengthConfig:
        return LengthConfig(student=self.length, teacher=self.length, block=self.block)


TEACHER = TinyConfig(
    ModelShape("llama", hidden_size=256, layers=6, heads=4, kv_heads=4, intermediate_size=704),
    positions=1024,
    epochs=4,
)
STUDENT = TinyConfig(StudentConfig(), positions=4096, epochs=2)


def train_tiny_teacher(
    teacher: Path, student_tokenizer: Path, config: TinyConfig = TEACHER
) -> None:
    """Train the teacher, and write it with a model card to `teacher`.

    Tokenizers that lie there and in `student_tokenizer` are kept, since caches and students are
    made for them; where one is missing both are trained too.
    """
    for folder in (teacher, student_tokenizer):
        refuse_unwritable(folder)
    if not all((folder / "tokenizer.json").exists() for folder in (teacher, student_tokenizer)):
        corpus = iter_examples(DataConfig("stdlib:train"))
        texts = ["\n\n".join(m["content"] for m in example.messages) for example in corpus]
        train_student_tokenizer(texts, student_tokenizer)
        train_teacher_tokenizer(texts, teacher)
    tokenizer = Tokenizer.load(teacher)
    torch.manual_seed(config.seed)
    model = new_model(config.shape, tokenizer, tokenizer.special_id("mask"), config.positions)
    about = "The embedded teacher", "A masked-diffusion", "bidirectional attention,"
    train_tiny(model, tokenizer, teacher_predictor(model), teacher, config, about)


def train_tiny_student(tokenizer_folder: Path, out: Path, config: TinyConfig = STUDENT) -> None:
    """Pre-train a student for a tokenizer, and write it with a model card to `out`."""
    refuse_unwritable(out)
    tokenizer = Tokenizer.load(tokenizer_folder)
    torch.manual_seed(config.seed)
    model: Any = new_model(config.shape, tokenizer, tokenizer.special_id("mask"), config.positions)
    model.config.block_size = config.block
    about = "An embedded student, pre-trained", "A block-diffusion", ""
    train_tiny(model, tokenizer, student_predictor(model, config.block), out, config, about)


def train_tiny(
    model: Any,
    tokenizer: Tokenizer,
    predict: Predict,
    out: Path,
    config: TinyConfig,
    about: tuple[str, str, str],
) -> None:
    """Train `model` on the corpus and write it, in bfloat16, with its tokenizer and a card."""
    started = time.monotonic()
    precision = choose_precision(config.precision, choose_device("cpu"))
    config = dataclasses.replace(config, precision=precision)
    preparer = Preparer(tokenizer, None, config.lengths, tokenizer.special_id("mask"))
    examples = preparer.usable(list(iter_examples(DataConfig("stdlib:train"))))
    steps = train_on(model, predict, examples, tokenizer.special_id("mask"), config)
    minutes = (time.monotonic() - started) / 60

    model.to(torch.bfloat16).save_pretrained(out)
    model.float()  # as it is loaded: rounded
    tokenizer.backend.save_pretrained(out)
    heldout = prepare_heldout(
        DataConfig("stdlib:heldout"), config.lengths, tokenizer, tokenizer.special_id("mask"), 4
    )
    scores = masked_nll(model, heldout, predict)
    title, kind, attention = about
    values = dataclasses.asdict(config) | dataclasses.asdict(config.shape)
    rows = "\n".join(f"| {key} | {value} |" for key, value in values.items() if key != "shape")
    tokens = sum(len(example.student_ids) for example in examples)
    (out / "README.md").write_text(f"""# {title}

{kind} language model of {model.num_parameters() / 1e6:.1f} M parameters ({attention}
byte-level BPE of {model.config.vocab_size:,} tokens), made by this project so that the whole
pipeline can be run and tested anywhere; it is no model to build on.

* **Trained on** the functions of the {corpus_origin()}: {len(examples):,} functions, {tokens:,}
  tokens in each of {config.epochs} epochs, {steps:,} steps. One function in sixteen (by a hash of
  its source) is held out.
* **Trained for** {minutes:.0f} minutes ({hardware_line()}), in {precision}; stored in bfloat16.
* **Held-out masked NLL**: {scores["nll"]:.4f} nats a token, {scores["bits_per_byte"]:.4f} bits per
  byte, over {len(heldout.ids)} functions, 4 fixed draws each (masked response tokens; a uniform
  guess has {math.log(model.config.vocab_size):.2f} nats).

| setting | value |
|---|---|
{rows}

The weights are this project's own (Apache-2.0). Its text source is Python's standard library (PSF
licence), of which nothing is stored here but what the weights and the vocabulary retain.
""")
    print(f"held-out masked NLL {scores['nll']:.4f} nats a token")


def train_on(
    model: Any, predict: Predict, examples: list[Prepared], mask_id: int, config: TinyConfig
) -> int:
    """All epochs; how many steps. Muon for the matrices of the layers, AdamW for all else: both
    take steps of one size, and a small model learns faster by both than by AdamW alone.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW(others, betas=(0.9, 0.98), **common),
    ]
    plan = plan_batches(examples, config)

    def rate(step: int) -> float:
        """Warm-up, then a cosine to 0."""
        done = max(0, step - config.warmup) / max(1, len(plan) - config.warmup)
        return min(1.0, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * done))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    model.train()
    for epoch, members in (progress := tqdm(plan, unit="step")):
        batch = noised_batch([examples[i] for i in members], epoch, mask_id, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = predict(batch)  # [masked, vocab]
        loss = F.cross_entropy(logits.float(), batch["gold"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.set_postfix(nll=f"{loss.item():.3f}")
    return len(plan)


def plan_batches(examples: list[Prepared], config: TinyConfig) -> list[tuple[int, list[int]]]:
    """Batches of like lengths, at most `tokens_per_batch` padded tokens each, in random order:
    epoch and members.
    """
    lengths, plan = np.array([len(example.student_ids) for example in examples]), []
    for epoch in range(config.epochs):
        random = generator(config.seed, epoch, "order")
        batches: list[list[int]] = [[]]
        for i in np.argsort(lengths + random.random(len(lengths)), kind="stable")[::-1].tolist():
            longest = lengths[batches[-1][0]] if batches[-1] else 0
            if batches[-1] and longest * (len(batches[-1]) + 1) > config.tokens_per_batch:
                batches.append([])
            batches[-1].append(i)
        plan += [(epoch, batches[i]) for i in random.permutation(len(batches))]
    return plan


def noised_batch(
    members: list[Prepared], epoch: int, mask_id: int, config: TinyConfig
) -> dict[str, Tensor]:
    """Examples with their masks, in the tensors that `Predict` reads; times t are stratified over
    the batch.
    """
    shape = len(members), max(len(example.student_ids) for example in members)
    clean, valid = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    masked = []
    for row, example in enumerate(members):
        length = len(example.student_ids)
        random = generator(config.seed, example.id, epoch, "noise")
        low = config.smallest_time
        t = low + (1 - low) * (row + random.random()) / len(members)
        first = int(example.spans[0, 0]) if random.random() < 0.5 else 0
        places = np.flatnonzero(random.random(length) < t)
        masked.append(places[places >= first])
        clean[row, :length] = torch.from_numpy(example.student_ids).long()
        valid[row, :length] = True
    row = torch.from_numpy(np.repeat(np.arange(len(members)), [len(places) for places in masked]))
    column = torch.from_numpy(np.concatenate(masked))
    noised = clean.clone()
    noised[row, column] = mask_id
    lengths = valid.sum(1).tolist()
    places, place = places_of_draws([[draw] for draw in masked], lengths, config.block)
    return {
        "clean": clean, "noised": noised, "valid": valid, "row": row, "column": column,
        "gold": clean[row, column], "places": places, "place": place,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["teacher"]:
        train_tiny_teacher(TOKENIZERS["shared"], TOKENIZERS["cross"])
    else:
        for name, tokenizer in TOKENIZERS.items():
            train_tiny_student(tokenizer, Path("student_train/tiny_students") / name)
