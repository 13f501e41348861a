"""Which token is the mask: one rule for teachers, students and use."""

from shared.models.checkpoint import Checkpoint
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer

DEFAULT_MASK = "<|mask|>"  # added to a student's tokenizer that names none


def stated_mask(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int | None:
    """The mask id by config.json and tokenizer; None where neither states one (null states none).

    TideError, with both, where they differ, and where it is an end of text or an ordinary word.
    """
    config = checkpoint.config.get("mask_token_id")
    named = getattr(tokenizer.backend, "mask_token_id", None)
    if config is not None and named is not None and int(config) != int(named):
        raise TideError(
            f"config.json of {checkpoint.folder} has mask_token_id {config} "
            f"({_word(tokenizer, int(config))}), its tokenizer names "
            f"{_word(tokenizer, int(named))} ({named}) as its mask token",
            expected="one and the same id",
            fix="correct mask_token_id in config.json, or mask_token in tokenizer_config.json",
        )
    mask = config if config is not None else named
    if mask is None:
        return None
    refuse_as_mask(int(mask), tokenizer, checkpoint, str(checkpoint.folder))
    return int(mask)


def refuse_as_mask(
    mask_id: int, tokenizer: Tokenizer, checkpoint: Checkpoint | None, whose: str
) -> None:
    """TideError where the id cannot be a mask: it ends texts, or is an ordinary token."""
    ends = [] if checkpoint is None else checkpoint.special_ids("eos")
    words = tokenizer.token_bytes
    problem = None
    if mask_id in (*ends, getattr(tokenizer.backend, "eos_token_id", None)):
        problem = "also its end of text"
    elif mask_id < len(words) and mask_id not in tokenizer.added_ids and words[mask_id] != b"":
        problem = "an ordinary token of its tokenizer"
    if problem is not None:
        raise TideError(
            f"the mask id {mask_id} of {whose} is {problem}: {_word(tokenizer, mask_id)}",
            expected="a token of its own for the mask",
            fix="correct the mask id, or use the tokenizer that belongs to the checkpoint",
        )


def student_mask(tokenizer: Tokenizer, asked: str | None) -> tuple[str, int]:
    """The student's mask and its id: the one asked for, else the tokenizer's own, else `<|mask|>`.

    A missing token gets the id one past the vocabulary. TideError where two are named, or it
    is an ordinary word.
    """
    own = tokenizer.backend.mask_token
    if asked is not None and own is not None and asked != own:
        raise TideError(
            f"student_mask_token is {asked!r}, and the tokenizer of {tokenizer.name} names {own!r} "
            "as its mask token",
            expected="one and the same token",
            fix="leave student_mask_token out, or correct mask_token in tokenizer_config.json",
        )
    token = str(asked or own or DEFAULT_MASK)
    if token not in tokenizer.backend.get_vocab():
        return token, len(tokenizer)
    mask_id = tokenizer.special_id("mask", token)
    refuse_as_mask(mask_id, tokenizer, None, tokenizer.name)
    return token, mask_id


def _word(tokenizer: Tokenizer, index: int) -> str:
    inside = index < len(tokenizer)
    return repr(tokenizer.decode([index])) if inside else "no token of its tokenizer"
