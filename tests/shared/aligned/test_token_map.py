"""The counted map: owners against a loop over bytes, its counts, the loss in float64."""

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.alignment import align_bytes, token_boundaries
from shared.aligned.token_map import count_map, owners
from shared.cache.manifest import load_manifest
from shared.cache.row import TokenMap
from shared.cache.shards import Unit, load_tables, save_tables
from shared.settings.config import KL, ReverseKL, Tidal
from student_train.batches.collate import TargetReader, collate
from student_train.losses.divergence import strength_at, timestep_weight, training_strength
from student_train.losses.objective import Counts, LossSettings, fused_loss, objective, total
from student_train.losses.targets import StudentTokens, Targets, teacher_log_weights
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from tests.conftest import chats_file, small_cache_config
from tests.reading import layout_of, rows_in
from tests.student_train.losses.test_divergence import cached

OBJECTIVES = (KL(1.0), KL(2.0, Tidal(timestep_weight="midrange")), ReverseKL(1.5), ReverseKL(1.0))
lengths = st.lists(st.integers(1, 5), min_size=1, max_size=12)


@given(lengths, lengths)
def test_an_owner_has_most_bytes_in_common(theirs: list[int], own: list[int]) -> None:
    """Over two tokenisations of one text; of two with as many, the later."""
    n = min(sum(theirs), sum(own))
    sizes = np.array(theirs), np.array(own)
    edges = [token_boundaries(x) for x in sizes]
    chunks = align_bytes(edges[0], edges[1], n)
    covered = {(e, j) for a, b, c, d in chunks.tolist() for j in range(c, d) for e in range(a, b)}
    found = [x.tolist() for x in owners(chunks, *sizes)]
    assert found[0] == sorted({j for _, j in covered})
    teacher, student = ([set(range(e[i], e[i + 1])) for i in range(len(e) - 1)] for e in edges)
    before = Counter[int]()  # tokens of an owner
    for j, owner, place in zip(*found, strict=True):
        common = {i: len(teacher[i] & student[j]) for i, at in covered if at == j}
        assert owner == max(common, key=lambda i: (common[i], i))
        behind = max(-8, min(8, edges[1][j] - edges[0][owner]))
        assert place == (8 + min(before[owner], 15) if before[owner] else behind)
        before[owner] += 1


