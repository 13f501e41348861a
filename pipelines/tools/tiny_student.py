"""`make tiny-student`: pre-train the embedded students, one for each tokenizer, on the standard-library corpus.

Block diffusion over [x_t ; x_0] by cross-entropy alone: what a student is before it is distilled. Half of the examples
hide response tokens only, half any token; every masked token weighs the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.tools.corpus import CorpusTraining, NoisedBatches, prepare_corpus
from pipelines.tools.training import corpus_trainer, heldout_functions
from shared.data.stdlib_corpus import corpus_origin
from shared.models.checkpoint import resolve
from shared.models.loading import new_model
from shared.settings.config import StudentConfig
from shared.system.files import refuse_unwritable
from shared.system.hardware import choose_device, choose_precision, hardware_line
from shared.system.locks import hold
from shared.text.tokenizers import Tokenizer
from student_train.batches.visible_rows import needed_places
from student_train.model.student import masked_hidden
from student_train.training.heldout import masked_nll, student_predictor
from student_train.training.resumable import ResumableTrainer

_POSITIONS = 4096
TOKENIZERS = {
    "cross": Path(resolve("embedded:student_train/tiny_tokenizer")),
    "shared": Path(resolve("embedded:teacher_cache.teachers/tiny")),
}
"""The folders of the tokenizers: the student's own, and the teacher's."""


@dataclass(frozen=True)
class TinyStudentConfig(CorpusTraining):
    """Shape and schedule. The defaults made the embedded students."""

    shape: StudentConfig = field(default_factory=StudentConfig)
    epochs: int = 2


class TinyStudentTrainer(ResumableTrainer):
    """Hugging Face's loop over whole batches; the loss is the mean cross-entropy at masked positions."""

    block = 32

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], **_: Any) -> Tensor:  # type: ignore[override]
        """The batch's loss, in nats a masked token."""
        row, column = (inputs["targets"] >= 0).nonzero(as_tuple=True)
        gold = inputs["targets"][row, column]
        clean = inputs["ids"].clone()
        clean[row, column] = gold
        masked = [column[row == i].numpy() for i in range(len(clean))]
        places, place = needed_places(masked, inputs["valid"].sum(1).tolist(), self.block)
        hidden = masked_hidden(model, inputs["ids"], clean, places, row, place, self.block)
        return F.cross_entropy(model.lm_head(hidden).float(), gold)


def train_tiny_student(
    tokenizer_folder: Path, out: Path, work: Path, config: TinyStudentConfig
) -> None:
    """Pre-train a student for the tokenizer in `tokenizer_folder`, and write it with a model card to `out`.

    Killed at any time and started again, it goes on from the last checkpoint in `work`.
    """
    for folder in (work, out):
        refuse_unwritable(folder)
    config = dataclasses.replace(
        config, precision=choose_precision(config.precision, choose_device("cpu"))
    )
    tokenizer = Tokenizer.load(tokenizer_folder)
    mask_id = tokenizer.special_id("mask")
    train = prepare_corpus(tokenizer, config, "train")
    torch.manual_seed(config.seed)
    model: Any = new_model(config.shape, tokenizer, mask_id, _POSITIONS)
    model.config.block_size = config.block
    dataset = NoisedBatches(train, mask_id, config)
    trainer = corpus_trainer(TinyStudentTrainer, model, dataset, work, config, use_cpu=True)
    trainer.block = config.block
    with hold(work / ".lock", f"the checkpoints in {work}"):
        trainer.train_resuming()
    model.to(torch.bfloat16).save_pretrained(out)
    model.float()
    tokenizer.backend.save_pretrained(out)
    heldout = heldout_functions(tokenizer, config)
    scores = masked_nll(model, heldout, student_predictor(model, config.block))
    about = (len(train), sum(len(e.student_ids) for e in train), len(dataset), len(heldout.ids))
    (out / "README.md").write_text(
        _card(config, model, about, trainer.seconds_trained / 60, scores)
    )
    print(f"held-out masked NLL {scores['nll']:.4f} nats a token")


def _card(
    config: TinyStudentConfig,
    model: Any,
    about: tuple[int, int, int, int],
    minutes: float,
    scores: dict[str, float],
) -> str:
    functions, tokens, steps, heldout = about
    values = {**dataclasses.asdict(config), **dataclasses.asdict(config.shape)}
    settings = "\n".join(
        f"| {k} | {v} |" for k, v in values.items() if k not in ("shape", "checkpoint")
    )
    return f"""# An embedded student, pre-trained

A block-diffusion language model of {model.num_parameters() / 1e6:.1f} M parameters (Qwen3 architecture, byte-level BPE
of {model.config.vocab_size:,} tokens), made by `make tiny-student` with cross-entropy alone. The demo and the ablations
start from it; it is no model to build on.

* **Trained on** the functions of the {corpus_origin()}: {functions:,} functions, {tokens:,} tokens in each of
  {config.epochs} epochs, {steps:,} steps. One function in sixteen (by a hash of its source) is held out.
* **Trained for** {minutes:.0f} minutes ({hardware_line()}), in {config.precision}; stored in bfloat16.
* **Held-out masked NLL**: {scores["nll"]:.4f} nats a token, {scores["bits_per_byte"]:.4f} bits per byte, over {heldout}
  functions, 4 fixed draws each (masked response tokens).

| setting | value |
|---|---|
{settings}

The weights are this project's own (Apache-2.0). Its text source is Python's standard library (PSF licence), of which
nothing is stored here but what the weights and the vocabulary retain.
"""
