"""The student: a Qwen3 or Llama that denoises blocks. From a checkpoint or new, run on [x_t ; x_0] (DESIGN §3)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from shared.cache.manifest import Manifest
from shared.diffusion.attention import block_diffusion_places
from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve
from shared.models.loading import load_model, new_model
from shared.models.masks import stated_mask
from shared.settings.config import StudentConfig
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from student_train.model.attention import FLEX, flex_mask, register_flex

_POSITIONS = 4096
"""That a new student knows."""


def load_student(
    settings: StudentConfig, cache: Path, manifest: Manifest
) -> tuple[PreTrainedModel, Tokenizer]:
    """The student in float32 and its tokenizer, which must be the one that the cache was built for.

    Without a checkpoint the weights are random (seed torch first) and the tokenizer is the cache's own copy. A
    mask token that the tokenizer lacks is added at the end, where the cache expects it.
    """
    checkpoint = (
        None if settings.checkpoint is None else open_checkpoint(resolve(settings.checkpoint))
    )
    tokenizer = Tokenizer.load(
        cache / "student_tokenizer" if checkpoint is None else checkpoint.folder
    )
    wanted = manifest.fingerprint.student
    if tokenizer.fingerprint != wanted.tokenizer:
        raise TideError(
            f"the cache {cache} was built for another student tokenizer "
            f"({wanted.tokenizer[:12]}…) than that of {tokenizer.name} ({tokenizer.fingerprint[:12]}…)",
            expected="the tokenizer given to `tide cache` as --student-tokenizer",
            fix=f"train a student with that tokenizer, or build a cache with --student-tokenizer {tokenizer.name}",
        )
    return student_for(settings, checkpoint, tokenizer, manifest), tokenizer


def student_for(
    settings: StudentConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer, manifest: Manifest
) -> PreTrainedModel:
    """The student's model for `tokenizer`, to which the mask token is added where it lacks one."""
    wanted = manifest.fingerprint.student
    mask_id = add_mask_token(tokenizer, wanted.mask_token)
    if mask_id != wanted.mask_id:
        raise TideError(
            f"the student's mask token {wanted.mask_token!r} has id {mask_id}",
            expected=f"id {wanted.mask_id}, as in the cache",
            fix="use the student checkpoint that the cache was built for",
        )
    if checkpoint is None:
        model = new_model(settings, tokenizer, mask_id, _POSITIONS)
    else:
        model = load_model(checkpoint, student_architecture(checkpoint), torch.float32)
        _make_room(model, mask_id, settings)
        _refuse_other_mask(checkpoint, tokenizer, mask_id)
    model.config.mask_token_id = mask_id
    model.config.block_size = manifest.fingerprint.lengths.block  # what sampling goes by
    if settings.attention == "flex":
        register_flex()
        model.set_attn_implementation(FLEX)
    if model.config.tie_word_embeddings:
        model._keys_to_ignore_on_save = {
            "lm_head.weight"
        }  # no alarm about it when a checkpoint is resumed
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _refuse_other_mask(checkpoint: Checkpoint, tokenizer: Tokenizer, mask_id: int) -> None:
    """TideError where the checkpoint was trained with another mask than the cache's."""
    stated = stated_mask(checkpoint, tokenizer)
    if stated is not None and stated != mask_id:
        raise TideError(
            f"the student {checkpoint.folder} has mask id {stated}, the cache {mask_id}",
            expected="one and the same id",
            fix="build the cache with this student's tokenizer, or correct mask_token_id in config.json",
        )


def student_architecture(checkpoint: Checkpoint) -> str:
    """`qwen3` or `llama`, by the checkpoint's config; TideError for any other."""
    kind = checkpoint.config.get("model_type")
    for name in ("qwen3", "llama"):
        if kind in ARCHITECTURES[name].model_types:
            return name
    raise TideError(
        f"{checkpoint.folder} has a config of model_type {kind!r}",
        expected="a student: qwen3, a2d-qwen3 or llama",
        fix="choose another --set student.checkpoint",
    )


def _make_room(model: Any, mask_id: int, settings: StudentConfig) -> None:
    """Embedding rows up to the mask token's, where the user allows it; the new ones are the mean of the others."""
    width = embedding_rows(model)
    if mask_id < width:
        return
    if not settings.add_mask_row:
        raise TideError(
            f"the mask id {mask_id} lies outside the student's embedding of {width} rows",
            expected="an embedding with a row for the mask token",
            fix="allow new rows with --set student.add_mask_row=true; the checkpoint on disk stays as it is",
        )
    model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[width:] = layer.weight[:width].mean(dim=0)
    print(
        f"student: embedding grown from {width:,} to {mask_id + 1:,} rows for the mask token",
        file=sys.stderr,
    )


def embedding_rows(model: Any) -> int:
    """How many ids the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def add_mask_token(tokenizer: Tokenizer, token: str) -> int:
    """Id of the mask token, which is added to the tokenizer where it is missing."""
    if token not in tokenizer.backend.get_vocab():
        tokenizer.backend.add_special_tokens({"mask_token": token})
    return tokenizer.special_id("mask", token)


def masked_hidden(
    model: Any,
    noised: Int[Tensor, "batch wide"],
    clean: Int[Tensor, "batch length"],
    places: Int[Tensor, "batch rows"],
    row: Int[Tensor, " n"],
    column: Int[Tensor, " n"],
    block: int,
) -> Float[Tensor, "n width"]:
    """Last hidden states at the entries (row, column) of `places`, from one pass over these places of
    [x_t1 ; … ; x_tm ; x_0].

    `noised`: the m draws of x_t one after the other; `places`: from `places_of_draws`, −1 at padding.
    """
    length = clean.shape[1]
    draws = noised.shape[1] // length
    flex = model.config._attn_implementation == FLEX
    mask: Any = (flex_mask if flex else block_diffusion_places)(places, length, block, draws)
    output = model.model(
        input_ids=torch.cat([noised, clean], dim=1).gather(1, places.clamp(min=0)),
        attention_mask=mask,
        position_ids=places % length,
        use_cache=False,
    )
    return output.last_hidden_state[row, column]


def batch_hidden(model: Any, batch: Mapping[str, Tensor], block: int) -> Float[Tensor, "n width"]:
    """`masked_hidden` of a collated batch, at its masked positions."""
    keys = ("noised", "clean", "places", "row", "place")
    return masked_hidden(model, *(batch[key] for key in keys), block=block)