def test_the_map_of_a_cache_counts_its_text(random_teacher: Path, tmp_path: Path) -> None:
    """Shares are those of the text, at most 8 of a pair; a token that never stands in it is spelled
    as the student does; tables are read as they were written.
    """
    targets = {"signals": ("topk", "chunks"), "k": 4, "rank": 2, "pilot": 100}
    changes = {"data": {"source": str(chats_file()), "limit": 12}, "noise": {"draws": 1}}
    out = tmp_path / "cache"
    config = small_cache_config("tiny-cross", random_teacher, out, targets=targets, **changes)
    build_cache(config)
    run = open_or_begin(config)
    found: Any = load_tables(out).token_map
    counted: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for example in run.data.between(0, 12):
        theirs, own = example.teacher_ids, example.student_ids
        assert theirs is not None
        sizes = found.teacher_bytes[theirs], found.student_bytes[own]
        for j, i, d in zip(*owners(example.chunks, *sizes), strict=True):
            counted[int(theirs[i]), int(d)][int(own[j])] += 1
    entries: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for t, d, s, share in zip(found.token, found.place, found.student, found.share, strict=True):
        entries[int(t), int(d)][int(s)] = float(share)
    for pair, counts in counted.items():
        kept = dict(counts.most_common(8))
        assert sorted(entries[pair].values()) == [
            np.float32(n / counts.total()) for n in sorted(kept.values())
        ]
        assert all(abs(entries[pair][s] * counts.total() - counts[s]) < 1e-3 for s in entries[pair])
    # Spelled: the first token of every token's own bytes, and the end of a turn.
    plain = [t for t, b in enumerate(run.teacher.token_bytes) if t not in run.teacher.added_ids]
    unseen = [t for t in plain if (t, 0) not in counted]
    assert unseen and all((t, 0) in entries for t in plain)
    for t in unseen[:: len(unseen) // 50]:
        (first,) = entries[t, 0]
        assert run.teacher.token_bytes[t].startswith(run.student.token_bytes[first])
    (end,) = entries[run.teacher.turn_ends[0], 0]
    assert end == run.student.turn_ends[0]
    again = dataclasses.replace(load_tables(out), step=0.5)
    save_tables(tmp_path / "tables", again)
    assert load_tables(tmp_path).digest == again.digest != load_tables(out).digest
    other = count_map(run.data.between(0, 3), run.teacher, run.student)
    assert dataclasses.replace(again, token_map=other).digest != again.digest

    # Batches of it: each token of a chunk has its owner's teacher; the rest of what is masked none.
    manifest = load_manifest(out)
    rows: list[Any] = rows_in(out, Unit(0, 0))
    batch = collate(rows, manifest, found)
    read: Any = TargetReader(layout_of(out), 2048)(batch)
    at, n, ids = 0, len(read.topk.ids), np.concatenate([r.topk_ids for r in rows]).reshape(-1, 4)
    covered = []
    for row in rows:
        sizes = found.teacher_bytes[row.teacher_ids], found.student_bytes[row.student_ids]
        position, owner, place = owners(row.chunks, *sizes)
        for j, i, d in zip(position, owner, place, strict=True):
            first = sum(len(r.teacher_masked) for r in rows[: rows.index(row)])
            where = first + row.teacher_masked.tolist().index(i)
            assert read.topk.ids[at].tolist() == ids[where].tolist()
            assert (read.topk.place[at], batch["column"][at]) == (d, j)
            at += 1
        covered.append(len(position))
    masked = sum(row.masked.size for row in rows)
    assert at == n == sum(covered) < len(batch["gold"]) == masked == int(batch["counts"][1])
    for settings in OBJECTIVES:
        x = torch.randn(masked, 2048, requires_grad=True)
        sums = objective(x, read, settings, 0.5)
        (slope,) = torch.autograd.grad(sums.distillation, x)
        assert sums.distillation.isfinite() and slope.isfinite().all() and slope[n:].any()


def random_map(random: np.random.Generator, teacher: int, student: int) -> TokenMap:
    """Some tokens lead to some others at places 0 and 2, none of them wholly."""
    entries = []
    for place in (0, 2):
        for t in random.permutation(teacher)[: teacher - 2]:
            own = random.permutation(student)[: random.integers(1, 4)]
            shares = random.dirichlet(np.ones(len(own) + 1))
            entries += [(t, place, s, p) for s, p in zip(own, shares[:-1], strict=True)]
    token, place, own, share = (np.array(x) for x in zip(*entries, strict=True))
    ids, ones = [x.astype(np.int32) for x in (token, place, own)], np.ones(40, np.int32)
    lengths = ones[:teacher], ones[:student]
    return TokenMap(ids[0], ids[1], ids[2], share.astype(np.float32), *lengths)


def definition(
    x: torch.Tensor,
    targets: Targets,
    token_map: TokenMap,
    settings: KL | ReverseKL,
    progress: float,
) -> torch.Tensor:
    """Token by token, in float64: r(s) = Σ_t p(t)·E[t, d](s), and what is left as the student."""
    topk: Any = targets.topk
    temperature, tidal = settings.temperature, settings.tidal
    p = torch.softmax(teacher_log_weights(topk, temperature, torch.float64), 1)
    whole = x.new_zeros(())
    for i in range(len(x)):
        t, logq = targets.t[i : i + 1], torch.log_softmax(x[i] / temperature, 0)
        weight, part = 1.0, 1.0
        if tidal is not None:
            weight = float(timestep_weight(tidal.timestep_weight, t))
            part = float(strength_at(tidal, training_strength(tidal, progress), t))
        if i >= len(p):
            whole = whole - weight * part * torch.log_softmax(x[i], 0)[targets.gold[i]]
            continue
        r = torch.zeros(x.shape[1], dtype=torch.float64)
        for token, d, own, share in zip(
            token_map.token, token_map.place, token_map.student, token_map.share, strict=True
        ):
            if d == topk.place[i]:
                r[own] += float(p[i, token]) * float(share)
        r = r + (1 - r.sum()) * logq.detach().exp()
        r = torch.softmax((1 - part) * logq.detach() + part * r.log(), 0)
        other = (
            (logq.exp() * (logq - r.log()))
            if isinstance(settings, ReverseKL)
            else r * (r.log() - logq)
        )
        whole = whole + temperature**2 * weight * other.sum()
    return whole


@given(st.integers(0, 999), st.sampled_from(OBJECTIVES), st.integers(0, 5))
def test_value_and_gradient_through_the_map_against_the_definition(
    seed: int, settings: KL | ReverseKL, read: int
) -> None:
    """In slices and whole, float64 and float32; at places of which nothing is known, and with
    masked positions that no chunk covers.
    """
    random, n, teacher, student = np.random.default_rng(seed), 6, 12, 9
    words = random_map(random, teacher, student)
    torch.manual_seed(seed)
    z, hidden, head = torch.randn(read, teacher) * 2, torch.randn(n, 5), torch.randn(student, 5)
    gold, t = torch.randint(0, student, (n,)), torch.rand(n).double() * 0.9 + 0.05
    place = random.choice([0, 2, -1], read)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        topk = cached(z.to(dtype), 4, 3, torch.ones(teacher, dtype=torch.bool), seed)
        tokens = StudentTokens.of(words, teacher, student)
        topk = dataclasses.replace(topk, place=place, words=tokens)
        targets = Targets(gold, t.to(dtype), topk)
        x = (hidden.double() @ head.double().T).requires_grad_()
        value = definition(x, targets, words, settings, 0.5)
        (expected,) = torch.autograd.grad(value, x)
        logits = x.detach().to(dtype).requires_grad_()
        found = objective(logits, targets, settings, 0.5).distillation
        (slope,) = torch.autograd.grad(found, logits)
        torch.testing.assert_close(
            found.detach().double(), value.detach(), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(slope.double(), expected, rtol=tolerance, atol=tolerance)
        # In slices, with the head.
        counts = Counts(*torch.tensor([7.0, 6.0, 1.0]))
        how = LossSettings(settings, 3.0, counts, 0.5)
        states = hidden.to(dtype).requires_grad_()
        loss, _ = fused_loss(states, head.to(dtype), targets, how, rows_per_slice=2)
        whole = total(
            objective(states @ head.to(dtype).T, targets, settings, 0.5), counts, settings, 3.0
        )
        torch.testing.assert_close(loss, whole, rtol=tolerance, atol=tolerance)
        for a, b in zip(*(torch.autograd.grad(v, states) for v in (loss, whole)), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(st.integers(0, 999), st.sampled_from(OBJECTIVES))
def test_the_identity_is_plain_kl(seed: int, settings: KL | ReverseKL) -> None:
    torch.manual_seed(seed)
    ids, every = np.arange(20, dtype=np.int32), torch.ones(20, dtype=torch.bool)
    words = TokenMap(ids, 0 * ids, ids, np.ones(20, np.float32), 0 * ids, 0 * ids)
    x, gold, t = torch.randn(4, 20).double(), torch.zeros(4).long(), torch.rand(4)
    topk = cached(torch.randn(4, 20).double() * 3, 5, 3, every, seed)
    tokens = StudentTokens.of(words, 20, 20)
    mapped = dataclasses.replace(topk, place=np.zeros(4, int), words=tokens)
    values = []
    for one in (topk, mapped):
        logits = x.clone().requires_grad_()
        value = objective(logits, Targets(gold, t, one), settings, 0.3).distillation
        values.append((value, *torch.autograd.grad(value, logits)))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
