"""Teachers and students at random, and the targets that a cache would have of them."""

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
    """What is cached of `teacher` logits, exactly. `shared`: the tokens that both models have."""
    g = torch.Generator().manual_seed(seed)
    n, vocabulary = teacher.shape
    allowed = torch.ones(vocabulary, dtype=torch.bool) if shared is None else shared
    logits = teacher.masked_fill(~allowed, -torch.inf)
    ids = logits.topk(k, 1).indices
    class_of = torch.randint(0, classes, (vocabulary,), generator=g)
    class_of[~allowed] = -1
    odds, mass, prior = {}, {}, {}
    for t in (1.0, 2.0, 5.0):
        p = torch.softmax(logits / t, 1)
        outside = p.scatter(1, ids, 0.0)
        log_odds = outside.sum(1).log() - p.gather(1, ids).sum(1).log()
        odds[t] = log_odds.clamp(-LARGEST_ODDS, LARGEST_ODDS)
        sums = torch.zeros(n, classes, dtype=p.dtype).index_add(1, class_of.clamp_min(0), outside)
        mass[t] = sums.log().clamp_min(-1e30)
        random = torch.randn(vocabulary, generator=g).to(p.dtype)
        prior[t] = torch.log_softmax(random.masked_fill(~allowed, -1e30), 0)
    return TopKTargets(
        ids,
        torch.log_softmax(logits, 1).gather(1, ids),
        torch.ones_like(ids, dtype=torch.bool),
        odds,
        Classes(class_of, classes, prior),
        mass if classes > 1 else None,
        shape == "student",
    )


def dense_teacher(student: Tensor, teacher: Tensor, topk: TopKTargets, t: float) -> Tensor:
    """The teacher's log-probabilities by the definition, token by token, in float64.

    log p in the top-k, else log M_c + log b(v) − log Σ b(u) over v's class outside the top-k.
    """
    assert topk.classes is not None
    class_of = topk.classes.class_of
    hidden = class_of < 0
    p = torch.log_softmax(teacher.double().masked_fill(hidden, -torch.inf) / t, 1)
    q = torch.log_softmax(student.detach().double().masked_fill(hidden, -torch.inf) / t, 1)
    dense = torch.full_like(p, -torch.inf)
    for i in range(len(p)):
        inside = topk.ids[i].tolist()
        shape = q[i] if topk.student_shaped else topk.classes.log_prior[t].double()
        dense[i, inside] = p[i, inside]
        for c in set(class_of[~hidden].tolist()):
            members = [u for u in range(p.shape[1]) if u not in inside and class_of[u] == c]
            if members:
                mass, whole = (torch.logsumexp(x[members], 0) for x in (p[i], shape))
                dense[i, members] = mass + shape[members] - whole
    return dense
