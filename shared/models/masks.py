"""Which token is the mask: one rule for teachers, students and use. What config and tokenizer state must agree."""

from __future__ import annotations

from shared.models.checkpoint import Checkpoint
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer

DEFAULT_MASK = "<|mask|>"
"""Added to a student's tokenizer that names none."""


def stated_mask(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int | None:
    """The mask id by config.json and tokenizer; None where neither states one (null states none).

    TideError, with both, where they differ, and where it is an end of text or an ordinary word.
    """
    config, named = (
        checkpoint.config.get("mask_token_id"),
        getattr(tokenizer.backend, "mask_token_id", None),
    )
    if config is not None and named is not None and int(config) != int(named):
        raise TideError(
            f"config.json of {checkpoint.folder} has mask_token_id {config} ({_word(tokenizer, int(config))}), "
            f"its tokenizer names {_word(tokenizer, int(named))} ({named}) as its mask token",
            expected="one and the same id",
            fix="correct mask_token_id in config.json, or mask_token in tokenizer_config.json",
        )
    found = config if config is not None else named
    if found is None:
        return None
    refuse_as_mask(int(found), tokenizer, checkpoint, str(checkpoint.folder))
    return int(found)


def refuse_as_mask(
    mask_id: int, tokenizer: Tokenizer, checkpoint: Checkpoint | None, whose: str
) -> None:
    """TideError where the id cannot be a mask: it ends texts, or is an ordinary token."""
    ends = [] if checkpoint is None else checkpoint.special_ids("eos")
    own = getattr(tokenizer.backend, "eos_token_id", None)
    if mask_id in ends or mask_id == own:
        raise TideError(
            f"the mask id {mask_id} of {whose} is also its end of text: {_word(tokenizer, mask_id)}",
            expected="a token of its own for the mask",
            fix="correct the mask id, or use the tokenizer that belongs to the checkpoint",
        )
    ordinary = mask_id < len(tokenizer.token_bytes) and mask_id not in tokenizer.added_ids
    if ordinary and tokenizer.token_bytes[mask_id] != b"":
        raise TideError(
            f"the mask id {mask_id} of {whose} is an ordinary token of its tokenizer: {_word(tokenizer, mask_id)}",
            expected="a token of its own for the mask",
            fix="correct the mask id, or use the tokenizer that belongs to the checkpoint",
        )


def student_mask(tokenizer: Tokenizer, asked: str | None) -> tuple[str, int]:
    """The student's mask token and its id: the one asked for, else the tokenizer's own, else `<|mask|>`, which is
    added one past the vocabulary where it is missing. TideError where two are named, or it is an ordinary word.
    """
    own = tokenizer.backend.mask_token
    if asked is not None and own is not None and asked != own:
        raise TideError(
            f"student_mask_token is {asked!r}, and the tokenizer of {tokenizer.name} names {own!r} as its mask token",
            expected="one and the same token",
            fix="leave student_mask_token out, or correct mask_token in tokenizer_config.json",
        )
    token = str(asked or own or DEFAULT_MASK)
    if token not in tokenizer.backend.get_vocab():
        return token, len(tokenizer)
    found = tokenizer.special_id("mask", token)
    refuse_as_mask(found, tokenizer, None, tokenizer.name)
    return token, found


def _word(tokenizer: Tokenizer, index: int) -> str:
    return (
        repr(tokenizer.decode([index])) if index < len(tokenizer) else "no token of its tokenizer"
    )
