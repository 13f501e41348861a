"""Held-out masked NLL at fixed masks: how well a student denoises text that it was not trained on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from shared.aligned.examples import Prepared, Preparer
from shared.cache.manifest import Manifest
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.data import iter_examples, scan
from shared.data.conversation import content_of
from shared.diffusion.attention import full
from shared.diffusion.noise import token_draw
from shared.diffusion.padding import pad
from shared.settings.config import DataConfig, LengthConfig
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from student_train.batches.visible_rows import needed_places
from student_train.model.student import batch_hidden

_SEED = 20_260_429  # fixed: the masks are the same for every student of a tokenizer
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples as batches of tensors, with the bytes of each masked token (0 for special tokens)."""

    batches: list[dict[str, Tensor]]
    ids: tuple[str, ...]
    """Of the examples."""
    masked: int


def prepare_heldout(
    data: DataConfig, lengths: LengthConfig, tokenizer: Tokenizer, mask_id: int, draws: int
) -> HeldOut:
    """Tokenise and mask the held-out examples. t is stratified over each example's `draws`."""
    scan(data, extras=True)
    prepared = Preparer(tokenizer, None, lengths, mask_id, turns=data.turns).usable(
        list(iter_examples(data, extras=True))
    )
    special = set(tokenizer.backend.all_special_ids)
    byte_lengths = np.array(
        [0 if i in special else n for i, n in enumerate(tokenizer.byte_lengths)], np.int64
    )
    rows = [(e, token_draw(_SEED, e.id, d, e.maskable, 0.5).masked)
            for e in prepared for d in range(draws)]  # fmt: skip
    rows = sorted((r for r in rows if r[1].size), key=lambda r: len(r[0].student_ids))
    if not rows:
        raise TideError(
            f"no held-out example of {data.source} fits",
            fix="raise lengths.student or use other data",
        )
    batches, start = [], 0
    while start < len(rows):
        end = start + 1
        while (
            end < len(rows)
            and (end - start + 1) * len(rows[end][0].student_ids) <= _TOKENS_PER_BATCH
        ):
            end += 1
        batches.append(_batch(rows[start:end], mask_id, byte_lengths, lengths.block))
        start = end
    return HeldOut(batches, tuple(e.id for e in prepared), sum(masked.size for _, masked in rows))


def warn_of_overlap(
    heldout: HeldOut, cache: Path, manifest: Manifest, store: Store | None = None
) -> None:
    """A warning, with the count, where the cache (in a folder, or a store) trains on held-out contents."""
    trained: set[str] = set()
    place, files = (cache, None) if store is None else (Path(store.root), store.files)
    for part in tqdm(range(manifest.parts), unit="shard", desc="held out?", leave=False, delay=2):
        path = Unit(0, part).path(place).as_posix()
        column = pq.read_table(path, columns=["example_id"], filesystem=files).column("example_id")
        trained |= {content_of(name) for name in column.to_pylist()}
    both = sum(content_of(name) in trained for name in heldout.ids)
    if both:
        warnings.warn(
            f"{both:,} of {len(heldout.ids):,} held-out examples are also trained on: their score says little. "
            "data.split and data.heldout_share divide a source by content",
            stacklevel=2,
        )


def _batch(
    rows: Sequence[tuple[Prepared, np.ndarray]], mask_id: int, byte_lengths: np.ndarray, block: int
) -> dict[str, Tensor]:
    clean, valid = pad([e.student_ids for e, _ in rows])
    row = torch.from_numpy(np.repeat(np.arange(len(rows)), [m.size for _, m in rows]))
    column = torch.from_numpy(np.concatenate([m for _, m in rows])).long()
    places, place = needed_places(
        [m for _, m in rows], [len(e.student_ids) for e, _ in rows], block
    )
    noised = clean.clone()
    noised[row, column] = mask_id
    bytes_ = torch.from_numpy(byte_lengths)[clean[row, column]]
    return {
        "clean": clean, "noised": noised, "valid": valid, "row": row, "column": column,
        "places": places, "place": place, "bytes": bytes_,
    }  # fmt: skip


Predict = Callable[[dict[str, Tensor]], Tensor]
"""Logits at a batch's masked positions, [masked, vocabulary]."""


def teacher_predictor(model: Any) -> Predict:
    """A teacher under full attention, on the same masks."""

    def predict(batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(
            input_ids=batch["noised"], attention_mask=full(batch["valid"]), use_cache=False
        )
        return model.lm_head(hidden.last_hidden_state[batch["row"], batch["column"]])

    return predict


def student_predictor(model: Any, block: int) -> Predict:
    """A student as transformers loads it, on [x_t ; x_0]."""

    def predict(batch: dict[str, Tensor]) -> Tensor:
        return model.lm_head(batch_hidden(model, batch, block))

    return predict


@torch.no_grad()
def masked_nll(model: Any, heldout: HeldOut, predict: Predict) -> dict[str, float]:
    """`nll`: mean −log p in nats per masked token; `bits_per_byte`: over masked tokens that are text; `accuracy`: share
    of masked tokens that are the likeliest; `confidence`: mean probability of the likeliest.

    Bits per byte compare students of different tokenizers; nats per token do not.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(4, dtype=torch.float64, device=device)
    amount = torch.zeros(2, dtype=torch.float64, device=device)
    for cpu_batch in heldout.batches:
        batch = {k: v.to(device) for k, v in cpu_batch.items()}
        gold = batch["clean"][batch["row"], batch["column"]]
        logits = predict(batch).float()
        nll = F.cross_entropy(logits, gold, reduction="none").double()
        best, guess = logits.max(dim=1)
        confidence = (best - torch.logsumexp(logits, dim=1)).exp().double()
        text = batch["bytes"] > 0
        total += torch.stack(
            [nll.sum(), nll[text].sum(), (guess == gold).double().sum(), confidence.sum()]
        )
        amount += torch.stack([torch.tensor(nll.numel(), device=device), batch["bytes"].sum()])
    model.train(training)
    nats, text_nats, right, confidence = total.tolist()
    tokens, text_bytes = amount.tolist()
    return {
        "nll": nats / tokens,
        "bits_per_byte": text_nats / math.log(2) / max(text_bytes, 1),
        "accuracy": right / tokens,
        "confidence": confidence / tokens,
    }
