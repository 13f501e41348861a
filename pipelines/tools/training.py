"""What training an embedded model has in common: settings, the loop over whole batches, the held-out functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from pipelines.tools.corpus import CorpusTraining, NoisedBatches
from pipelines.tools.optimizer import MuonWithAdamW
from shared.settings.config import DataConfig, LengthConfig
from shared.text.tokenizers import Tokenizer
from student_train.training.heldout import HeldOut, prepare_heldout
from student_train.training.resumable import ResumableTrainer, training_arguments

T = TypeVar("T", bound=ResumableTrainer)


def corpus_trainer(
    kind: type[T],
    model: nn.Module,
    dataset: NoisedBatches,
    work: Path,
    config: CorpusTraining,
    **arguments: Any,
) -> T:
    """A trainer whose checkpoints lie in `work`; `arguments` go to `training_arguments`."""
    return kind(
        model=model,
        args=training_arguments(
            work / "checkpoints",
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            warmup_steps=100,
            lr_scheduler_type="cosine",
            bf16=config.precision == "bfloat16",
            seed=config.seed,
            save_steps=250,
            logging_steps=25,
            **arguments,
        ),
        train_dataset=dataset,
        data_collator=lambda batches: batches[0],
        optimizers=(
            MuonWithAdamW(model, config.learning_rate, config.weight_decay, (0.9, 0.98)),
            None,
        ),
    )


def heldout_functions(tokenizer: Tokenizer, config: CorpusTraining) -> HeldOut:
    """All held-out functions, four draws each."""
    lengths = LengthConfig(config.length, config.length, config.block)
    return prepare_heldout(
        DataConfig("stdlib:heldout"), lengths, tokenizer, tokenizer.special_id("mask"), 4
    )
