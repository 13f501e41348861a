"""A trained student in use: loaded from a folder, asked, and stopped.

Sampling goes from block to block, each from all masks to tokens in a few steps (BD3LM, LLaDA).
Keys and values of everything finished are cached. Blocks are counted from the prompt's beginning,
as in training; a batch of unequal prompts gives what each gives alone.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.models.checkpoint import open_checkpoint, resolve, stated_mask
from shared.models.loading import architecture_of, load_model
from shared.system.files import TideError
from shared.system.hardware import choose_device, choose_precision, torch_dtype
from shared.text.located import Message
from shared.text.tokenizers import Tokenizer
from student_train.model import STUDENTS
from student_train.using.decoding import Decoding, Row
from student_train.using.settings import Ids, SampleConfig, Special


@dataclass(frozen=True)
class LoadedStudent:
    model: Any
    tokenizer: Tokenizer
    special: Special
    block: int | None  # of its training; None where its config does not say

    def choose_block(self, asked: int | None) -> int:
        """The block to sample with: the one asked for, else that of the training, else 32."""
        if asked is None:
            return self.block or 32
        if self.block is not None and asked != self.block:
            words = f"blocks of {asked} are sampled, where training had blocks of {self.block}"
            print(words, file=sys.stderr)
        return asked

    def answer(
        self, chats: Sequence[Sequence[Message]], config: SampleConfig, batch: int
    ) -> Iterator[str]:
        """The response to each chat, in order, `batch` of them at a time."""
        for start in range(0, len(chats), batch):
            prompts = [self.tokenizer.encode_prompt(chat) for chat in chats[start : start + batch]]
            for ids in sample(self.model, prompts, self.special, config):
                yield self.tokenizer.text(ids)


def load_for_use(place: str, device: str = "auto") -> LoadedStudent:
    """A student from a folder or a hub id, in bfloat16 on an accelerator that has it, else float32.
    TideError where it is no student, or nothing names its mask token.
    """
    checkpoint = open_checkpoint(resolve(place))
    where = choose_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch_dtype(choose_precision("auto", where))
    model: Any = load_model(checkpoint, architecture_of(checkpoint, STUDENTS), dtype)
    tokenizer = Tokenizer.load(checkpoint.folder)
    mask = stated_mask(checkpoint, tokenizer)
    if mask is None:
        what = f"neither the config nor the tokenizer of {place} names a mask token"
        raise TideError(what, fix="give a student that `tide train` wrote, as runs/NAME/model")
    eos = tokenizer.special_id("eos")
    ends = {*checkpoint.special_ids("eos"), *tokenizer.turn_ends} - {eos}
    special = Special(mask, eos, tuple(sorted(ends)), len(tokenizer))
    block = checkpoint.config.get("block_size")
    return LoadedStudent(model.to(where).eval(), tokenizer, special, block)


def sample(
    model: Any, prompts: Sequence[Ids], special: Special, config: SampleConfig, stop: Any = None
) -> list[list[int]]:
    """The response to each prompt, less its end. ValueError where a prompt is empty."""
    *_, (tokens, _) = sample_steps(model, prompts, special, config, stop)
    return [until_eos(row, special.eos) for row in tokens]


def until_eos(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos)] if eos in row else row


@torch.no_grad()
def sample_steps(
    model: Any, prompts: Sequence[Ids], special: Special, config: SampleConfig, stop: Any = None
) -> Iterator[tuple[list[list[int]], int]]:
    """The new tokens after each step (those still masked are the mask's id), and the passes so far.
    A row leaves the batch with an EOS in a finished block, with as many tokens as there may be, or
    where `stop(i, made)` says so, given its place in the batch and its new tokens.
    """
    rows = [Row(prompt, config) for prompt in prompts]
    decoding = Decoding(model, special, config)
    decoding.join(rows)
    while decoding.rows:
        for _ in decoding.next_block():
            yield [row.state for row in rows], decoding.passes
        going = []
        for i, row in enumerate(rows):
            if row in decoding.rows:
                ended = special.eos in row.made or len(row.made) >= config.new_tokens
                going.append(not (ended or (stop and stop(i, row.made))))
        decoding.keep(going)


@dataclass(frozen=True)
class Stops:
    """Texts that end a response, and ids: of stops that are special tokens, which no text shows."""

    student: LoadedStudent
    texts: tuple[str, ...]
    ids: frozenset[int]

    @classmethod
    def of(cls, student: LoadedStudent, stops: str | Sequence[str] | None) -> "Stops":
        """Of one stop or several; empty ones count for nothing."""
        wanted = [stops] if isinstance(stops, str) else [stop for stop in stops or [] if stop]
        special = student.tokenizer.backend.get_added_vocab()
        ids = frozenset(int(special[stop]) for stop in wanted if stop in special)
        return cls(student, tuple(stop for stop in wanted if stop), ids)

    def cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of `ids` up to where the first stop begins, and whether there is one. The first
        to be complete counts (of several that end together, the longest), as in a growing text.
        """
        ends = [i for i, token in enumerate(ids) if token in self.ids]
        text = self.student.tokenizer.text(ids[: ends[0]] if ends else ids)
        places = [(at + len(stop), at) for stop in self.texts if (at := text.find(stop)) >= 0]
        return text[: min(places)[1]] if places else text, bool(ends or places)

    def may_begin(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop."""
        longest = max(map(len, self.texts), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.texts):
                return size
        return 0
