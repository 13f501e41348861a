"""What the teacher sees (CompDemo, TIDE §2.2), and what is kept of its logits.

The masked units are split into A and B. Pass 1 masks B, reveals A and reads B; pass 2 the reverse.
So the teacher answers with half of the answer at hand, while the student sees all of it masked.
Without CompDemo there is one pass, with everything masked. Of the logits at a row that is read, the
gold token, the top-k and the mass of the tail are kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.aligned.examples import Prepared
from shared.cache.levels import EMPTY, LARGEST_ODDS
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
    return chunk_draw(noise.seed, example.id, draw, maskable, length, spans, noise.demo_ratio)


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


@dataclass(frozen=True)
class Scores:
    """The teacher at the read positions of one request, float32 (see `CacheRow`).

    All but the first two are None where no top-k is asked for, `class_mass` also where the tail has
    no classes.
    """

    gold_logp: Float[np.ndarray, " read"]
    logsumexp: Float[np.ndarray, " read"]
    topk_sizes: Int[np.ndarray, " read"] | None = None
    topk_ids: Int[np.ndarray, "read k"] | None = None
    topk_logp: Float[np.ndarray, "read k"] | None = None
    tail_odds: Float[np.ndarray, "read temperatures"] | None = None
    class_mass: Float[np.ndarray, "read temperatures classes"] | None = None


@dataclass(frozen=True)
class TargetSpec:
    """Which numbers to take: `k` 0: no top-k is cached; `classes` 1: its tail is kept whole."""

    k: int
    mass: float
    temperatures: tuple[float, ...]
    classes: int = 1


def extract(
    logits: Float[Tensor, "read vocab"],
    gold: Int[Tensor, " read"],
    spec: TargetSpec,
    excluded: Int[Tensor, " excluded"] | None = None,
    members: Float[Tensor, "vocab classes"] | None = None,
) -> dict[str, Tensor]:
    """The fields of `Scores` that `spec` asks for, on the logits' device; float32 before any exp.

    Ids in `excluded` (those that mean something else to the student) have no part in anything but
    `gold_logp`. `members`: 1 where a token belongs to a class.
    """
    # 1. The gold token's log-likelihood, over all logits.
    logits = logits.float()
    gold_logp = logits.gather(1, gold[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)

    # 2. The top-k of the ids that are shared.
    logits = _shared_alone(logits, excluded)
    logsumexp = torch.logsumexp(logits, dim=1)
    fields = {"gold_logp": gold_logp, "logsumexp": logsumexp}
    if not spec.k:
        return fields
    values, ids, sizes = _topk(logits, spec)
    topk_logp = values - logsumexp[:, None]
    fields |= {"topk_sizes": sizes.int(), "topk_ids": ids.int(), "topk_logp": topk_logp}

    # 3. What is outside of it: at each temperature its odds, and the mass of each class. Masses are
    #    summed by a product, which gives the same every time.
    odds, masses = [], []
    for temperature in spec.temperatures:
        outside, inside = outside_mass(logits, ids, sizes, temperature)
        odds.append(outside.sum(dim=1).log() - inside.log())
        if members is not None:
            masses.append(outside @ members)
    fields["tail_odds"] = torch.stack(odds, dim=1).clamp(-LARGEST_ODDS, LARGEST_ODDS)
    if members is not None:
        fields["class_mass"] = torch.stack(masses, dim=1).log().clamp_min(EMPTY)
    return fields


def outside_sums(
    logits: Float[Tensor, "read vocab"],
    spec: TargetSpec,
    excluded: Int[Tensor, " excluded"] | None = None,
) -> Float[Tensor, "temperatures vocab"]:
    """Sums over rows of each token's probability outside of the top-k that `extract` takes."""
    logits = _shared_alone(logits.float(), excluded)
    _, ids, sizes = _topk(logits, spec)
    sums = [outside_mass(logits, ids, sizes, t)[0].sum(dim=0) for t in spec.temperatures]
    return torch.stack(sums)


def _shared_alone(logits: Tensor, excluded: Tensor | None) -> Tensor:
    if excluded is None or not excluded.numel():
        return logits
    return logits.index_fill(1, excluded, -torch.inf)


def _topk(
    logits: Float[Tensor, "read vocab"], spec: TargetSpec
) -> tuple[Float[Tensor, "read k"], Int[Tensor, "read k"], Int[Tensor, " read"]]:
    """Values and ids of the k largest, and how many of them are kept.

    Those are the shortest prefix whose mass at the largest temperature reaches `spec.mass`.
    """
    values, ids = torch.topk(logits, spec.k, dim=1)
    if spec.mass == 1.0:
        return values, ids, torch.full((len(values),), spec.k, device=values.device)
    hottest = spec.temperatures[-1]
    logp = values / hottest - torch.logsumexp(logits / hottest, dim=1, keepdim=True)
    short = (logp.exp().cumsum(dim=1) < spec.mass).sum(dim=1)
    return values, ids, (short + 1).clamp_max(spec.k)


def outside_mass(
    logits: Float[Tensor, "read vocab"],
    ids: Int[Tensor, "read k"],
    sizes: Int[Tensor, " read"],
    temperature: float,
) -> tuple[Float[Tensor, "read vocab"], Float[Tensor, " read"]]:
    """Probabilities at `temperature` with those of each row's kept ids set to 0, and their sum."""
    p = torch.softmax(logits / temperature, dim=1)
    kept = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
    inside = (p.gather(1, ids) * kept).sum(dim=1)
    # An id beyond the kept ones keeps its probability: the row's first, always kept, stands for it.
    return p.scatter(1, torch.where(kept, ids, ids[:, :1]), 0.0), inside


def member_matrix(
    class_of: Int[np.ndarray, " vocab"], classes: int
) -> Float[Tensor, "vocab classes"]:
    """1 where a token belongs to a class; rows of ids that are in none (−1) are 0."""
    members = torch.zeros(class_of.size, classes)
    tokens = np.flatnonzero(class_of >= 0)
    members[torch.from_numpy(tokens), torch.from_numpy(class_of[tokens].astype(np.int64))] = 1.0
    return members


def excluded_ids(shared: Bool[np.ndarray, " ids"], vocabulary: int) -> Int[np.ndarray, " excluded"]:
    """Ids below `vocabulary` that mean something else, or nothing, to the student."""
    allowed = np.zeros(vocabulary, bool)
    allowed[: len(shared)] = shared[:vocabulary]
    return np.flatnonzero(~allowed)


def refuse_nonfinite(scores: Scores, example_id: str) -> None:
    """Raise TideError where the teacher returned NaN or infinity for an example."""
    finite = np.isfinite(scores.gold_logp) & np.isfinite(scores.logsumexp)
    for values in (scores.topk_logp, scores.tail_odds, scores.class_mass):
        if values is not None:
            finite &= np.isfinite(values).reshape(len(finite), -1).all(axis=1)
    if not finite.all():
        raise TideError(
            f"the teacher returned {int((~finite).sum())} non-finite rows of {finite.size} "
            f"for example {example_id}",
            expected="finite logits",
            fix="use engine.dtype=bfloat16 or float32, check the checkpoint; shards are kept",
        )
