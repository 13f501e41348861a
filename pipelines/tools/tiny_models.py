"""`make tiny-teacher` and `make tiny-student`: train the embedded models, and their tokenizers, on
the standard-library corpus.

The teacher is a Llama of 6 M parameters under full attention, trained as LLaDA is; the students,
two for each tokenizer, by block diffusion over [x_t ; x_0]. All by cross-entropy at masked tokens,
t uniform; half of the examples hide response tokens only, half any token. Every masked token weighs
the same: 1/t has the same best model, and more noise on the way to it.

The teacher's tokenizer (4,096 tokens) also serves the student that shares it; the other student's
(2,048 tokens, single digits) cuts the same text differently, as Qwen's does LLaDA's.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from shared.aligned.examples import Prepared, Preparer
from shared.data.reading import iter_examples
from shared.data.stdlib_corpus import corpus_origin
from shared.diffusion import generator
from shared.models.checkpoint import resolve
from shared.models.loading import new_model
from shared.settings.config import DataConfig, LengthConfig, ModelShape, StudentConfig
from shared.system.files import refuse_unwritable
from shared.system.hardware import choose_device, choose_precision, hardware_line
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import places_of_draws
from student_train.training import heldout

# The folders of the tokenizers: the student's own, and the teacher's.
TOKENIZERS = {
    "cross": Path(resolve("embedded:student_train/tiny_tokenizer")),
    "shared": Path(resolve("embedded:teacher_cache.teachers/tiny")),
}
HEADER_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words with a leading space, numbers, runs of punctuation, indentation: as GPT-4's, cut shorter.
TEACHER_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n\s*|\s+(?!\S)|\s+"

LONG, SHORT = (LengthConfig(student=n, teacher=n, block=32) for n in (256, 128))


@dataclass(frozen=True)
class TinyConfig:
    """Shape and schedule. The defaults, with 4 epochs for the teacher, made the embedded models."""

    shape: ModelShape
    positions: int
    epochs: int
    source: str = "stdlib:train"
    limit: int | None = None  # of functions
    lengths: LengthConfig = LONG
    tokens_per_batch: int = 4096
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0
    smallest_time: float = 0.02
    precision: str = "auto"


LLAMA = ModelShape("llama", 256, layers=6, heads=4, kv_heads=4, intermediate_size=704)
TEACHER = TinyConfig(LLAMA, positions=1024, epochs=4)
STUDENT = TinyConfig(StudentConfig(), positions=4096, epochs=2)
# One who knows much less than the teacher: half of the modules, and those briefly.
HALF = replace(STUDENT, epochs=1, source="stdlib:half-a", limit=4400, lengths=SHORT, warmup=50,
               tokens_per_batch=2048)  # fmt: skip


def train_tokenizers(teacher: Path, student: Path) -> None:
    """Write both tokenizers: byte-level BPE, the special tokens last."""
    corpus = iter_examples(DataConfig("stdlib:train"))
    texts = ["\n\n".join(m["content"] for m in example.messages) for example in corpus]
    words = pre_tokenizers.Split(Regex(TEACHER_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    as_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    chatml = ["<|im_start|>", "<|im_end|>"]
    for folder, size, steps, marks, eos, template in (
        (teacher, 4096, [words, as_bytes], headers, "<|endoftext|>", HEADER_TEMPLATE),
        (student, 2048, [digits, as_words], chatml, "<|im_end|>", CHATML_TEMPLATE),
    ):
        special = ["<|endoftext|>", *marks, "<|mask|>"]
        raw: Any = RawTokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
        learnt, start = size - len(special), pre_tokenizers.ByteLevel.alphabet()
        how: Any = {"vocab_size": learnt, "initial_alphabet": start, "show_progress": False}
        raw.train_from_iterator(texts, trainers.BpeTrainer(**how))
        raw.add_special_tokens(special)
        named = {"eos_token": eos, "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=raw, **named)
        fast.chat_template = template
        fast.save_pretrained(folder)


def train_tiny(tokenizer_folder: Path, out: Path, config: TinyConfig) -> None:
    """Train a teacher or a student on the corpus, and write it with its tokenizer and a card."""
    refuse_unwritable(out)
    started = time.monotonic()
    config = replace(config, precision=choose_precision(config.precision, choose_device("cpu")))
    tokenizer = Tokenizer.load(tokenizer_folder)
    mask_id = tokenizer.special_id("mask")
    torch.manual_seed(config.seed)
    model: Any = new_model(config.shape, tokenizer, mask_id, config.positions)
    if isinstance(config.shape, StudentConfig):
        model.config.block_size = config.lengths.block
        predict = heldout.student_predictor(model, config.lengths.block)
        title, kind = "An embedded student, pre-trained", "block-diffusion"
    else:
        predict = heldout.teacher_predictor(model)
        title, kind = "The embedded teacher", "masked-diffusion"
    preparer = Preparer(tokenizer, None, config.lengths, mask_id)
    corpus = iter_examples(DataConfig(config.source, limit=config.limit))
    examples = preparer.usable(list(corpus))
    steps = train_on(model, predict, examples, mask_id, config)
    minutes = (time.monotonic() - started) / 60

    model.to(torch.bfloat16).save_pretrained(out)
    model.float()  # as it is loaded: rounded
    tokenizer.save(out)
    functions = DataConfig("stdlib:heldout")
    unseen = heldout.prepare_heldout(functions, config.lengths, tokenizer, mask_id, 4)
    scores = heldout.masked_nll(model, unseen, predict)
    tokens = sum(len(example.student_ids) for example in examples)
    (out / "README.md").write_text(f"""# {title}

