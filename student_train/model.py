"""The student: from a checkpoint, or a new Qwen3 or Llama, that denoises blocks of [x_t ; x_0]."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from shared.cache.manifest import Manifest
from shared.diffusion import block_diffusion_places, block_labels, sees
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve, stated_mask
from shared.models.flex import FLEX, block_mask
from shared.models.loading import architecture_of, load_model, new_model
from shared.settings.config import Lora, StudentConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import Batch, TargetReader
from student_train.losses.objective import LossSettings, fused_loss

logger = logging.getLogger(__name__)

STUDENTS = ("qwen3", "llama", "qwen2", "smollm3")


def load_student(
    settings: StudentConfig, cache: Path, manifest: Manifest
) -> tuple[PreTrainedModel, Tokenizer]:
    """The student in float32 and its tokenizer, which must be the one the cache was built for.

    Without a checkpoint the weights are random (seed torch first) and the tokenizer is the cache's
    own copy. A mask token that the tokenizer lacks is added at the end, where the cache expects it.
    """
    checkpoint, tokenizer = None, (own := Tokenizer.load(cache / "student_tokenizer"))
    if settings.checkpoint is not None:
        checkpoint = open_checkpoint(resolve(settings.checkpoint))
        tokenizer = Tokenizer.load(checkpoint.folder)
    wanted = manifest.fingerprint.student.tokenizer
    if tokenizer.fingerprint != wanted:
        raise TideError(
            f"the cache {cache} was built for the student tokenizer {wanted[:12]}…, and that of "
            f"{tokenizer.name} is {tokenizer.fingerprint[:12]}…",
            fix=f"train another student, or cache with --student-tokenizer {tokenizer.name}",
        )
    # It was the cache's template that made the texts to train on.
    tokenizer.backend.chat_template = own.backend.chat_template
    return student_for(settings, checkpoint, tokenizer, manifest), tokenizer


def student_for(
    settings: StudentConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer, manifest: Manifest
) -> PreTrainedModel:
    """The student's model for `tokenizer`, to which the mask token is added where it lacks one."""
    # 1. The mask token, at the id that the cache has for it.
    wanted = manifest.fingerprint.student
    if wanted.mask_token not in tokenizer.backend.get_vocab():
        tokenizer.backend.add_special_tokens({"mask_token": wanted.mask_token})
    mask_id = tokenizer.special_id("mask", wanted.mask_token)
    if mask_id != wanted.mask_id:
        raise TideError(
            f"the student's mask token {wanted.mask_token!r} has id {mask_id}, in the cache "
            f"{wanted.mask_id}",
            fix="use the student checkpoint that the cache was built for",
        )
    # 2. The weights.
    if checkpoint is None:
        model = new_model(settings, tokenizer, mask_id, positions=4096)
    else:
        model = load_model(checkpoint, architecture_of(checkpoint, STUDENTS), torch.float32)
        width: int = model.config.vocab_size
        if mask_id >= width and not settings.add_mask_row:
            raise TideError(
                f"the mask id {mask_id} lies outside the student's embedding of {width} rows",
                fix="allow new rows, in memory, with --set student.add_mask_row=true",
            )
        if mask_id >= width:  # rows up to the mask token's: means of the others
            grown: Any = model
            grown.resize_token_embeddings(mask_id + 1, mean_resizing=False)
            with torch.no_grad():
                for layer in {grown.get_input_embeddings(), grown.get_output_embeddings()}:
                    layer.weight[width:] = layer.weight[:width].mean(dim=0)
            logger.warning("embedding grown from %s to %s rows for the mask", width, mask_id + 1)
        stated = stated_mask(checkpoint, tokenizer)
        if stated is not None and stated != mask_id:
            raise TideError(
                f"the student {checkpoint.folder} has mask id {stated}, the cache {mask_id}",
                fix="build the cache with this student's tokenizer, or correct its mask_token_id",
            )
    model.requires_grad_(True)
    # 3. What sampling and saving go by.
    model.config.mask_token_id = mask_id
    model.config.block_size = manifest.fingerprint.lengths.block
    if settings.attention == "flex":
        model.set_attn_implementation(FLEX)
    if model.config.tie_word_embeddings:  # no alarm about it when a checkpoint is resumed
        model._keys_to_ignore_on_save = {"lm_head.weight"}
    return model


def with_adapter(model: Any, lora: Lora | None) -> Any:
    """`model`; with `lora` peft's wrapper around it, in which an adapter alone is trained."""
    if lora is None:
        return model
    if importlib.util.find_spec("peft") is None:
        what = "student.lora needs peft, which is not installed"
        raise TideError(what, fix='pip install ".[lora]", or leave student.lora out')
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    return get_peft_model(model, settings)


def masked_hidden(
    model: Any,
    noised: Int[Tensor, "batch wide"],
    clean: Int[Tensor, "batch length"],
    places: Int[Tensor, "packed rows"],
    place: Int[Tensor, " n"],
    block: int,
) -> Float[Tensor, "n width"]:
    """Last hidden states at the entries `place` of `places`, both from `places_of_draws`.

    One pass over these places of [x_t1 ; … ; x_tm ; x_0]. `noised`: the m draws of x_t side by
    side.
    """
    length = clean.shape[1]
    draws = noised.shape[1] // length
    flex = model.config._attn_implementation == FLEX
    mask: Any = (flex_mask if flex else block_diffusion_places)(places, length, block, draws)
    output = model.model(
        input_ids=torch.cat([noised, clean], dim=1).take(places.clamp(min=0)),
        attention_mask=mask,
        position_ids=places % length,  # x_t and x_0 of a position share it
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[place]


def batch_hidden(model: Any, batch: Mapping[str, Tensor], block: int) -> Float[Tensor, "n width"]:
    """`masked_hidden` of a collated batch, at its masked positions."""
    names = ("noised", "clean", "places", "place")
    return masked_hidden(model, *(batch[name] for name in names), block=block)


def train_on_loss(
    model: Any,
    block: int,
    read: TargetReader,
    compiled: bool = False,
    rows_per_slice: int | None = None,
) -> None:
    """From now on `model(batch=…, settings=…)` returns the loss and its sums; without settings, the
    logits at the masked positions, [masked, vocab]. `rows_per_slice`: of logits at a time.

    DistributedDataParallel and FSDP hook the forwards of modules: a loss computed outside of the
    model's would escape the first, weights read outside of the LM head's the second.
    """

    def forward(self: Any, batch: Batch, settings: LossSettings | None = None) -> Any:
        hidden = batch_hidden(self, batch, block)  # [masked, width]
        if settings is None:
            return self.lm_head(hidden)
        return self.lm_head(hidden, read(batch), settings)

    def head(self: Any, hidden: Tensor, targets: Any = None, settings: Any = None) -> Any:
        if targets is None or settings is None:
            return nn.Linear.forward(self, hidden)
        return fused_loss(hidden, self.weight, targets, settings, rows_per_slice, compiled)

    model.forward = MethodType(forward, model)
    model.lm_head.forward = MethodType(head, model.lm_head)


def flex_mask(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int = 1
) -> BlockMask:
    """`shared.diffusion.block_diffusion_places` as a block mask."""
    blocks, copies = block_labels(places, length, block, draws)
    rule = lambda b, _, q, k: sees(  # noqa: E731 - as `sees`
        blocks[b, q], blocks[b, k], copies[b, q], copies[b, k]
    )
    return block_mask(rule, places)
