"""The student: a Qwen3 that denoises blocks. Made from a checkpoint or new, run on [x_t ; x_0] (DESIGN §3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from shared.attention import block_diffusion_batch, repeat_positions
from shared.config import StudentConfig
from shared.errors import TideError
from shared.manifest import Manifest
from shared.tokenizers import Tokenizer
from teacher_cache.teachers.loading import load_model, open_checkpoint


def load_student(settings: StudentConfig, cache: Path, manifest: Manifest) -> tuple[PreTrainedModel, Tokenizer]:
    """The student in float32 and its tokenizer, which must be the one that the cache was built for.

    Without a checkpoint the weights are random (seed torch first) and the tokenizer is the cache's own copy. A
    mask token that the tokenizer lacks is added at the end, where the cache expects it.
    """
    wanted = manifest.fingerprint["student"]
    if settings.checkpoint is None:
        tokenizer = Tokenizer.load(cache / "student_tokenizer")
        model: PreTrainedModel | None = None
    else:
        checkpoint = open_checkpoint(settings.checkpoint)
        tokenizer = Tokenizer.load(checkpoint.folder)
        model = None
        if tokenizer.fingerprint == wanted["tokenizer"]:
            model = load_model(checkpoint, "qwen3", torch.float32)
    if tokenizer.fingerprint != wanted["tokenizer"]:
        raise TideError(
            f"the cache {cache} was built for another student tokenizer "
            f"({wanted['tokenizer'][:12]}…) than that of {tokenizer.name} ({tokenizer.fingerprint[:12]}…)",
            expected="the tokenizer given to `tide cache` as --student-tokenizer",
            fix=f"train a student with that tokenizer, or build a cache with --student-tokenizer {tokenizer.name}",
        )
    mask_id = add_mask_token(tokenizer, wanted["mask_token"])
    if mask_id != wanted["mask_id"]:
        raise TideError(
            f"the student's mask token {wanted['mask_token']!r} has id {mask_id}",
            expected=f"id {wanted['mask_id']}, as in the cache",
            fix="use the student checkpoint that the cache was built for",
        )
    if model is None:
        model = Qwen3ForCausalLM(_new_config(settings, tokenizer, mask_id))
    width = embedding_rows(model)
    if mask_id >= width:
        raise TideError(
            f"the mask id {mask_id} lies outside the student's embedding of {width} rows",
            expected="an embedding with a row for the mask token",
            fix="resize the checkpoint's embedding before training",
        )
    model.config.mask_token_id = mask_id
    if model.config.tie_word_embeddings:
        model._keys_to_ignore_on_save = {"lm_head.weight"}  # no alarm about it when a checkpoint is resumed
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


def embedding_rows(model: Any) -> int:
    """How many ids the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def add_mask_token(tokenizer: Tokenizer, token: str) -> int:
    """Id of the mask token, which is added to the tokenizer where it is missing."""
    if token not in tokenizer.backend.get_vocab():
        tokenizer.backend.add_special_tokens({"mask_token": token})
    return tokenizer.special_id("mask", token)


def _new_config(settings: StudentConfig, tokenizer: Tokenizer, mask_id: int) -> Qwen3Config:
    more: dict[str, Any] = {"mask_token_id": mask_id, "attn_implementation": "sdpa"}
    return Qwen3Config(
        vocab_size=max(len(tokenizer), mask_id + 1),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.special_id("eos"),
        pad_token_id=tokenizer.special_id("pad"),
        **more,
    )


def masked_logits(
    model: Any,
    noised: Int[Tensor, "batch length"],
    clean: Int[Tensor, "batch length"],
    valid: Bool[Tensor, "batch length"],
    row: Int[Tensor, " n"],
    column: Int[Tensor, " n"],
    block: int,
) -> Float[Tensor, "n vocab"]:
    """Logits at the masked positions (row, column) of x_t, and at no other: the LM head runs on gathered rows."""
    batch, length = noised.shape
    hidden = model.model(
        input_ids=torch.cat([noised, clean], dim=1),
        attention_mask=block_diffusion_batch(valid, block),
        position_ids=repeat_positions(length, batch, noised.device),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[row, column])
