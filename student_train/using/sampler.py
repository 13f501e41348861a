"""Block diffusion sampling: blocks from left to right, each from all masks to tokens in a few steps
(BD3LM, LLaDA).

Keys and values of everything finished are cached: no token of the prefix is encoded twice. Prompts
are padded on the left so that each ends where a block ends, as the reference does; padding is
hidden, so a batch of unequal prompts gives what each gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from student_train.using.decoding import Decoding, Row
from student_train.using.settings import SampleConfig, Special


def sample(
    model: Any, prompts: Sequence[Sequence[int]], special: Special, config: SampleConfig
) -> list[list[int]]:
    """The response to each prompt, up to its first EOS (or other end), which is left out.
    ValueError where a prompt is empty.
    """
    tokens = torch.zeros(len(prompts), 0, dtype=torch.long)
    for tokens, _ in sample_steps(model, prompts, special, config):  # noqa: B007 - the last state counts
        pass
    return [until_eos(row, special.eos) for row in tokens.tolist()]


def until_eos(row: list[int], eos: int) -> list[int]:
    """What stands before the first EOS."""
    return row[: row.index(eos)] if eos in row else row


Stop = Callable[[int, list[int]], bool]
"""Whether a row, by its place in the batch and its new tokens, needs no more of them. Asked after
each block.
"""


@torch.no_grad()
def sample_steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    special: Special,
    config: SampleConfig,
    stop: Stop | None = None,
) -> Iterator[tuple[Int[Tensor, "batch new"], int]]:
    """The new tokens after each step (those still masked are the mask's id), and the passes so far.

    A row with an EOS in a finished block, or that `stop` ends, leaves the batch; what follows in it
    is EOS. Ends early when all have left.
    """
    rows = [Row(prompt, config) for prompt in prompts]
    decoding = Decoding(model, special, config.block, config.guidance)
    decoding.join(rows)
    device = model.get_input_embeddings().weight.device
    new = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
    for start in range(0, config.new_tokens, config.block):
        size = min(config.block, config.new_tokens - start)
        numbers = [i for i, row in enumerate(rows) if row in decoding.rows]
        whole = new
        for block in decoding.next_block(size):
            ended = torch.full((len(rows), size), special.eos, device=device)
            ended[numbers] = block
            whole = torch.cat([new, ended], dim=1)
            yield whole, decoding.passes
        new = whole
        decoding.keep(
            [
                special.eos not in rows[i].made and not (stop and stop(i, rows[i].made))
                for i in numbers
            ]
        )
        if not decoding.rows:
            return
