"""Rows of the cache as tensors: the padded inputs, and flat targets, one entry per masked position or chunk token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache.levels import EMPTY, class_log_mass
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.diffusion.padding import pad
from student_train.batches.visible_rows import places_of_draws
from student_train.losses.objective import Counts
from student_train.losses.targets import ChunkTargets, Classes, Targets, TopKTargets

Batch = dict[str, Any]
"""Tensors by name, and `chunk_host`, an array that stays in host memory wherever the tensors go."""


def collate(rows: Sequence[CacheRow], manifest: Manifest) -> Batch:
    """One batch. Padding is to the longest row; masked positions are gathered, not padded: row by row, but that those
    at which a teacher of the student's tokenizer was not read come last.

    Draws of one example that follow each other share one sequence (`student_train.batches.visible_rows`).
    """
    block = int(manifest.fingerprint["lengths"]["block"])
    mask_id = int(manifest.fingerprint["student"]["mask_id"])
    sequences = together(rows)
    clean, valid = pad([draws[0].student_ids for draws in sequences])
    sizes = [r.masked.size for r in rows]
    order = _order(rows)
    index = _longs(np.repeat([i for i, draws in enumerate(sequences) for _ in draws], sizes)[order])
    copy = _longs(np.repeat([j for draws in sequences for j in range(len(draws))], sizes)[order])
    column = _longs(_join([r.masked for r in rows])[order])
    places, place = places_of_draws(
        [[r.masked for r in draws] for draws in sequences],
        [len(draws[0].student_ids) for draws in sequences],
        block,
    )
    noised = clean.repeat(1, max(len(draws) for draws in sequences))
    noised[index, copy * clean.shape[1] + column] = mask_id
    times = np.array([r.t for r in rows], np.float32)
    batch: Batch = {
        "clean": clean,
        "noised": noised,
        "valid": valid,
        "row": index,
        "column": column,
        "places": places,
        "place": place[torch.from_numpy(order)],
        "gold": clean[index, column],
        "t": torch.from_numpy(np.repeat(times, sizes)[order]),
        "tokens": torch.tensor(sum(len(r.student_ids) for r in rows)),
        "counts": torch.tensor(
            [
                sum(r.maskable for r in rows),
                sum(r.asked.size for r in rows),
                sum(0 if r.chunk_logp is None else r.chunk_logp.size for r in rows),
            ],
            dtype=torch.float64,
        ),
    }
    if "topk" in manifest.signals and manifest.shared_tokenizer:
        batch |= _topk(rows)
    if "chunks" in manifest.signals:
        batch |= _chunks(rows, sizes, times, order)
    return batch


def together(rows: Sequence[CacheRow]) -> list[list[CacheRow]]:
    """Rows that follow each other and are draws of one example."""
    found: list[list[CacheRow]] = []
    for row in rows:
        before = found[-1] if found else []
        if (
            before
            and before[0].example_id == row.example_id
            and all(other.draw != row.draw for other in before)
        ):
            before.append(row)
        else:
            found.append([row])
    return found


def _order(rows: Sequence[CacheRow]) -> np.ndarray:
    """Where in the concatenated masked positions each of the batch's stands."""
    read = [
        np.ones(r.masked.size, bool) if r.read is None else np.isin(r.masked, r.read) for r in rows
    ]
    return np.argsort(~_join(read, bool), kind="stable")


def _topk(rows: Sequence[CacheRow]) -> dict[str, Tensor]:
    sizes = _join([r.topk_sizes for r in rows])
    width = int(sizes.max(initial=1))
    kept = np.arange(width) < sizes[:, None]
    starts = np.cumsum(sizes) - sizes
    # Padding repeats the row's first entry: a repeated id changes nothing in a set of ids.
    flat = np.where(kept, starts[:, None] + np.arange(width), starts[:, None]).astype(np.int64)
    ids, logp = _join([r.topk_ids for r in rows]), _join([r.topk_logp for r in rows], np.float32)
    found = {
        "topk_ids": _longs(ids[flat]),
        "topk_logp": torch.from_numpy(logp[flat]),
        "topk_kept": torch.from_numpy(kept),
        "tail_odds": torch.from_numpy(
            np.concatenate([r.tail_odds for r in rows if r.tail_odds is not None])
        ),
    }
    masses = [r.class_mass for r in rows if r.class_mass is not None]
    return found | ({"class_mass": torch.from_numpy(np.concatenate(masses))} if masses else {})


