"""A trained student, ready to answer: model, tokenizer and special ids from one folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.models.masks import stated_mask
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision, torch_dtype
from shared.text.templates import Message
from shared.text.tokenizers import Tokenizer
from student_train.model.student import student_architecture
from student_train.using.sampler import sample
from student_train.using.settings import SampleConfig, Special

_BLOCK = 32


@dataclass(frozen=True)
class LoadedStudent:
    """What `load_for_use` returns."""

    model: Any
    tokenizer: Tokenizer
    special: Special
    block: int | None
    """Of its block diffusion in training; None where its config does not say."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the response begins, as in training (an empty think block
        included).
        """
        return self.tokenizer.encode_prompt(messages)

    def text(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.backend.decode(list(ids), skip_special_tokens=True))

    def answer(
        self, chats: Sequence[Sequence[Message]], config: SampleConfig, batch: int
    ) -> Iterator[str]:
        """The response to each chat, in order, `batch` of them at a time."""
        for start in range(0, len(chats), batch):
            prompts = [self.prompt(messages) for messages in chats[start : start + batch]]
            yield from (self.text(ids) for ids in sample(self.model, prompts, self.special, config))


def load_for_use(place: str, device: str = "auto") -> LoadedStudent:
    """A student from a folder or a hub id.

    In bfloat16 on an accelerator that has it, else in float32: on every CPU, so that all answer
    alike.

    TideError where it is no student, or nothing names its mask token.
    """
    checkpoint = open_checkpoint(resolve(place))
    where = choose_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch_dtype(choose_precision("auto", where))
    model: Any = load_model(checkpoint, student_architecture(checkpoint), dtype)
    model = model.to(where).eval()
    tokenizer = Tokenizer.load(checkpoint.folder)
    mask = stated_mask(checkpoint, tokenizer)
    if mask is None:
        raise TideError(
            f"neither the config nor the tokenizer of {place} names a mask token",
            expected="mask_token_id in config.json, as `tide train` writes it",
            fix="give a student, such as runs/NAME/model",
        )
    eos, pad = tokenizer.special_id("eos"), tokenizer.backend.pad_token_id
    ends = {*checkpoint.special_ids("eos"), *tokenizer.turn_ends} - {eos}
    special = Special(
        mask, eos if pad is None else int(pad), eos, tuple(sorted(ends)), len(tokenizer)
    )
    return LoadedStudent(model, tokenizer, special, checkpoint.config.get("block_size"))


def choose_block(asked: int | None, student: LoadedStudent) -> int:
    """The block to sample with: the one asked for, else the student's own, else 32.

    Says so on stderr where the student was trained with another.
    """
    if asked is not None and student.block is not None and asked != student.block:
        print(
            f"the student was trained with blocks of {student.block} and is sampled with {asked}",
            file=sys.stderr,
        )
    return asked if asked is not None else student.block or _BLOCK
