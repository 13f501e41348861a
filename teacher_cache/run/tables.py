"""What a cache knows of the teacher as a whole, made once before the first shard: its linear tail.

Of some thousand positions of the data (the pilot sample) the teacher's last hidden states h are
taken. With W the head's rows of the shared ids, p_T the teacher at T with its top-k set to 0, M the
mass of that and e = Wᵀp_T, what an error of h costs the tail, in nats, is half its square in

    F = mean over T of {Wᵀ diag(mean p_T) W − mean(e eᵀ / M)} / T²

and with S the covariance of h, the r leading eigenvectors E of F^½ S F^½ are the directions in
which the tail varies most: code = Eᵀ F^½ (h − mean h), logits = W (mean h + F^−½ E code).
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from shared.aligned.examples import Prepared
from shared.aligned.token_map import count_map
from shared.cache.levels import EMPTY
from shared.cache.manifest import load_manifest
from shared.cache.row import Tables
from shared.cache.shards import TABLES, Unit, has_tables, load_tables, save_tables
from shared.cache.stores import Store
from shared.diffusion import generator
from shared.models.loading import head_rows
from shared.system.files import TideError
from shared.system.hardware import choose_device
from shared.system.processes import hold
from teacher_cache.method import Request, TailEncoder, TargetSpec, excluded_ids, outside_of, topk_of
from teacher_cache.run.open import Run
from teacher_cache.run.work import Engine, prepare_unit

logger = logging.getLogger(__name__)
_AT_ONCE = 32  # requests of the pilot sample
_ROWS = 256  # of logits at a time
_MAP_EXAMPLES, _MAP_RUN = 30_000, 256  # for the map between tokens: in all, and side by side
_LEFT = 0.03  # share of the tail's variance that an automatic rank leaves out
_RIDGE = 1e-6  # of the mean of F's diagonal
_TINY = 1e-30
_LOOK_SECONDS = 1.0


def settle_tables(run: Run, engine: Callable[[], Engine], store: Store | None = None) -> Run:
    """The run with its tables, made where nobody has made them, and its manifest written. Ranks of
    one folder take turns by a lock; where they share only a store, rank 0 makes them.
    """
    out = run.config.out
    if run.wants_tables and not has_tables(out):
        if store is not None and run.config.rank > 0:
            logger.info("rank %d waits for the tables of rank 0", run.config.rank)
            while not has_tables(out):
                time.sleep(_LOOK_SECONDS)
                store.bring_tables(out)
        else:
            with hold(out / ".lock-tables", f"the tables of {out}", wait=True):
                if not has_tables(out):  # by the one that had the lock before
                    copy = run.config.targets.tables_from is not None
                    found = _tables_of_another(run) if copy else _make_tables(run, engine())
                    save_tables(out / TABLES, found)
    if run.wants_tables and run.tables is None:
        fingerprint = run.manifest.fingerprint
        tables = load_tables(out, fingerprint.tables)
        fingerprint = replace(fingerprint, tables=tables.digest)
        run = replace(run, manifest=replace(run.manifest, fingerprint=fingerprint), tables=tables)
    run.manifest.save(out)
    return run


def _tables_of_another(run: Run) -> Tables:
    """Those of the cache that `targets.tables_from` names. TideError where they do not fit."""
    other: Any = run.config.targets.tables_from
    theirs, ours = load_manifest(other).fingerprint, run.manifest.fingerprint
    settings = ("k", "mass", "temperatures", "rank", "step", "values", "pilot")
    wrong = [n for n in settings if getattr(theirs.targets, n) != getattr(ours.targets, n)]
    if theirs.teacher != ours.teacher:
        wrong.append("the teacher")
    if theirs.student.tokenizer != ours.student.tokenizer:
        wrong.append("the student's tokenizer")
    if wrong:
        what = f"the tables of {other} belong to other settings: {', '.join(wrong)}"
        fix = "leave out targets.tables_from, or use the same settings"
        raise TideError(what, expected="a cache of the same teacher and targets", fix=fix)
    return load_tables(other, theirs.tables)


def pilot_requests(run: Run, most: int) -> list[Request]:
    """Passes of examples from all over the data, first draw, up to about `most` positions."""
    n = run.data.examples
    spread = np.unique(np.linspace(0, n - 1, min(n, 4096)).astype(int))
    order = spread[generator(run.config.noise.seed, "pilot").permutation(len(spread))]
    pilot: list[Request] = []
    positions = 0
    for i in order.tolist():
        if positions >= most:
            break
        requests = prepare_unit(run, Unit(0, 0), run.data.between(i, i + 1)).requests
        positions += sum(len(request.read) for request in requests)
        pilot += requests
    return pilot


def _make_tables(run: Run, engine: Engine) -> Tables:
    """Take the pilot sample's hidden states, and find the tail in them."""
    targets, head = run.config.targets, head_rows(run.checkpoint, run.entry.architecture)
    requests = pilot_requests(run, targets.pilot or 8 * head.shape[1])
    starts = tqdm(range(0, len(requests), _AT_ONCE), unit="batch", desc="pilot sample")
    states = [engine.hidden_states(requests[start : start + _AT_ONCE]) for start in starts]
    hidden = torch.cat([torch.zeros(0, head.shape[1]), *states])
    if not hidden.isfinite().all():
        what = f"{run.config.teacher} returned hidden states that are not finite"
        raise TideError(what, fix="use engine.dtype=bfloat16 or float32, and check the checkpoint")
    device = choose_device(run.config.engine.device)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 4 * head.nbytes:
        device = torch.device("cpu")  # the engine has taken the GPU
    sample = Sample(hidden.to(device), head.to(device), allowed_ids(run), run.target_spec())
    step = targets.step if targets.values == "levels" else 0.0
    tables = fit_tables(sample, targets.rank, step)
    if run.entry.student_tokens or "chunks" not in targets.signals:
        return tables
    return replace(tables, token_map=count_map(map_examples(run), run.teacher, run.student))