def _chunks(
    rows: Sequence[CacheRow], sizes: Sequence[int], times: np.ndarray, order: np.ndarray
) -> Batch:
    token_rows, chunk_of, counts = [], [], []
    first_row = first_chunk = 0
    for row, size in zip(rows, sizes, strict=True):
        spans = row.chunk_student if row.chunk_student is not None else np.zeros((0, 2), np.int32)
        lengths = spans[:, 1] - spans[:, 0]
        owner = np.repeat(np.arange(len(spans)), lengths)
        offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        # Every token of an active chunk is masked, so its position is found among the masked ones.
        token_rows.append(first_row + np.searchsorted(row.masked, spans[owner, 0] + offset))
        chunk_of.append(first_chunk + owner)
        counts.append(len(spans))
        first_row, first_chunk = first_row + size, first_chunk + len(spans)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    host = np.stack([rank[_join(token_rows)], _join(chunk_of)])
    return {
        "chunk_host": host,
        "chunk_rows": torch.from_numpy(host[0]),
        "chunk_of": torch.from_numpy(host[1]),
        "chunk_logp": torch.from_numpy(_join([r.chunk_logp for r in rows], np.float32)),
        "chunk_t": torch.from_numpy(np.repeat(times, counts)),
    }


class TargetReader:
    """From batches to what `objective` takes. Holds the vocabulary's tables on the device of the batches."""

    def __init__(self, manifest: Manifest, layout: Layout) -> None:
        self.temperatures = layout.temperatures
        self._student_shaped = manifest.fingerprint["targets"]["tail"] == "student"
        self._vocabulary = layout.vocabulary
        self._tables: dict[torch.device, tuple[Classes, dict[float, Tensor]]] = {}

    def __call__(self, batch: Batch) -> Targets:
        """The targets of a batch."""
        topk = self._topk(batch) if "topk_ids" in batch else None
        return Targets(batch["gold"], batch["t"], topk, chunk_targets(batch))

    def mass_in_topk(self, batch: Batch, temperature: float) -> Tensor:
        """The teacher's probability inside its cached top-k at `temperature`, one value per masked position."""
        return torch.sigmoid(-batch["tail_odds"][:, self.temperatures.index(temperature)])

    def _topk(self, batch: Batch) -> TopKTargets:
        classes, shares = self._on(batch["topk_ids"].device)
        odds = {t: batch["tail_odds"][:, i] for i, t in enumerate(self.temperatures)}
        mass = None
        if "class_mass" in batch:
            stored = batch["class_mass"]
            levels = stored.dtype == torch.uint8
            mass = {
                t: class_log_mass(stored[:, i], odds[t], shares[t]) if levels else stored[:, i]
                for i, t in enumerate(self.temperatures)
            }
        return TopKTargets(
            batch["topk_ids"],
            batch["topk_logp"],
            batch["topk_kept"],
            odds,
            classes,
            mass,
            self._student_shaped,
        )

    def _on(self, device: torch.device) -> tuple[Classes, dict[float, Tensor]]:
        if device not in self._tables:
            assert self._vocabulary is not None
            prior = torch.from_numpy(self._vocabulary.prior.copy())
            log_prior = {
                t: prior[i].log().clamp_min(EMPTY).to(device)
                for i, t in enumerate(self.temperatures)
            }
            class_of = torch.from_numpy(self._vocabulary.class_of.astype(np.int64)).to(device)
            shares = torch.from_numpy(self._vocabulary.class_prior).to(device)
            self._tables[device] = (
                Classes(class_of, self._vocabulary.classes, log_prior),
                {t: shares[i] for i, t in enumerate(self.temperatures)},
            )
        return self._tables[device]


def chunk_targets(batch: Batch) -> ChunkTargets | None:
    """The batch's active chunks, where it has any column of them."""
    chunks = None
    if "chunk_rows" in batch:
        chunks = ChunkTargets(
            batch["chunk_rows"],
            batch["chunk_of"],
            batch["chunk_logp"],
            batch["chunk_t"],
            batch["chunk_host"],
        )
    return chunks


def counts_of(counts: Tensor) -> Counts:
    """The three denominators from their summed vector."""
    return Counts(*counts.float().unbind())


def _longs(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _join(parts: Sequence[np.ndarray | None], kind: type = np.int64) -> np.ndarray:
    present = [p for p in parts if p is not None]
    return np.concatenate(present).astype(kind, copy=False) if present else np.zeros(0, kind)
