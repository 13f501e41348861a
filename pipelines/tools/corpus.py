"""What the embedded models are trained on: the functions of the standard library, noised batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.aligned.examples import Prepared, Preparer
from shared.data import iter_examples
from shared.diffusion.noise import generator
from shared.settings.config import DataConfig, LengthConfig
from shared.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class CorpusTraining:
    """How an embedded model is trained on the corpus."""

    length: int = 256
    block: int = 32
    tokens_per_batch: int = 4096
    epochs: int = 1
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    seed: int = 0
    smallest_time: float = 0.02
    precision: str = "auto"
    """bfloat16 where this machine has it in hardware, float32 elsewhere."""


def corpus_texts(split: str) -> Iterator[str]:
    """Prompt and answer of every function in the split, as plain text."""
    for example in iter_examples(DataConfig(source=f"stdlib:{split}")):
        yield "\n\n".join(message["content"] for message in example.messages)


def prepare_corpus(tokenizer: Tokenizer, config: CorpusTraining, split: str) -> list[Prepared]:
    """The split's functions as token ids, cut to the config's length."""
    lengths = LengthConfig(student=config.length, teacher=config.length, block=config.block)
    preparer = Preparer(tokenizer, None, lengths, tokenizer.special_id("mask"))
    return preparer.usable(list(iter_examples(DataConfig(source=f"stdlib:{split}"))))


class NoisedBatches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Every item is one whole batch of like lengths; a pure function of (seed, index), so training can resume."""

    def __init__(self, examples: list[Prepared], mask_id: int, config: CorpusTraining) -> None:
        self._examples, self._mask_id, self._config = examples, mask_id, config
        self._plan = [p for epoch in range(config.epochs) for p in self._plan_epoch(epoch)]

    def _plan_epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        stream = generator(self._config.seed, epoch, "order")
        lengths = np.array([len(e.student_ids) for e in self._examples])
        order = np.argsort(lengths + stream.random(len(lengths)), kind="stable")
        batches: list[list[int]] = [[]]
        for i in order[::-1]:
            longest = lengths[batches[-1][0]] if batches[-1] else 0
            if batches[-1] and longest * (len(batches[-1]) + 1) > self._config.tokens_per_batch:
                batches.append([])
            batches[-1].append(int(i))
        return [(epoch, batches[i]) for i in stream.permutation(len(batches))]

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, members = self._plan[index]
        longest = max(len(self._examples[i].student_ids) for i in members)
        shape = (len(members), longest)
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        valid = torch.zeros(shape, dtype=torch.bool)
        for row, i in enumerate(members):
            example = self._examples[i]
            n = len(example.student_ids)
            stream = generator(self._config.seed, example.id, epoch, "noise")
            low = self._config.smallest_time
            t = low + (1 - low) * ((row + stream.random()) / len(members))
            first = int(example.spans[0, 0]) if stream.random() < 0.5 else 0
            masked = torch.from_numpy(stream.random(n) < t)
            masked[:first] = False
            clean = torch.from_numpy(example.student_ids).long()
            ids[row, :n] = torch.where(masked, self._mask_id, clean)
            labels[row, :n] = torch.where(masked, clean, -100)
            valid[row, :n] = True
        return {"ids": ids, "targets": labels, "valid": valid}
