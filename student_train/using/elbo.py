"""Log-likelihood of continuations, bounded from below by the diffusion ELBO of block diffusion.

For a block of n tokens the bound is E over l uniform in 1 … n, and over sets S of l masked
positions, of (n / l) · Σ_{i in S} log p(x_i | rest of the block, earlier blocks): the mean, over
all orders in which the block's tokens can be revealed, of the log-probability of revealing them in
that order (LLaDA, BD3LM). Blocks add up, and a block of one token is exact. As in sampling, blocks
are counted from the context's beginning, so that its last tokens may stand, clean, in the first
block that is scored; the part of the last block behind the continuation is masked.

The sets depend on the seed, the block and the draw alone. Answers to one question are thus compared
under the same noise, and a score does not depend on what else is in the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from student_train.using.decoding import pad_left
from student_train.using.settings import Ids, SampleConfig, Special
from student_train.using.student import LoadedStudent, sample_steps

_TOKENS_PER_PASS = 2048  # of noised copies; more at once would mostly add masked attention
_LOGITS_PER_SLICE = 1 << 26


@dataclass(frozen=True)
class ElboConfig:
    """`draws` masks for each block (more lower the variance), `block` as in training."""

    draws: int = 32
    block: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.block < 1:
            raise ValueError(f"draws is {self.draws}, block {self.block}; both must be positive")


class _Copy(NamedTuple):
    owner: int  # its continuation
    number: int  # of the block in it
    tokens: list[int]
    gold: list[int]  # −1 where nothing is scored
    weight: float


Question = tuple[Ids, Sequence[Ids]]
"""A context and the continuations to score behind it."""


@torch.no_grad()
def log_likelihoods(
    model: Any, questions: Sequence[Question], special: Special, config: ElboConfig
) -> list[list[float]]:
    """Lower bounds of log p(continuation | context), in nats, by question, each of which scores as
    alone. ValueError where a context or a continuation is empty.
    """
    for context, continuations in questions:
        if not (context and continuations and all(continuations)):
            raise ValueError("the context or a continuation is empty; each needs a token at least")
    # 1. Every block of every continuation under every draw of its masks.
    copies: list[list[_Copy]] = [[] for _ in questions]
    for row, (context, continuations) in enumerate(questions):
        tail = context[len(context) // config.block * config.block :]
        for owner, tokens in enumerate(continuations):
            ids = torch.tensor([*tail, *tokens])
            for index, block in enumerate(ids.split(config.block)):
                given, behind = 0 if index else len(tail), config.block - len(block)
                for chosen, weight in masks(len(block) - given, index, config):
                    mask = pad(chosen, (given, 0))  # False at the context's
                    noised = block.masked_fill(mask, special.mask).tolist()
                    gold = block.masked_fill(~mask, -1).tolist() + [-1] * behind
                    noised += [special.mask] * behind
                    copies[row].append(_Copy(owner, index, noised, gold, weight))
    # 2. What is clean goes through the model once, and stays in the cache.
    clean = _Clean(model, questions, special, config.block)
    # 3. The copies are run against it, so many at a time; their scores add up by continuation.
    scores = [torch.zeros(len(row), dtype=torch.float64) for _, row in questions]
    per_pass = max(1, _TOKENS_PER_PASS // (config.block * len(questions)))
    for start in range(0, max(map(len, copies)), per_pass):
        parts = [row[start : start + per_pass] for row in copies]
        for score, part, values in zip(scores, parts, clean.score(parts), strict=True):
            owners = torch.tensor([copy.owner for copy in part], dtype=torch.long)
            score.index_add_(0, owners, values.double().cpu())
    return [score.tolist() for score in scores]


def masks(
    length: int, index: int, config: ElboConfig
) -> list[tuple[Bool[Tensor, " length"], float]]:
    """Masked sets of block `index`, of n = `length` tokens, and weights, n / (l · draws): l is
    stratified over the draws, each of 1 … n equally likely over seeds.
    """
    if length == 1:
        return [(torch.ones(1, dtype=torch.bool), 1.0)]
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    shift = float(torch.rand(1, generator=generator, dtype=torch.float64))
    order = torch.rand(config.draws, config.block, generator=generator).argsort(dim=1)
    sets = []
    for draw in range(config.draws):
        count = 1 + min(length - 1, int(length * (draw + shift) / config.draws))
        mask = torch.zeros(length, dtype=torch.bool)
        mask[order[draw][order[draw] < length][:count]] = True
        sets.append((mask, length / count / config.draws))
    return sets


_CONTEXT, _NOBODY = -1, -2  # owners of a context's positions, and of padding


class _Clean:
    """Contexts and clean blocks of all continuations in the key-value cache. A row is a question:
    the whole blocks of its context, behind padding; the clean blocks of each continuation, the
    first with the rest of the context; then padding. Positions are those that each has alone.
    """

    def __init__(
        self, model: Any, questions: Sequence[Question], special: Special, block: int
    ) -> None:
        self._model, self._block, self._special = model, block, special
        self._device = model.get_input_embeddings().weight.device
        # 1. Contexts, [row, width]; a continuation's first block begins at `start`.
        starts = [len(context) // block * block for context, _ in questions]
        whole = [context[:start] for (context, _), start in zip(questions, starts, strict=True)]
        contexts, valid = pad_left(whole, block, special.mask)
        width = contexts.shape[1]
        self._start = torch.tensor(starts)
        context_position = torch.arange(width)[None] - (width - self._start)[:, None]
        # 2. Behind them all blocks but the last of each continuation: its number, place and token.
        rows = []
        for (context, continuations), start in zip(questions, starts, strict=True):
            entries = []
            for owner, tokens in enumerate(continuations):
                ids = [*context[start:], *tokens]
                finished = ids[: (len(ids) - 1) // block * block]
                entries += [(owner, at, token) for at, token in enumerate(finished)]
            rows.append(entries)
        longest = max(map(len, rows))
        filled = [row + [(_NOBODY, 0, special.mask)] * (longest - len(row)) for row in rows]
        behind = torch.tensor(filled, dtype=torch.long).reshape(len(rows), longest, 3)
        owner, at, tokens = behind.unbind(dim=2)
        # 3. Whose each position is, where it stands, and whether it may be seen: [row, clean].
        self._owner = torch.cat([torch.full_like(contexts, _CONTEXT), owner], dim=1)
        position = torch.cat([context_position, self._start[:, None] + at], dim=1)
        self._position = position.clamp(min=0)
        self._seen = torch.cat([valid, owner != _NOBODY], dim=1)
        # 4. One pass over all of it.
        self._cache = DynamicCache()
        mask = self._mask(self._owner, self._position, own_block=True)
        self._run(torch.cat([contexts, tokens], dim=1), self._position, mask)

    def _mask(
        self, owner: Int[Tensor, "row query"], position: Int[Tensor, "row query"], own_block: bool
    ) -> Bool[Tensor, "row query clean"]:
        """Which clean positions are seen: the context's and one's own, of earlier blocks."""
        key_owner = self._owner[:, None]
        mine = (key_owner == owner[:, :, None]) | (key_owner == _CONTEXT)
        query, key = position[:, :, None] // self._block, self._position[:, None] // self._block
        return mine & ((key <= query) if own_block else (key < query)) & self._seen[:, None]

    def _run(
        self, ids: Int[Tensor, "row n"], at: Int[Tensor, "row n"], mask: Bool[Tensor, "row n keys"]
    ) -> Float[Tensor, "row n width"]:
        own = torch.arange(ids.shape[1])
        # Padding sees itself, so that no row is empty.
        mask[:, own, mask.shape[2] - ids.shape[1] + own] = True
        output = self._model.model(
            input_ids=ids.to(self._device), position_ids=at.to(self._device), use_cache=True,
            attention_mask=mask[:, None].to(self._device), past_key_values=self._cache,
        )  # fmt: skip
        return output.last_hidden_state

    def score(self, parts: Sequence[list[_Copy]]) -> list[Float[Tensor, " copies"]]:
        """Weighted Σ log p(gold) of each copy, row by row."""
        block, count = self._block, max(map(len, parts))
        # 1. Equally many copies a row, side by side: [row, count · block].
        empty = _Copy(_NOBODY, 0, [self._special.mask] * block, [-1] * block, 0.0)
        whole = [part + [empty] * (count - len(part)) for part in parts]
        owner, index, ids, gold, weight = (
            torch.tensor([[copy[field] for copy in row] for row in whole]) for field in range(5)
        )
        owner, ids, gold = owner.repeat_interleave(block, dim=1), ids.flatten(1), gold.flatten(1)
        place = (self._start[:, None] + index * block)[:, :, None] + torch.arange(block)
        position = place.flatten(1)
        # 2. A copy sees the clean blocks before its own, and itself.
        copy_of = torch.arange(count).repeat_interleave(block)
        itself = (copy_of[:, None] == copy_of[None]).expand(len(whole), -1, -1)
        mask = torch.cat([self._mask(owner, position, own_block=False), itself], dim=2)
        hidden = self._run(ids, position, mask)
        self._cache.crop(-count * block)
        # 3. log p of the gold tokens in slices; the mask token counts as any other, as trained.
        scored = gold >= 0
        states = hidden[scored.to(hidden.device)]  # [n, width]
        size = max(32, _LOGITS_PER_SLICE // self._model.lm_head.weight.shape[0])
        logp = []
        for part, ids in zip(states.split(size), gold[scored].split(size), strict=True):
            logits = self._model.lm_head(part).float()
            gold_logits = logits.gather(1, ids[:, None].to(logits.device))[:, 0]
            logp.append((gold_logits - logits.logsumexp(dim=1)).cpu())
        # 4. Weighted sums by copy.
        values = torch.zeros(gold.shape).masked_scatter(scored, torch.cat(logp))
        sums = values.view(len(whole), count, block).sum(dim=2) * weight
        return [row[: len(part)] for row, part in zip(sums, parts, strict=True)]


def pieces(context: Ids, tokens: Ids, length: int, block: int) -> list[tuple[Ids, Ids]]:
    """A continuation behind its context's end, in whole blocks of at most `length` tokens; where it
    does not fit, in pieces of half the length, each behind what stands before it.
    """
    room = length // block * block - len(tokens)
    if room >= block:
        return [(context[-room:], tokens)]
    size = max(block, length // 2 // block * block)
    room = max(1, (length - size) // block * block)
    starts = range(0, len(tokens), size)
    return [([*context, *tokens[:start]][-room:], tokens[start : start + size]) for start in starts]


def score_questions(
    student: LoadedStudent, questions: Sequence[Question], elbo: ElboConfig, length: int, batch: int
) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """Each question's number, and for each of its continuations the ELBO (nats) and whether greedy
    sampling gives it (False, unasked, where it goes in pieces). A pass takes `batch` questions.
    """
    model, special = student.model, student.special
    # 1. What is too long goes in pieces, question by question
    fitting: list[tuple[int, Question]] = []
    for number, (context, continuations) in enumerate(questions):
        parts = [pieces(context, tokens, length, elbo.block) for tokens in continuations]
        if all(len(part) == 1 for part in parts):
            # one context for all: what fits before the longest
            cut, _ = min((part[0] for part in parts), key=lambda pair: len(pair[0]))
            fitting.append((number, (cut, continuations)))
            continue
        sums = []
        for part in parts:
            values = [log_likelihoods(model, [(c, [x])], special, elbo)[0][0] for c, x in part]
            sums.append((sum(values), False))
        yield number, sums
    # 2. The others share passes, long contexts first
    fitting.sort(key=lambda question: -len(question[1][0]))
    for start in range(0, len(fitting), batch):
        numbers, together = zip(*fitting[start : start + batch], strict=True)
        values = log_likelihoods(model, together, special, elbo)
        greedy = are_greedy(student, together, elbo.block)
        for number, value, is_greedy in zip(numbers, values, greedy, strict=True):
            yield number, list(zip(value, is_greedy, strict=True))


def are_greedy(
    student: LoadedStudent, questions: Sequence[Question], block: int
) -> list[list[bool]]:
    """Whether greedy sampling gives each; a row leaves when its continuations all differ."""
    longest = [max(map(len, continuations)) for _, continuations in questions]
    config = SampleConfig(new_tokens=max(longest), block=block)
    alike = [[True] * len(continuations) for _, continuations in questions]

    def stop(row: int, made: list[int]) -> bool:
        return not any(alike[row]) or len(made) >= longest[row]

    contexts, mask = [context for context, _ in questions], student.special.mask
    for state, _ in sample_steps(student.model, contexts, student.special, config, stop):
        for row, made in enumerate(state):
            for number, wanted in enumerate(questions[row][1]):
                pairs = zip(made, wanted, strict=False)
                alike[row][number] &= all(token in (mask, gold) for token, gold in pairs)
        if not any(map(any, alike)):
            break
    return alike
