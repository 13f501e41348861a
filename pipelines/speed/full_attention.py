"""How a teacher under full attention answers (LLaDA): every step runs prompt and whole response, nothing is cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from shared.diffusion.attention import full
from student_train.using.decoding import pad_left
from student_train.using.settings import Special


@torch.no_grad()
def sample_full_attention(
    model: Any,
    prompts: Sequence[Sequence[int]],
    special: Special,
    new_tokens: int,
    block: int,
    per_step: int,
) -> tuple[Int[Tensor, "batch new"], int]:
    """Greedy low-confidence remasking, blocks from left to right, `per_step` tokens a step; tokens and passes.

    No EOS: answers have their full length.
    """
    prompt, valid = pad_left(prompts, 1, special.pad)
    width = prompt.shape[1]
    ids = torch.cat([prompt, torch.full((len(prompts), new_tokens), special.mask)], dim=1)
    valid = torch.cat([valid, torch.ones(len(prompts), new_tokens, dtype=torch.bool)], dim=1)
    positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
    passes = 0
    for start in range(width, width + new_tokens, block):
        at = slice(start, start + block)
        for _ in range(-(-block // per_step)):
            hidden = model.model(
                input_ids=ids, attention_mask=full(valid), position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[:, at]).float()
            logits[..., [special.mask, special.eos]] = -torch.inf
            confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
            masked = ids[:, at] == special.mask
            rank = (
                torch.where(masked, confidence, -1.0)
                .argsort(dim=1, descending=True, stable=True)
                .argsort(dim=1)
            )
            ids[:, at] = torch.where(masked & (rank < per_step), tokens, ids[:, at])
            passes += 1
    return ids[:, width:], passes