A {kind} language model of {model.num_parameters() / 1e6:.1f} M parameters (byte-level BPE of
{model.config.vocab_size:,} tokens), made by this project so that the whole pipeline can be run and
tested anywhere; it is no model to build on.

* **Trained on** functions of the {corpus_origin()}: {len(examples):,} functions, {tokens:,} tokens
  an epoch, {steps:,} steps, in {minutes:.0f} minutes ({hardware_line()}); stored in bfloat16.
* **Held-out masked NLL**: {scores["nll"]:.4f} nats a token, {scores["bits_per_byte"]:.4f} bits per
  byte, over {len(unseen.ids)} functions, 4 fixed draws each (masked response tokens; a uniform
  guess has {math.log(model.config.vocab_size):.2f} nats).
* **Settings**: `{config}`

The weights are this project's own (Apache-2.0). Its text source is Python's standard library (PSF
licence), of which nothing is stored here but what the weights and the vocabulary retain.
""")
    print(f"held-out masked NLL {scores['nll']:.4f} nats a token")


def train_on(
    model: Any, predict: heldout.Predict, examples: list[Prepared], mask_id: int, config: TinyConfig
) -> int:
    """All epochs; how many steps. A small model learns faster by both optimizers than by AdamW."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(parameter)
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW(others, betas=(0.9, 0.98), **common),
    ]

    # Batches of like lengths, at most `tokens_per_batch` padded tokens each, in random order.
    lengths, plan = np.array([len(example.student_ids) for example in examples]), []
    for epoch in range(config.epochs):
        random = generator(config.seed, epoch, "order")
        batches: list[list[int]] = [[]]
        for i in np.argsort(lengths + random.random(len(lengths)), kind="stable")[::-1].tolist():
            batch = batches[-1]
            if batch and lengths[batch[0]] * (len(batch) + 1) > config.tokens_per_batch:
                batches.append([])
            batches[-1].append(i)
        plan += [(epoch, batches[i]) for i in random.permutation(len(batches))]

    warmup, steps = config.warmup, len(plan)
    schedules = [get_cosine_schedule_with_warmup(o, warmup, steps) for o in optimizers]
    model.train()
    for epoch, members in (progress := tqdm(plan, unit="step")):
        tensors = noised_batch([examples[i] for i in members], epoch, mask_id, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = predict(tensors)  # [masked, vocab]
        loss = torch.nn.functional.cross_entropy(logits.float(), tensors["gold"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.set_postfix(nll=f"{loss.item():.3f}")
    return len(plan)


def noised_batch(
    members: list[Prepared], epoch: int, mask_id: int, config: TinyConfig
) -> dict[str, torch.Tensor]:
    """Examples with masks, as tensors that `Predict` reads; times t are stratified over them."""
    ids = [torch.from_numpy(example.student_ids).long() for example in members]
    clean = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths, masked = [len(row) for row in ids], []
    for i, example in enumerate(members):
        random = generator(config.seed, example.id, epoch, "noise")
        low = config.smallest_time
        t = low + (1 - low) * (i + random.random()) / len(members)
        first = int(example.spans[0, 0]) if random.random() < 0.5 else 0
        hidden = np.flatnonzero(random.random(lengths[i]) < t)
        masked.append(hidden[hidden >= first])
    row = torch.from_numpy(np.repeat(np.arange(len(members)), [len(hidden) for hidden in masked]))
    column = torch.from_numpy(np.concatenate(masked))
    noised = clean.clone()
    noised[row, column] = mask_id
    valid = torch.arange(clean.shape[1]) < torch.tensor(lengths)[:, None]
    places, place = places_of_draws([[draw] for draw in masked], lengths, config.lengths.block)
    return {
        "clean": clean, "noised": noised, "valid": valid, "row": row, "column": column,
        "gold": clean[row, column], "places": places, "place": place,
    }  # fmt: skip


if __name__ == "__main__":
    own, shared = TOKENIZERS.values()
    if sys.argv[1:] == ["teacher"]:
        # Tokenizers that are there are kept: caches and students are made for them.
        if not all((folder / "tokenizer.json").exists() for folder in (shared, own)):
            train_tokenizers(shared, own)
        train_tiny(shared, shared, TEACHER)
    else:
        for name, folder in TOKENIZERS.items():
            for kind, config in ((name, STUDENT), (f"half-{name}", HALF)):
                train_tiny(folder, Path("student_train/tiny_students") / kind, config)
