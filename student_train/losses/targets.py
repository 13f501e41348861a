"""What the losses know of the teacher, as tensors: at each masked position, in each active chunk.

`slice_targets` cuts them by rows, so that logits need not exist for a whole batch. Cached of the
teacher are its top-k and, for the rest, coefficients of a linear tail (`shared.cache.tail`); the
dense teacher is made of them here (`teacher_log_weights`), beside the student's logits.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.cache.levels import EMPTY
from shared.cache.row import TokenMap
from shared.cache.tail import LinearTail


@dataclass(frozen=True)
class StudentTokens:
    """The counted map E on a device, for a teacher with a tokenizer of its own: by place d a
    sparse matrix of E[t, d](s), and of each t the share 1 − Σ_s E[t, d](s) that leads nowhere.
    """

    shares: Mapping[int, Float[Tensor, "student_vocab teacher_vocab"]]
    lost: Mapping[int, Float[Tensor, " teacher_vocab"]]

    @classmethod
    def of(cls, token_map: TokenMap, teacher_vocab: int, student_vocab: int) -> "StudentTokens":
        shares, lost = {}, {}
        for place in np.unique(token_map.place).tolist():
            here = token_map.place == place
            columns = (token_map.student[here], token_map.token[here], token_map.share[here])
            student, teacher, share = map(torch.from_numpy, columns)
            places = torch.stack([student, teacher]).long()
            size = (student_vocab, teacher_vocab)
            shares[place] = torch.sparse_coo_tensor(places, share, size, check_invariants=False)
            shares[place] = shares[place].coalesce()
            mapped = torch.zeros(teacher_vocab, dtype=torch.float64)
            mapped.index_add_(0, teacher.long(), share.double())
            lost[place] = (1 - mapped).clamp_min(0)
        return cls(shares, lost)

    def to(self, device: torch.device) -> "StudentTokens":
        both = [{d: x.to(device) for d, x in each.items()} for each in (self.shares, self.lost)]
        return StudentTokens(*both)


@dataclass(frozen=True)
class TopKTargets:
    """The teacher at the first n masked positions: all of them, or those at which it was read."""

    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]  # at T = 1 in nats, up to a constant of the row
    kept: Bool[Tensor, "n k"]  # False at padding, where `ids` repeats the row's first id
    code: Float[Tensor, "n rank"]  # coefficients of the tail
    level: Mapping[float, Float[Tensor, " n"]]  # by temperature, on the scale of logp / T
    tail: LinearTail
    # Of a teacher with a tokenizer of its own, which was read at these positions' owners: the place
    # of each in its owner, in host memory; and the map.
    place: Int[np.ndarray, " n"] | None = None
    words: StudentTokens | None = None

    @classmethod
    def whole(
        cls, logits: Float[Tensor, "n vocab"], shared: Bool[Tensor, " vocab"]
    ) -> "TopKTargets":
        """The teacher's full logits: all shared ids are listed, and nothing is outside."""
        ids = shared.nonzero().squeeze(1).expand(len(logits), -1)
        logp = torch.log_softmax(logits.gather(1, ids), dim=1)
        nothing = logits.new_zeros(len(logits), 0)
        empty = logits.new_full((shared.shape[0],), EMPTY)
        tail = LinearTail(empty.new_zeros(shared.shape[0], 0), {1.0: empty}, ~shared)
        kept = torch.ones_like(ids, dtype=torch.bool)
        return cls(ids, logp, kept, nothing, {1.0: logits.new_zeros(len(logits))}, tail)


@dataclass(frozen=True)
class MappedTargets:
    """The teacher in the student's tokens: A(s) = Σ_t p_T(t)·E[t, d](s), and what maps nowhere."""

    mass: Float[Tensor, "n vocab"]
    rest: Float[Tensor, " n"]


@dataclass(frozen=True)
class ChunkTargets:
    """Active chunks. Token j of them stands at masked row `rows[j]`, in chunk `chunk_of[j]`.

    Both rise with j. `host`, where given, is the two as an array (2, tokens) in host memory: slices
    are then cut without waiting for the device.
    """

    rows: Int[Tensor, " tokens"]
    chunk_of: Int[Tensor, " tokens"]
    teacher_logp: Float[Tensor, " chunks"]
    t: Float[Tensor, " chunks"]
    host: np.ndarray | None = None


@dataclass(frozen=True)
class Targets:
    """What the losses need of a batch besides the student's logits at its n masked positions."""

    gold: Int[Tensor, " n"]
    t: Float[Tensor, " n"]
    topk: TopKTargets | MappedTargets | None = None
    chunks: ChunkTargets | None = None


