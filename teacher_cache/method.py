"""What the teacher sees (CompDemo, TIDE §2.2), and what is kept of its logits.

The masked units are split into A and B. Pass 1 masks B, reveals A and reads B; pass 2 the reverse.
So the teacher answers with half of the answer at hand, while the student sees all of it masked.
Without CompDemo there is one pass, with everything masked. Of the logits at a row that is read, the
gold token and the top-k are kept; of what is outside, a few coefficients and its mass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.aligned.examples import Prepared
from shared.cache.levels import EMPTY, LARGEST_CODE, LARGEST_LEVEL
from shared.cache.row import Tables
from shared.cache.tail import LinearTail
from shared.diffusion import Draw, chunk_draw, token_draw
from shared.settings.config import NoiseConfig
from shared.system.files import TideError


@dataclass(frozen=True)
class Request:
    """One forward pass of an example: ids with masks, positions to read, the gold ids there."""

    ids: Int[np.ndarray, " length"]
    read: Int[np.ndarray, " read"]
    gold: Int[np.ndarray, " read"]


@dataclass(frozen=True)
class TeacherView:
    """The masked teacher positions (rising), the CompDemo part of each, and its active chunk.

    `in_a`: True in part A. For a shared tokenizer `chunk_of` numbers the positions themselves
    (every masked token is a chunk of its own), and `student` has the student's positions, which may
    be fewer than it has masked (`targets.positions`): what is not read is not masked.
    """

    ids: Int[np.ndarray, " length"]
    positions: Int[np.ndarray, " masked"]
    in_a: Bool[np.ndarray, " masked"]
    chunk_of: Int[np.ndarray, " masked"]
    student: Int[np.ndarray, " masked"] | None = None


def draw_for(example: Prepared, noise: NoiseConfig, draw: int) -> Draw:
    """A draw of an example: token masks for a shared tokenizer, chunk-consistent ones else."""
    maskable = example.maskable
    if example.shared:
        return token_draw(noise.seed, example.id, draw, maskable, noise.demo_ratio)
    spans, length = example.chunks[:, 2:], len(example.student_ids)
    how = (spans, noise.demo_ratio, noise.whole_chunks)
    return chunk_draw(noise.seed, example.id, draw, maskable, length, *how)


def teacher_view(example: Prepared, draw: Draw) -> TeacherView:
    """Where the teacher's sequence is masked under `draw`."""
    ids = example.student_ids if example.teacher_ids is None else example.teacher_ids
    if example.shared:
        which, places = example.asked(draw.masked)
        chunk_of = np.arange(which.size)
        return TeacherView(ids, places, draw.split[which], chunk_of, draw.masked[which])
    # Every position of every active chunk's teacher span, one chunk after the other.
    spans = example.chunks[draw.chunks, :2]
    lengths = spans[:, 1] - spans[:, 0]
    chunk_of = np.repeat(np.arange(len(spans)), lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = (spans[chunk_of, 0] + offsets).astype(np.int32)
    return TeacherView(ids, positions, draw.split[chunk_of], chunk_of)


def passes(
    view: TeacherView, mask_id: int, comp_demo: bool
) -> list[tuple[Request, Int[np.ndarray, " _"]]]:
    """The forward passes that read every masked position once, each with the indices it reads.

    Indices are into `view`. A pass with nothing to read is left out.
    """
    parts = [~view.in_a, view.in_a] if comp_demo else [np.ones(view.positions.size, bool)]
    result = []
    for part in parts:
        rows = np.flatnonzero(part)
        if rows.size:
            # What is read is masked; the other part is revealed.
            read = view.positions[rows]
            ids = view.ids.copy()
            ids[read] = mask_id
            result.append((Request(ids, read, view.ids[read]), rows))
    return result


Scores = dict[str, np.ndarray]
"""What is kept at the read positions of one request, float32: `gold_logp`, `logsumexp` and, where a
top-k is asked for, `topk_sizes`, `topk_ids`, `topk_logp` (of k entries each), and, where there are
tables, `tail_code`, `tail_level`. They are the fields of `CacheRow`."""


@dataclass(frozen=True)
class TargetSpec:
    """Which numbers to take: `k` 0: no top-k is cached; `rank` 0: there are no tables yet."""

    k: int
    mass: float
    temperatures: tuple[float, ...]
    rank: int = 0


class TailEncoder:
    """The tables at work: coefficients of hidden states, and levels of what is outside a top-k."""

    def __init__(self, tables: Tables, temperatures: tuple[float, ...]) -> None:
        self.tail, self.step = LinearTail.of(tables, temperatures), tables.step
        self.unit = tables.unit
        self.encoder, self.center = map(torch.tensor, (tables.encoder, tables.center))

    def code(self, hidden: Float[Tensor, "read width"]) -> Float[Tensor, "read rank"]:
        """Coefficients as they are kept: whole numbers of steps, or exact ones where step is 0."""
        device = hidden.device
        self.tail = self.tail.to(device)
        self.encoder, self.center = self.encoder.to(device), self.center.to(device)
        code = (hidden.float() - self.center) @ self.encoder.T
        if not self.step:
            return code
        return (code / self.step).round().clamp(-LARGEST_CODE, LARGEST_CODE)

    def levels(
        self,
        code: Float[Tensor, "read rank"],
        listed: Int[Tensor, "read k"],
        tails: Float[Tensor, "read temperatures"],
    ) -> Float[Tensor, "read temperatures"]:
        """`LinearTail.levels` of coefficients as they are kept."""
        found = self.tail.levels(code * self.unit, listed, tails)
        return found.clamp(-LARGEST_LEVEL, LARGEST_LEVEL)


def extract(
    logits: Float[Tensor, "read vocab"],
    hidden: Float[Tensor, "read width"],
    gold: Int[Tensor, " read"],
    spec: TargetSpec,
    excluded: Int[Tensor, " excluded"] | None = None,
    encoder: TailEncoder | None = None,
) -> dict[str, Tensor]:
    """The `Scores` that `spec` asks for, on the logits' device; float32 before any exp.

    Ids in `excluded` (those that mean something else to the student) have no part in anything but
    `gold_logp`. `hidden`: the states of which the head made the logits.
    """
    # 1. The gold token's log-likelihood, over all logits.
    logits = logits.float()
    gold_logp = logits.gather(1, gold[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)

    # 2. The top-k of the ids that are shared.
    if excluded is not None and excluded.numel():
        logits = logits.index_fill(1, excluded, EMPTY)
    logsumexp = torch.logsumexp(logits, dim=1)
    fields = {"gold_logp": gold_logp, "logsumexp": logsumexp}
    if not spec.k:
        return fields
    logp = logits - logsumexp[:, None]
    values, ids, sizes = topk_of(logp, spec)
    fields |= {"topk_sizes": sizes.int(), "topk_ids": ids.int(), "topk_logp": values}

    # 3. What is outside of it: the code, and at each temperature the level of Σ p^(1/T).
    if encoder is not None:
        listed, tails = outside_of(logp, ids, sizes, spec.temperatures)
        fields["tail_code"] = encoder.code(hidden)
        fields["tail_level"] = encoder.levels(fields["tail_code"], listed, tails)
    return fields


def topk_of(
    logp: Float[Tensor, "read vocab"], spec: TargetSpec
) -> tuple[Float[Tensor, "read k"], Int[Tensor, "read k"], Int[Tensor, " read"]]:
    """Values and ids of the k largest, and how many of them are kept.

    Those are the shortest prefix whose mass at the largest temperature reaches `spec.mass`.
    """
    values, ids = torch.topk(logp, spec.k, dim=1)
    if spec.mass == 1.0:
        return values, ids, torch.full((len(values),), spec.k, device=values.device)
    hottest = spec.temperatures[-1]
    hot = values / hottest - torch.logsumexp(logp / hottest, dim=1, keepdim=True)
    short = (hot.exp().cumsum(dim=1) < spec.mass).sum(dim=1)
    return values, ids, (short + 1).clamp_max(spec.k)


def outside_of(
    logp: Float[Tensor, "read vocab"],
    ids: Int[Tensor, "read k"],
    sizes: Int[Tensor, " read"],
    temperatures: Sequence[float],
) -> tuple[Int[Tensor, "read k"], Float[Tensor, "read temperatures"]]:
    """The ids that are kept, where `logp` is EMPTY from now on, and log Σ p^(1/T) of all others."""
    # An id beyond the kept ones is outside: the row's first, always kept, stands in its place.
    kept = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
    listed = torch.where(kept, ids, ids[:, :1])
    logp.scatter_(1, listed, EMPTY)
    return listed, torch.stack([torch.logsumexp(logp / t, dim=1) for t in temperatures], dim=1)


def excluded_ids(shared: Bool[np.ndarray, " ids"], vocabulary: int) -> Int[np.ndarray, " excluded"]:
    """Ids below `vocabulary` that mean something else, or nothing, to the student."""
    allowed = np.zeros(vocabulary, bool)
    allowed[: len(shared)] = shared[:vocabulary]
    return np.flatnonzero(~allowed)


def refuse_nonfinite(scores: Scores, example_id: str) -> None:
    """Raise TideError where the teacher returned NaN or infinity for an example."""
    finite = np.ones(len(scores["gold_logp"]), bool)
    for values in scores.values():
        finite &= np.isfinite(values).reshape(len(finite), -1).all(axis=1)
    if not finite.all():
        raise TideError(
            f"the teacher returned {int((~finite).sum())} non-finite rows of {finite.size} "
            f"for example {example_id}",
            expected="finite logits",
            fix="use engine.dtype=bfloat16 or float32, check the checkpoint; shards are kept",
        )
