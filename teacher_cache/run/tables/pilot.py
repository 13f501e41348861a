"""The pilot sample: some thousand positions, scored before the first shard, from which the priors are taken."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from shared.cache.shards import Unit
from shared.cache.vocabulary import TABLES, Pilot, Vocabulary, save_tables
from shared.diffusion.noise import generator
from teacher_cache.engines.base import Engine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import refuse_nonfinite
from teacher_cache.run.plan import CachePlan
from teacher_cache.run.tables.classes import classes_for
from teacher_cache.run.work import prepare_unit

_AT_ONCE = 32


def pilot_requests(plan: CachePlan) -> list[Request]:
    """The passes of examples from all over the data, under their first draw, up to `targets.pilot` positions."""
    n = plan.data.examples
    spread = np.unique(np.linspace(0, n - 1, min(n, 4096)).astype(int))
    order = spread[generator(plan.config.noise.seed, "pilot").permutation(len(spread))]
    found: list[Request] = []
    positions = 0
    for i in order.tolist():
        if positions >= plan.config.targets.pilot:
            break
        requests = prepare_unit(plan, Unit(0, 0), plan.data.between(i, i + 1)).requests
        positions += sum(len(request.read) for request in requests)
        found += requests
    return found


def make_tables(plan: CachePlan, engine: Engine) -> None:
    """Score the pilot sample, cut the vocabulary into classes, and write both into the cache's folder."""
    requests = pilot_requests(plan)
    class_of, centroids = classes_for(plan)
    total = np.zeros((len(plan.config.targets.stored_temperatures), plan.checkpoint.embedding_rows))
    scores = []
    for start in tqdm(range(0, len(requests), _AT_ONCE), unit="batch", desc="pilot sample"):
        part = requests[start : start + _AT_ONCE]
        scores += engine.score(part)
        total += engine.outside(part)
    sizes, ids, logp, odds = [], [], [], []
    for one in scores:
        refuse_nonfinite(one, "of the pilot sample")
        assert one.topk_sizes is not None and one.topk_ids is not None
        assert one.topk_logp is not None and one.tail_odds is not None
        kept = np.arange(one.topk_ids.shape[1]) < one.topk_sizes[:, None]
        sizes.append(one.topk_sizes)
        ids.append(one.topk_ids[kept])
        logp.append(one.topk_logp[kept])
        odds.append(one.tail_odds)
    pilot = Pilot(*(np.concatenate(parts) for parts in (sizes, ids, logp, odds)))
    vocabulary = Vocabulary.of(class_of, total, pilot.sizes.size, pilot.ids)
    save_tables(plan.config.out / TABLES, vocabulary, pilot, centroids)
