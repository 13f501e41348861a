"""Held-out masked NLL at fixed masks: how well a student denoises text it was not trained on."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from shared.aligned.examples import Preparer
from shared.cache.manifest import Manifest
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.data.conversation import content_of
from shared.data.reading import scan
from shared.diffusion import full, pad, token_draw
from shared.settings.config import DataConfig, LengthConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import places_of_draws
from student_train.model import batch_hidden

_SEED = 20_260_429  # fixed: the masks are the same for every student of a tokenizer
_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class HeldOut:
    batches: list[dict[str, torch.Tensor]]  # with the bytes of each masked token, 0 of special ones
    ids: tuple[str, ...]  # of the examples
    masked: int  # tokens


def prepare_heldout(
    data: DataConfig, lengths: LengthConfig, tokenizer: Tokenizer, mask_id: int, draws: int
) -> HeldOut:
    """Tokenise and mask the held-out examples. t is stratified over each example's `draws`."""
    chats, _ = scan(data)
    preparer = Preparer(tokenizer, None, lengths, mask_id, turns=data.turns)
    examples = preparer.usable(chats)
    # 1. Every example under every draw, with its masked positions; the short ones first.
    rows = []
    for example in examples:
        for draw in range(draws):
            masked = token_draw(_SEED, example.id, draw, example.maskable, 0.5).masked
            if masked.size:
                rows.append((example.student_ids, masked))
    rows.sort(key=lambda row: len(row[0]))
    if not rows:
        what = f"no held-out example of {data.source} fits"
        raise TideError(what, fix="raise lengths.student or use other data")
    # 2. Batches of at most so many tokens, padding included.
    groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > _TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(row)
    # 3. Their tensors; the masked positions of a batch's rows stand one after the other, [masked].
    byte_lengths = torch.tensor(tokenizer.byte_lengths)
    byte_lengths[tokenizer.backend.all_special_ids] = 0
    batches = []
    for group in groups:
        ids, masked = zip(*group, strict=True)
        clean, valid = pad(ids)  # [rows, length]
        row = torch.from_numpy(np.repeat(np.arange(len(group)), [m.size for m in masked]))
        column = torch.from_numpy(np.concatenate(masked)).long()
        used = [len(own) for own in ids]
        places, place = places_of_draws([[m] for m in masked], used, lengths.block)
        noised = clean.clone()
        noised[row, column] = mask_id
        batch = {"clean": clean, "noised": noised, "valid": valid, "row": row, "column": column}
        sizes = byte_lengths[clean[row, column]]
        batches.append({**batch, "places": places, "place": place, "bytes": sizes})
    return HeldOut(batches, tuple(e.id for e in examples), sum(masked.size for _, masked in rows))


def warn_of_overlap(
    heldout: HeldOut, cache: Path, manifest: Manifest, store: Store | None = None
) -> None:
    """Warns, with the count, where the cache (a folder's, or a store's) has held-out contents."""
    trained: set[str] = set()
    place, files = (cache, None) if store is None else (Path(store.root), store.files)
    for part in tqdm(range(manifest.parts), unit="shard", desc="held out?", leave=False, delay=2):
        path = Unit(0, part).path(place).as_posix()
        column = pq.read_table(path, columns=["example_id"], filesystem=files).column("example_id")
        trained |= {content_of(name) for name in column.to_pylist()}
    both = sum(content_of(name) in trained for name in heldout.ids)
    if both:
        text = (
            f"{both:,} of {len(heldout.ids):,} held-out examples are also trained on: their score "
            "says little. data.split and data.heldout_share divide a source by content"
        )
        warnings.warn(text, stacklevel=2)


Predict = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Logits at a batch's masked positions, [masked, vocabulary]."""


def teacher_predictor(model: Any) -> Predict:
    """A teacher under full attention, on the same masks."""

    def predict(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = full(batch["valid"])
        states = model.model(input_ids=batch["noised"], attention_mask=mask, use_cache=False)
        return model.lm_head(states.last_hidden_state[batch["row"], batch["column"]])

    return predict


def student_predictor(model: Any, block: int) -> Predict:
    """A student as transformers loads it, on [x_t ; x_0]."""
    return lambda batch: model.lm_head(batch_hidden(model, batch, block))


@torch.no_grad()
def masked_nll(model: Any, heldout: HeldOut, predict: Predict) -> dict[str, float]:
    """`nll`: mean −log p in nats per masked token; `bits_per_byte`: over masked tokens that are
    text, which compares students of different tokenizers; `accuracy`: share of masked tokens that
    are the likeliest, `text_accuracy` of those that are text; `confidence`: mean probability of the
    likeliest.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for cpu_batch in heldout.batches:
        batch = {k: v.to(device) for k, v in cpu_batch.items()}
        gold = batch["clean"][batch["row"], batch["column"]]  # [masked]
        logits = predict(batch).float()  # [masked, vocab]
        nll = F.cross_entropy(logits, gold, reduction="none").double()
        best, guess = logits.max(dim=1)
        confidence = (best - torch.logsumexp(logits, dim=1)).exp().double()
        text, right = batch["bytes"] > 0, (guess == gold).double()  # special tokens have no bytes
        numbers = (nll, nll[text], right, right[text], confidence)
        sums += torch.stack([number.sum() for number in numbers])
    model.train(training)
    nats, text_nats, right, text_right, confidence = sums.tolist()
    text_bytes = sum(int(batch["bytes"].sum()) for batch in heldout.batches)
    text_tokens = sum(int((batch["bytes"] > 0).sum()) for batch in heldout.batches)
    return {
        "nll": nats / heldout.masked,
        "bits_per_byte": text_nats / math.log(2) / max(text_bytes, 1),
        "accuracy": right / heldout.masked,
        "text_accuracy": text_right / max(text_tokens, 1),
        "confidence": confidence / heldout.masked,
    }
