"""`make tiny-teacher`: train the embedded masked-diffusion teacher on the standard-library corpus.

A Llama of 6 M parameters under full attention, trained as LLaDA is: t uniform, each token masked with probability t.
Half of the examples hide response tokens only, half any token. Every masked token weighs the same: 1/t has the same
best model, and more noise on the way to it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.tools.corpus import CorpusTraining, NoisedBatches, corpus_texts, prepare_corpus
from pipelines.tools.tiny_tokenizers import train_student_tokenizer, train_teacher_tokenizer
from pipelines.tools.training import corpus_trainer, heldout_functions
from shared.aligned.examples import Prepared
from shared.data.stdlib_corpus import corpus_origin
from shared.diffusion.attention import full
from shared.models.loading import new_model
from shared.settings.config import ModelShape
from shared.system.files import refuse_unwritable
from shared.system.hardware import choose_device, choose_precision, hardware_line
from shared.system.locks import hold
from shared.text.tokenizers import Tokenizer
from student_train.training.heldout import masked_nll, teacher_predictor
from student_train.training.resumable import ResumableTrainer

_POSITIONS = 1024
_SHAPE = ModelShape("llama", hidden_size=256, layers=6, heads=4, kv_heads=4, intermediate_size=704)


@dataclass(frozen=True)
class TinyTeacherConfig(CorpusTraining):
    """Shape and schedule. The defaults made the embedded teacher."""

    shape: ModelShape = _SHAPE
    epochs: int = 4


def full_attention_logits(model: Any, ids: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """Logits at the chosen positions only, [rows, vocabulary], under full attention."""
    hidden = model.model(
        input_ids=ids, attention_mask=full(valid), use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[rows])


class TinyTeacherTrainer(ResumableTrainer):
    """Hugging Face's loop over whole batches; the loss is the mean cross-entropy at masked positions."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], **_: Any) -> Tensor:  # type: ignore[override]
        """The batch's loss, in nats a masked token."""
        rows = inputs["targets"] >= 0
        logits = full_attention_logits(model, inputs["ids"], inputs["valid"], rows).float()
        return F.cross_entropy(logits, inputs["targets"][rows])


def train_tiny_teacher(
    teacher: Path, student_tokenizer: Path, work: Path, config: TinyTeacherConfig
) -> None:
    """Train the teacher, and write it with a model card to `teacher`. Tokenizers that lie there and in
    `student_tokenizer` are kept (caches and students are made for them); where there are none they are trained too.

    Killed at any time and started again, it goes on from the last checkpoint in `work`.
    """
    for folder in (work, teacher):
        refuse_unwritable(folder)
    config = dataclasses.replace(
        config, precision=choose_precision(config.precision, choose_device())
    )
    started = time.monotonic()
    if not (work / "tokenizer" / "tokenizer.json").exists():
        _settle_tokenizers(teacher, student_tokenizer, work)
    tokenizer = Tokenizer.load(work / "tokenizer")
    train = prepare_corpus(tokenizer, config, "train")
    torch.manual_seed(config.seed)
    model: Any = new_model(config.shape, tokenizer, tokenizer.special_id("mask"), _POSITIONS)
    dataset = NoisedBatches(train, tokenizer.special_id("mask"), config)
    trainer = corpus_trainer(TinyTeacherTrainer, model, dataset, work, config)
    with hold(work / ".lock", f"the checkpoints in {work}"):
        trainer.train_resuming()
    minutes = trainer.seconds_trained / 60
    rounded = model
    rounded.to(torch.bfloat16)
    rounded.save_pretrained(teacher)
    rounded.float()
    heldout = heldout_functions(tokenizer, config)
    nll = masked_nll(rounded, heldout, teacher_predictor(rounded))["nll"]
    for source, target in (
        (work / "tokenizer", teacher),
        (work / "student-tokenizer", student_tokenizer),
    ):
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            shutil.copy(file, target / file.name)
    (teacher / "README.md").write_text(
        _card(config, model, train, len(heldout.ids), len(dataset), minutes, nll)
    )
    print(
        f"held-out masked NLL {nll:.4f} nats a token; {time.monotonic() - started:.0f} s in this run"
    )


def _settle_tokenizers(teacher: Path, student_tokenizer: Path, work: Path) -> None:
    if (teacher / "tokenizer.json").exists() and (student_tokenizer / "tokenizer.json").exists():
        Tokenizer.load(student_tokenizer).backend.save_pretrained(work / "student-tokenizer")
        Tokenizer.load(teacher).backend.save_pretrained(work / "tokenizer")
        return
    texts = list(corpus_texts("train"))
    train_student_tokenizer(texts, work / "student-tokenizer")
    train_teacher_tokenizer(texts, work / "tokenizer")


def _card(
    config: TinyTeacherConfig,
    model: Any,
    train: list[Prepared],
    heldout: int,
    steps: int,
    minutes: float,
    nll: float,
) -> str:
    tokens = sum(len(e.student_ids) for e in train)
    values = {**dataclasses.asdict(config.shape), **dataclasses.asdict(config)}
    settings = "\n".join(f"| {k} | {v} |" for k, v in values.items() if k != "shape")
    unigram = math.log(model.config.vocab_size)
    return f"""# The embedded teacher

A masked-diffusion language model of {model.num_parameters() / 1e6:.1f} M parameters (Llama architecture, bidirectional
attention, byte-level BPE of {model.config.vocab_size:,} tokens), made by `make tiny-teacher`. It exists so that the
whole pipeline can be run and tested anywhere; it is no model to build on.

* **Trained on** the functions of the {corpus_origin()}: {len(train):,} functions, {tokens:,} tokens in each of
  {config.epochs} epochs, {steps:,} steps. One function in sixteen (by a hash of its source) is held out.
* **Trained for** {minutes:.0f} minutes ({hardware_line()}), in {config.precision}; stored in bfloat16.
* **Held-out masked NLL**: {nll:.4f} nats a token over {heldout} functions, 4 fixed draws each
  (masked response tokens; a uniform guess has {unigram:.2f}).

| setting | value |
|---|---|
{settings}

The weights are this project's own (Apache-2.0). Its text source is Python's standard library (PSF licence), of which
nothing is stored here but what the weights and the vocabulary retain.
"""