def map_examples(run: Run, most: int = _MAP_EXAMPLES) -> Iterator[Prepared]:
    """Examples to count the map between tokens over: all, or runs from all over the data."""
    n = run.data.examples
    for start in range(0, n, _MAP_RUN * -(-n // most)):
        yield from run.data.between(start, start + _MAP_RUN)


def allowed_ids(run: Run) -> Bool[np.ndarray, " vocab"]:
    """Ids of the teacher's head that may be listed."""
    allowed = np.ones(run.checkpoint.embedding_rows, bool)
    if run.shared is not None:
        allowed[excluded_ids(run.shared.same, allowed.size)] = False
    return allowed


@dataclass(frozen=True)
class Sample:
    """Hidden states of a teacher with this head; `allowed`: ids that the student shares."""

    hidden: Float[Tensor, "n width"]
    head: Float[Tensor, "vocab width"]
    allowed: Bool[np.ndarray, " vocab"]
    spec: TargetSpec

    def tails(self) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """Some rows at a time: the states, the ids in the top-k, and at each temperature p_T, which
        is 0 in the top-k.
        """
        shared = torch.from_numpy(self.allowed).to(self.hidden.device)
        temperatures = self.spec.temperatures
        for states in self.hidden.split(_ROWS):
            logp = torch.log_softmax((states @ self.head.T).where(shared, EMPTY), dim=1)
            norms = [torch.logsumexp(logp / t, dim=1, keepdim=True) for t in temperatures]
            _, ids, sizes = topk_of(logp, self.spec)
            listed, _ = outside_of(logp, ids, sizes, temperatures)
            each = zip(temperatures, norms, strict=True)
            yield states, listed, [(logp / t - norm).exp() for t, norm in each]


@torch.inference_mode()
def fit_tables(sample: Sample, rank: int | None, step: float) -> Tables:
    """The tables from a sample. `rank` None: as many directions, in eights, as leave less than
    `_LEFT` of the tail's variance; `step` 0: coefficients stay exact.
    """
    hidden, head, temperatures = sample.hidden, sample.head, sample.spec.temperatures
    n, (vocabulary, width), device = max(1, len(hidden)), head.shape, hidden.device
    # 1. F, from sums over the sample of p_T and of e eᵀ / M; how often each id is listed.
    outside = torch.zeros(len(temperatures), vocabulary, device=device)
    products = torch.zeros(len(temperatures), width, width, device=device)
    listings = torch.zeros(vocabulary, device=device)
    for _, listed, probabilities in sample.tails():
        listings += torch.bincount(listed.flatten(), minlength=vocabulary)
        for i, p in enumerate(probabilities):
            mean = (p @ head) / p.sum(dim=1, keepdim=True).clamp_min(_TINY).sqrt()
            outside[i] += p.sum(dim=0)
            products[i] += mean.T @ mean
    fisher = torch.zeros(width, width, dtype=torch.float64, device=device)
    for temperature, total, product in zip(temperatures, outside, products, strict=True):
        information = ((head * total[:, None]).T @ head - product).double() / n
        fisher += information / temperature**2 / len(temperatures)
    # 2. Eigenvectors of F^½ S F^½, those of the largest eigenvalues first.
    center = hidden.double().sum(dim=0) / n
    spread = hidden.double() - center
    fisher.diagonal().add_(_RIDGE * fisher.diagonal().mean() + _TINY)
    values, vectors = torch.linalg.eigh((fisher + fisher.T) / 2)
    root = values.clamp_min(1e-12 * values.max()).sqrt()
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    variances, axes = torch.linalg.eigh(half @ (spread.T @ spread / n) @ half)
    variances, axes = variances.flip(0).clamp_min(0), axes.flip(1)
    if rank is None:
        left = 1 - variances.cumsum(0) / variances.sum().clamp_min(_TINY)
        rank = 8 * (int((left > _LEFT).sum()) // 8 + 1)
    axes = axes[:, :rank]
    # 3. The code of a state, and the logits of a code in int8, a scale a column.
    directions = head @ (inverse @ axes).float()  # (vocab, rank)
    scales = (directions.abs().amax(dim=0) / 127).clamp_min(_TINY)
    # Ids by how often they are listed, then by their mass outside, then by number.
    order = np.lexsort((np.arange(vocabulary), -outside[0].cpu(), -listings.cpu()))
    tables = Tables(
        rank_of=np.argsort(order).astype(np.int32), shared=sample.allowed,
        mean=(head @ center.float()).cpu().numpy(), center=center.float().cpu().numpy(),
        calibration=np.zeros((len(temperatures), vocabulary), np.float32),
        directions=(directions / scales).round().to(torch.int8).cpu().numpy(),
        scales=scales.cpu().numpy(), encoder=(axes.T @ half).float().cpu().numpy(), step=step,
    )  # fmt: skip
    # 4. The calibration: log of each token's mass outside, less that which the code gives it.
    encoder, given = TailEncoder(tables, temperatures), torch.zeros_like(outside)
    for states, listed, probabilities in sample.tails():
        code = encoder.code(states)
        for i, p in enumerate(probabilities):
            logits = encoder.tail.at(code * encoder.unit, temperatures[i])
            logits.scatter_(1, listed, EMPTY)
            given[i] += (torch.softmax(logits, dim=1) * p.sum(dim=1, keepdim=True)).sum(dim=0)
    calibration = outside.clamp_min(_TINY).log() - given.clamp_min(_TINY).log()
    return replace(tables, calibration=calibration.cpu().numpy())