def rows_of(topk: TopKTargets, part: slice) -> TopKTargets:
    """The targets of some rows, as views."""
    level = {t: values[part] for t, values in topk.level.items()}
    rows = {name: getattr(topk, name)[part] for name in ("ids", "logp", "kept", "code")}
    place = None if topk.place is None else topk.place[part]
    return replace(topk, level=level, place=place, **rows)


def slice_targets(targets: Targets, size: int) -> Iterator[tuple[slice, Targets]]:
    """The targets cut into runs of about `size` rows, none of which parts the rows of one chunk.

    Sums over the parts add up to those over the whole.
    """
    n, chunks = targets.gold.shape[0], targets.chunks
    # 1. Rows and chunks of the chunks' tokens, in host memory.                        (2, tokens)
    tokens = np.zeros((2, 0), np.int64)
    if chunks is not None:
        tokens = chunks.host
        if tokens is None:
            tokens = torch.stack([chunks.rows, chunks.chunk_of]).cpu().numpy()
    rows, owner = tokens

    # 2. Edges 0 … n: steps of `size`, moved back to where two rows are not of one chunk, or
    # forward where one chunk alone is longer than a slice.
    inside = np.zeros(n + 1, bool)
    inside[rows[1:][owner[1:] == owner[:-1]]] = True
    allowed = np.flatnonzero(~inside)
    edges = [0]
    while edges[-1] < n:
        i = int(np.searchsorted(allowed, edges[-1] + size, side="right")) - 1
        if allowed[i] <= edges[-1]:
            i += 1
        edges.append(int(allowed[i]))

    # 3. Each part's own rows, chunks and tokens, counted from its first. Since rows and chunks
    # rise, these are views.
    for start, end in itertools.pairwise(edges):
        part, own = slice(start, end), None
        if chunks is not None:
            first, last = (int(i) for i in np.searchsorted(rows, [start, end]))
            low, high = 0, 0
            if last > first:
                low, high = int(owner[first]), int(owner[last - 1]) + 1
            own = ChunkTargets(
                chunks.rows[first:last] - start,
                chunks.chunk_of[first:last] - low,
                chunks.teacher_logp[low:high],
                chunks.t[low:high],
            )
        topk = rows_of(targets.topk, part) if isinstance(targets.topk, TopKTargets) else None
        yield part, Targets(targets.gold[part], targets.t[part], topk, own)


def in_student_tokens(targets: Targets, temperature: float, dtype: torch.dtype) -> Targets:
    """The targets with a teacher of another tokenizer read in the student's tokens."""
    topk = targets.topk
    if not isinstance(topk, TopKTargets) or topk.words is None or topk.place is None:
        return targets
    # 1. p_T over the teacher's own tokens.                                      (n, teacher_vocab)
    teacher = torch.softmax(teacher_log_weights(topk, temperature, dtype), dim=1)
    first = next(iter(topk.words.shares.values()))
    mass = teacher.new_zeros(len(teacher), first.shape[0])
    rest = teacher.new_ones(len(teacher))
    # 2. All rows of one place together: A = p · E_d.                            (rows of d, vocab)
    for place in np.unique(topk.place).tolist():
        if place in topk.words.shares:
            rows = torch.from_numpy(np.flatnonzero(topk.place == place)).to(mass.device)
            own = teacher[rows]
            shares = topk.words.shares[place].to(dtype)
            mass[rows] = torch.sparse.mm(shares, own.T.contiguous()).T
            rest[rows] = own @ topk.words.lost[place].to(dtype)
    return replace(targets, topk=MappedTargets(mass, rest))


def log_student(
    logits: Float[Tensor, "n vocab"], topk: TopKTargets | MappedTargets, temperature: float
) -> Float[Tensor, "n vocab"]:
    """The student's log-probabilities at `temperature` over the shared ids; EMPTY at the others."""
    scaled = logits / temperature
    if isinstance(topk, TopKTargets) and topk.tail.unshared is not None:
        scaled.masked_fill_(topk.tail.unshared, EMPTY)
    return torch.log_softmax(scaled, dim=1)


def teacher_log_weights(
    topk: TopKTargets, temperature: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n vocab"]:
    """The dense teacher log p̂ at `temperature` up to a constant of each row, in nats:

    log p(v) / T        v in the top-k
    x_T(v) + L_T        all others, about EMPTY at unshared ids
    """
    # 1. x_T + L_T, the tail. At a temperature that was not cached: (x_1 + L_1) / T.      (n, vocab)
    at = temperature if temperature in topk.level else 1.0
    dense = topk.tail.at(topk.code.to(dtype), at).add_(topk.level[at][:, None])
    if at != temperature:
        dense.div_(temperature)
    # 2. The top-k in its places. Padding repeats the row's first id, and writes its value.   (n, k)
    top = (topk.logp / temperature).to(dense.dtype)
    top = torch.where(topk.kept, top, top[:, :1])
    return dense.scatter_(1, topk.ids, top)
