"""Do entry, checkpoint, tokenizer and settings belong together? Checked before any weight is read (DESIGN §5)."""

from __future__ import annotations

from shared.models.checkpoint import Checkpoint
from shared.models.masks import refuse_as_mask, stated_mask
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from teacher_cache.teachers.registry import TeacherEntry


def check_teacher(
    config: CacheConfig, entry: TeacherEntry, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    """TideError names the first thing that does not fit."""
    rows = checkpoint.embedding_rows
    _check_sizes(config, entry, checkpoint, tokenizer, rows)
    _check_mask(config.teacher, entry, checkpoint, tokenizer, rows)
    _check_specials(config.teacher, entry, checkpoint, rows)


def _check_sizes(
    config: CacheConfig,
    entry: TeacherEntry,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    rows: int,
) -> None:
    if "topk" in config.targets.signals and config.targets.k > rows:
        raise TideError(
            f"targets.k is {config.targets.k}, but the teacher {config.teacher} has {rows} logits",
            expected=f"k between 1 and {rows}",
            fix=f"lower it: --set targets.k={min(64, rows)}",
        )
    if len(tokenizer) > rows:
        raise TideError(
            f"the teacher's tokenizer has {len(tokenizer)} tokens, its embedding {rows}",
            expected="a tokenizer that fits the checkpoint",
            fix="check that tokenizer and weights belong together",
        )
    if entry.vocabulary is not None and rows != entry.vocabulary:
        raise TideError(
            f"the checkpoint {checkpoint.folder} has {rows} logits, the entry {config.teacher} says {entry.vocabulary}",
            expected="one and the same number",
            fix="choose the teacher that this checkpoint belongs to, or correct vocabulary in your entry",
        )
    limit = int(
        checkpoint.config.get("max_position_embeddings")
        or checkpoint.config.get("max_sequence_length")
        or 0
    )
    needed = config.lengths.student if entry.student_tokens else config.lengths.teacher
    if limit and needed > limit:
        raise TideError(
            f"the teacher would read {needed} tokens, but knows {limit} positions",
            fix=f"lower lengths.{'student' if entry.student_tokens else 'teacher'} to {limit} or less",
        )


def _check_mask(
    name: str, entry: TeacherEntry, checkpoint: Checkpoint, tokenizer: Tokenizer, rows: int
) -> None:
    stated = stated_mask(checkpoint, tokenizer)
    if (stated is not None and stated != entry.mask_id) or not 0 <= entry.mask_id < rows:
        raise TideError(
            f"the checkpoint {checkpoint.folder} has mask id {stated}, the entry {name} says {entry.mask_id}",
            expected=f"one and the same id below {rows}",
            fix="choose the teacher that this checkpoint belongs to, or correct mask_id in your entry",
        )
    refuse_as_mask(entry.mask_id, tokenizer, checkpoint, f"the entry {name}")


def _check_specials(name: str, entry: TeacherEntry, checkpoint: Checkpoint, rows: int) -> None:
    """End and padding ids: inside the embedding, and the entry's where it states them."""
    for role, expected in (("eos", entry.eos_id), ("pad", entry.pad_id)):
        found = checkpoint.special_ids(role)
        outside = [i for i in found if not 0 <= i < rows]
        if outside:
            raise TideError(
                f"the config of {checkpoint.folder} has {role}_token_id {outside[0]}",
                expected=f"an id below {rows}, the rows of the embedding",
                fix="correct config.json, or download the checkpoint again",
            )
        if expected is not None and found and expected not in found:
            raise TideError(
                f"the checkpoint {checkpoint.folder} has {role} id {', '.join(map(str, found))}, "
                f"the entry {name} says {expected}",
                expected="one and the same id",
                fix=f"choose the teacher that this checkpoint belongs to, or correct {role}_id in your entry",
            )
