"""Likelihoods of many continuations: questions share passes; what is longer than the student is scored in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from student_train.using.elbo import ElboConfig, Question, log_likelihoods_together
from student_train.using.load import LoadedStudent
from student_train.using.sampler import sample_steps
from student_train.using.settings import SampleConfig

Score = tuple[float, bool]
"""The ELBO of a continuation, and whether greedy sampling would give it."""


def pieces(
    context: list[int], tokens: list[int], length: int, block: int
) -> list[tuple[list[int], list[int]]]:
    """A continuation behind its context, of which the end is kept that fits into `length`; in pieces of half the
    length, each behind what stands before it, where the continuation itself does not fit.
    """
    room = (length - len(tokens)) // block * block
    if room >= block:
        return [(context[-room:], tokens)]
    size = max(block, length // 2 // block * block)
    room = max(1, (length - size) // block * block)
    starts = range(0, len(tokens), size)
    return [((context + tokens[:start])[-room:], tokens[start : start + size]) for start in starts]


@dataclass(frozen=True)
class Likelihoods:
    """`batch` questions at a time, of at most `length` tokens each."""

    student: LoadedStudent
    elbo: ElboConfig
    length: int
    batch: int

    def score(
        self, questions: Sequence[tuple[list[int], list[list[int]]]]
    ) -> Iterator[tuple[int, list[Score]]]:
        """The scores of each question's continuations, with its number; the longest questions first."""
        whole: list[int] = []
        for number, (context, tokens) in enumerate(questions):
            if all(len(pieces(context, t, self.length, self.elbo.block)) == 1 for t in tokens):
                whole.append(number)
            else:
                yield number, [self._in_pieces(context, t) for t in tokens]
        whole.sort(key=lambda n: -len(questions[n][0]))
        for start in range(0, len(whole), self.batch):
            part = whole[start : start + self.batch]
            fitting = [self._fit(*questions[n]) for n in part]
            model, special = self.student.model, self.student.special
            values = log_likelihoods_together(model, fitting, special, self.elbo)
            for number, found, greedy in zip(part, values, self._are_greedy(fitting), strict=True):
                yield number, list(zip(found, greedy, strict=True))

    def _fit(self, context: list[int], tokens: list[list[int]]) -> Question:
        """With one context for all continuations: what fits before the longest."""
        ((cut, _),) = pieces(context, max(tokens, key=len), self.length, self.elbo.block)
        return cut, tokens

    def _in_pieces(self, context: list[int], tokens: list[int]) -> Score:
        """The sum over the pieces. That greedy sampling would give so much is not looked at."""
        parts = [(c, [t]) for c, t in pieces(context, tokens, self.length, self.elbo.block)]
        model, special = self.student.model, self.student.special
        return sum(
            log_likelihoods_together(model, [part], special, self.elbo)[0][0] for part in parts
        ), False

    def _are_greedy(self, questions: Sequence[Question]) -> list[list[bool]]:
        """Whether greedy sampling, one token a step, gives each; a row is given up when its answers all differ."""
        block, special = self.elbo.block, self.student.special
        longest = [max(map(len, tokens)) for _, tokens in questions]
        config = SampleConfig(new_tokens=-(-max(longest) // block) * block, block=block)
        alike = [[True] * len(tokens) for _, tokens in questions]
        contexts = [context for context, _ in questions]

        def stop(row: int, made: list[int]) -> bool:
            return not any(alike[row]) or len(made) >= longest[row]

        for state, _ in sample_steps(self.student.model, contexts, special, config, stop):
            for row, made in enumerate(state.tolist()):
                for number, wanted in enumerate(questions[row][1]):
                    same = all(
                        token in (special.mask, want)
                        for token, want in zip(made, wanted, strict=False)
                    )
                    alike[row][number] = alike[row][number] and same
            if not any(map(any, alike)):
                break
        return alike
