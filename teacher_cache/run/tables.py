"""What a cache knows of the teacher's vocabulary as a whole, made once before the first shard.

Some thousand positions of the data (the pilot sample) are scored; from them come each token's mean
probability outside of the top-k (the prior) and the order of ids by how often they are listed. The
vocabulary is cut into classes: tokens that a head treats alike.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from shared.cache import shards as tables
from shared.cache.manifest import load_manifest
from shared.cache.row import Pilot, Vocabulary
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.diffusion import generator
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import architecture_of, head_rows
from shared.system.files import TideError
from shared.system.processes import hold
from teacher_cache.method import Request, excluded_ids, refuse_nonfinite
from teacher_cache.run.open import Run
from teacher_cache.run.work import Engine, prepare_unit

logger = logging.getLogger(__name__)
_ROUNDS = 30  # of k-means, at most
_AT_ONCE = 32  # requests of the pilot sample
_LOOK_SECONDS = 1.0


def settle_tables(run: Run, engine: Callable[[], Engine], store: Store | None = None) -> Run:
    """The run with its tables, made where nobody has made them, and its manifest written.

    Ranks that share a folder take turns by a lock. Where they share only a store, rank 0 makes the
    tables and the others wait for them.
    """
    out = run.config.out
    if run.wants_tables and not tables.has_tables(out):
        if store is not None and run.config.rank > 0:
            logger.info("rank %d waits for the tables of rank 0", run.config.rank)
            store.bring_tables(out)
            while not tables.has_tables(out):
                time.sleep(_LOOK_SECONDS)
                store.bring_tables(out)
        else:
            with hold(out / ".lock-tables", f"the tables of {out}", wait=True):
                if not tables.has_tables(out):  # by the one that had the lock before
                    copy = run.config.targets.tables_from is not None
                    found = _tables_of_another(run) if copy else _make_tables(run, engine())
                    tables.save_tables(out / tables.TABLES, *found)
    if run.wants_tables and run.vocabulary is None:
        fingerprint = run.manifest.fingerprint
        vocabulary = tables.load_vocabulary(out, fingerprint.tables)
        fingerprint = replace(fingerprint, tables=vocabulary.digest)
        manifest = replace(run.manifest, fingerprint=fingerprint)
        run = replace(run, manifest=manifest, vocabulary=vocabulary)
    run.manifest.save(out)
    return run


def _tables_of_another(run: Run) -> tuple[Vocabulary, Pilot, np.ndarray]:
    """Those of the cache that `targets.tables_from` names. TideError where they do not fit."""
    other: Any = run.config.targets.tables_from
    theirs, ours = load_manifest(other).fingerprint, run.manifest.fingerprint
    settings = ("k", "mass", "temperatures", "classes", "classes_from", "pilot")
    wrong = [n for n in settings if getattr(theirs.targets, n) != getattr(ours.targets, n)]
    if theirs.teacher != ours.teacher:
        wrong.append("the teacher")
    if wrong:
        raise TideError(
            f"the tables of {other} belong to other settings: {', '.join(wrong)}",
            expected="a cache of the same teacher with the same targets",
            fix="leave out targets.tables_from, or use the same settings",
        )
    vocabulary = tables.load_vocabulary(other, theirs.tables)
    return vocabulary, tables.load_pilot(other), tables.load_centroids(other)


def _make_tables(run: Run, engine: Engine) -> tuple[Vocabulary, Pilot, np.ndarray]:
    """Score the pilot sample, and cut the vocabulary into classes with these centres."""
    requests = pilot_requests(run)
    class_of, centroids = classes_for(run)
    temperatures = run.config.targets.stored_temperatures
    outside = np.zeros((len(temperatures), run.checkpoint.embedding_rows))
    sizes, ids, logp, odds = [], [], [], []
    for start in tqdm(range(0, len(requests), _AT_ONCE), unit="batch", desc="pilot sample"):
        batch = requests[start : start + _AT_ONCE]
        for scores in engine.score(batch):
            refuse_nonfinite(scores, "of the pilot sample")
            assert scores.topk_sizes is not None and scores.topk_ids is not None
            assert scores.topk_logp is not None and scores.tail_odds is not None
            kept = np.arange(scores.topk_ids.shape[1]) < scores.topk_sizes[:, None]
            sizes.append(scores.topk_sizes)
            ids.append(scores.topk_ids[kept])
            logp.append(scores.topk_logp[kept])
            odds.append(scores.tail_odds)
        outside += engine.outside(batch)
    pilot = Pilot(*(np.concatenate(parts) for parts in (sizes, ids, logp, odds)))
    vocabulary = Vocabulary.of(class_of, outside, pilot.sizes.size, pilot.ids)
    return vocabulary, pilot, centroids


def pilot_requests(run: Run) -> list[Request]:
    """Passes of examples from all over the data, first draw, up to `targets.pilot` positions."""
    n = run.data.examples
    spread = np.unique(np.linspace(0, n - 1, min(n, 4096)).astype(int))
    order = spread[generator(run.config.noise.seed, "pilot").permutation(len(spread))]
    pilot: list[Request] = []
    positions = 0
    for i in order.tolist():
        if positions >= run.config.targets.pilot:
            break
        requests = prepare_unit(run, Unit(0, 0), run.data.between(i, i + 1)).requests
        positions += sum(len(request.read) for request in requests)
        pilot += requests
    return pilot


def classes_for(run: Run) -> tuple[Int[np.ndarray, " vocab"], Float[np.ndarray, "classes width"]]:
    """The class of every id of the teacher's vocabulary (−1: not shared), and the classes' centres,
    from the head of `targets.classes_from`, else the teacher's own.
    """
    targets, shared = run.config.targets, run.shared_ids()
    allowed = np.ones(run.checkpoint.embedding_rows, bool)
    if shared is not None:
        allowed[excluded_ids(shared, allowed.size)] = False
    if targets.classes == 1:
        return np.where(allowed, 0, -1).astype(np.int32), np.zeros((1, 1), np.float32)
    if targets.classes_from is None:
        rows = head_rows(run.checkpoint, run.entry.architecture)
    else:
        checkpoint = open_checkpoint(resolve(targets.classes_from))
        rows = head_rows(checkpoint, architecture_of(checkpoint))
    if len(rows) <= int(np.flatnonzero(allowed).max()):
        raise TideError(
            f"targets.classes_from {targets.classes_from} has a head of {len(rows):,} rows",
            expected=f"a row for each of the {int(allowed.sum()):,} tokens that both sides share",
            fix="name the student's checkpoint, or leave it out",
        )
    return cluster(rows, allowed, targets.classes)


def cluster(
    rows: Float[Tensor, "rows width"], allowed: Bool[np.ndarray, " vocab"], classes: int
) -> tuple[Int[np.ndarray, " vocab"], Float[np.ndarray, "classes width"]]:
    """k-means over the unit vectors of the `allowed` rows; the same every time."""
    from sklearn.cluster import KMeans

    if classes > allowed.sum():
        raise TideError(
            f"targets.classes is {classes}, and there are {int(allowed.sum())} tokens",
            fix="lower it: --set targets.classes=1",
        )
    chosen = np.flatnonzero(allowed)
    unit = F.normalize(rows[chosen], dim=1).numpy()
    means: Any = KMeans(classes, n_init="auto", max_iter=_ROUNDS, random_state=0).fit(unit)
    class_of = np.full(allowed.size, -1, np.int32)
    class_of[chosen] = means.labels_
    # From the labels, not from the library, whose sums depend on the number of threads.
    centres = [unit[means.labels_ == c].mean(axis=0, dtype=np.float64) for c in range(classes)]
    return class_of, np.stack(centres).astype(np.float32)
