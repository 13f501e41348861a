"""Teachers and students at random, and the top-k targets that a cache would have of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.cache.levels import LARGEST_ODDS
from student_train.losses.targets import Classes, TopKTargets

Shape = Literal["student", "prior"]


def cached(
    teacher: Tensor,
    k: int,
    classes: int = 1,
    shape: Shape = "student",
    shared: Tensor | None = None,
    seed: int = 0,
) -> TopKTargets:
    """What is cached of `teacher` logits, exactly. `shared`: bool a token, True where both sides have it."""
    g = torch.Generator().manual_seed(seed)
    n, vocabulary = teacher.shape
    allowed = torch.ones(vocabulary, dtype=torch.bool) if shared is None else shared
    logits = teacher.masked_fill(~allowed, -torch.inf)
    _, ids = logits.topk(k, 1)
    own = torch.randint(0, classes, (vocabulary,), generator=g)
    own[~allowed] = -1
    odds, mass, prior = {}, {}, {}
    for t in (1.0, 2.0, 5.0):
        p = torch.softmax(logits / t, 1)
        outside = p.scatter(1, ids, 0.0)
        odds[t] = (outside.sum(1).log() - p.gather(1, ids).sum(1).log()).clamp(
            -LARGEST_ODDS, LARGEST_ODDS
        )
        sums = torch.zeros(n, classes, dtype=p.dtype).index_add(1, own.clamp_min(0), outside)
        mass[t] = sums.log().clamp_min(-1e30)
        prior[t] = torch.log_softmax(
            torch.randn(vocabulary, generator=g).to(p.dtype).masked_fill(~allowed, -1e30), 0
        )
    return TopKTargets(
        ids,
        torch.log_softmax(logits, 1).gather(1, ids),
        torch.ones_like(ids, dtype=torch.bool),
        odds,
        Classes(own, classes, prior),
        mass if classes > 1 else None,
        shape == "student",
    )


def dense_teacher(
    student: Tensor, teacher: Tensor, topk: TopKTargets, temperature: float
) -> Tensor:
    """Log-probabilities of the teacher over the vocabulary by the definition, token by token, in float64.

    log p in the top-k, else log M_c + log b(v) − log Σ b(u) over the tokens u of v's class outside the top-k.
    """
    assert topk.classes is not None
    own, allowed = topk.classes.class_of, topk.classes.class_of >= 0
    p = torch.log_softmax(teacher.double().masked_fill(~allowed, -torch.inf) / temperature, 1)
    q = torch.log_softmax(
        student.detach().double().masked_fill(~allowed, -torch.inf) / temperature, 1
    )
    found = torch.full_like(p, -torch.inf)
    for i in range(len(p)):
        inside = topk.ids[i].tolist()
        base = q[i] if topk.student_shaped else topk.classes.log_prior[temperature].double()
        found[i, inside] = p[i, inside]
        for c in set(own[allowed].tolist()):
            members = [u for u in range(p.shape[1]) if u not in inside and own[u] == c]
            if members:
                mass, whole = (torch.logsumexp(x[members], 0) for x in (p[i], base))
                found[i, members] = mass + base[members] - whole
    return found
