"""`tide fidelity`: what a top-k cache costs, as the angle between its gradient and that of the teacher's full logits.

Nothing is trained. A sample is scored by the teacher with full logits; for every k and temperature on a grid the
gradient of the objective with k + 1 buckets is set beside the one with all of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.attention import full
from shared.config import CacheConfig, StudentConfig
from shared.errors import TideError
from shared.hardware import choose_device
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.objectives import KL, Tidal
from shared.padding import pad
from student_train.batches.needed import needed_places
from student_train.losses.objective import Targets, TopKTargets, objective
from student_train.model.student import masked_hidden, student_for
from teacher_cache.comp_demo import draw_for, passes, teacher_view
from teacher_cache.plan import CachePlan, make_plan
from teacher_cache.targets import TargetSpec, extract
from teacher_cache.teachers.registry import Full

_PROGRESS = 0.5


@dataclass(frozen=True)
class Fidelity:
    """One point of the grid. Cosines between the cached and the full gradient; `mass` of the teacher in the top-k."""

    k: int
    temperature: float
    mass: float
    logits: float
    hidden: float
    head: float


def measure_fidelity(
    config: CacheConfig, student: StudentConfig, ks: Sequence[int], temperatures: Sequence[float], examples: int
) -> list[Fidelity]:
    """The grid for KL with TIDAL (axis both, halfway). TideError where teacher and student share no tokenizer."""
    plan = make_plan(config, write=False)
    if plan.shared is None or not isinstance(plan.entry.attention, Full) or plan.entry.shift:
        raise TideError(
            f"{config.teacher} gives the student no top-k in its own vocabulary, or not under plain full attention",
            expected="a teacher under full attention that shares the student's tokenizer",
            fix="use such a teacher, as tiny-shared; chunk likelihoods are cached whole and lose nothing",
        )
    sample = _Sample(plan, examples)
    teacher = sample.teacher_logits(plan)
    checkpoint = None if student.checkpoint is None else open_checkpoint(student.checkpoint)
    model = student_for(student, checkpoint, plan.student, plan.manifest)
    hidden, head = sample.student_states(model, config.lengths.block)
    width = min(teacher.shape[1], head.shape[0])
    teacher, head = teacher[:, :width], head[:width]
    points = []
    for k, temperature in itertools.product(ks, temperatures):
        if k > width:
            raise TideError(f"k {k} is more than the {width} tokens of the vocabulary", expected=f"1 to {width}")
        cached, whole = (_gradient(hidden, head, teacher, sample, size, temperature) for size in (k, width))
        lse = torch.logsumexp(teacher / temperature, dim=1, keepdim=True)
        mass = (teacher.topk(k, dim=1).values / temperature - lse).exp().sum(dim=1).mean()
        pairs = zip(_spread(cached, hidden, head), _spread(whole, hidden, head), strict=True)
        cosines = [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs]
        points.append(Fidelity(k, temperature, float(mass), *cosines))
    return points


def _spread(gradient: Tensor, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for logits, hidden states and head, in float64: cosines near 1 are what is asked about."""
    exact = gradient.double()
    return exact, exact @ head.double(), exact.T @ hidden.double()


def _gradient(hidden: Tensor, head: Tensor, teacher: Tensor, sample: _Sample, k: int, temperature: float) -> Tensor:
    """The objective's gradient for the student's logits, with the teacher's `k` largest logits."""
    spec = TargetSpec(k, 1.0, tuple(sorted({1.0, temperature})))
    _, lse, _, ids, values = extract(teacher, sample.gold, spec)
    by_temperature = {t: lse[:, i] for i, t in enumerate(spec.temperatures)}
    topk = TopKTargets(ids, values, torch.ones_like(ids, dtype=torch.bool), by_temperature)
    logits = (hidden @ head.T).requires_grad_()
    settings = KL(temperature=temperature, tidal=Tidal())
    sums = objective(logits, Targets(sample.gold, sample.t, topk), settings, _PROGRESS)
    (gradient,) = torch.autograd.grad(sums.distillation, logits)
    return gradient


class _Sample:
    """The first examples of the data under their first draw, masked as a cache would have them."""

    def __init__(self, plan: CachePlan, examples: int) -> None:
        self.items = [(e, draw_for(e, plan.config.noise, 0)) for e in plan.data.between(0, examples)]
        self.items = [(e, d) for e, d in self.items if d.masked.size]
        if not self.items:
            raise TideError(f"no example of {plan.data.source} has a masked token", fix="take more examples")
        gold = np.concatenate([e.student_ids[d.masked] for e, d in self.items])
        self.gold = torch.from_numpy(gold).long()
        self.t = torch.tensor(np.repeat([d.t for _, d in self.items], [d.masked.size for _, d in self.items])).float()

    @torch.inference_mode()
    def teacher_logits(self, plan: CachePlan) -> Tensor:
        """Full logits at every masked position, from the one or two passes of CompDemo."""
        device = choose_device(plan.config.engine.device)
        model: Any = load_model(plan.checkpoint, plan.entry.architecture, torch.float32, device)
        parts = []
        for example, draw in self.items:
            view = teacher_view(example, draw)
            rows = torch.zeros(view.positions.size, model.config.vocab_size)
            for request, places in passes(view, plan.entry.mask_id, plan.config.noise.comp_demo):
                ids, valid = pad([request.ids])
                output = model.model(
                    input_ids=ids.to(device), attention_mask=full(valid).to(device), use_cache=False
                ).last_hidden_state
                rows[torch.from_numpy(places)] = model.lm_head(output[0, torch.from_numpy(request.read).long()]).cpu()
            parts.append(rows)
        return torch.cat(parts)

    @torch.no_grad()
    def student_states(self, model: Any, block: int) -> tuple[Tensor, Tensor]:
        """Hidden states at every masked position, and the head."""
        parts = []
        for example, draw in self.items:
            clean, _ = pad([example.student_ids])
            noised = clean.clone()
            noised[0, torch.from_numpy(draw.masked).long()] = model.config.mask_token_id
            places, place = needed_places([draw.masked], [len(example.student_ids)], block)
            parts.append(masked_hidden(model, noised, clean, places, torch.zeros_like(place), place, block))
        return torch.cat(parts).float(), model.lm_head.weight.detach().float()


def table(points: Sequence[Fidelity]) -> list[str]:
    """The grid in lines of Markdown."""
    lines = ["| k | T | teacher mass in top-k | cosine: logits | hidden | head |", "|---|---|---|---|---|---|"]
    cells = ((p.k, p.temperature, p.mass, p.logits, p.hidden, p.head) for p in points)
    return [*lines, *("| {} | {:g} | {:.3f} | {:.4f} | {:.4f} | {:.4f} |".format(*row) for row in cells)]
