"""A student's folder: weights, config, generation config, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from shared.text.tokenizers import Tokenizer


def save_student(
    model: Any, tokenizer: Tokenizer, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """Write everything that transformers needs; `state` holds the weights where the model's own are sharded."""
    model.generation_config = _generation(model, tokenizer)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.backend.save_pretrained(folder)


def _generation(model: Any, tokenizer: Tokenizer) -> GenerationConfig:
    """What ends a response: EOS and the chat template's end of turn, as in sampling."""
    stated = model.config.eos_token_id
    ends = [
        *(stated if isinstance(stated, list) else [stated]),
        tokenizer.backend.eos_token_id,
        *tokenizer.turn_ends,
    ]
    known = list(dict.fromkeys(int(token) for token in ends if token is not None))
    return GenerationConfig(eos_token_id=known, pad_token_id=model.config.pad_token_id)
