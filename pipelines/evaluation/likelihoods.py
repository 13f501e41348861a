"""Likelihoods of many continuations: questions share passes; what is too long goes in pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from student_train.using.elbo import ElboConfig, Question, log_likelihoods_together
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, sample_steps


def pieces(
    context: list[int], tokens: list[int], length: int, block: int
) -> list[tuple[list[int], list[int]]]:
    """A continuation behind the end of its context that fits into `length`.

    Where the continuation itself does not fit: in pieces of half the length, each behind what
    stands before it.
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
    ) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """Each question's number, and for each of its continuations the ELBO (nats) and whether
        greedy sampling would give it (False, unasked, where it goes in pieces).
        """
        model, special, block = self.student.model, self.student.special, self.elbo.block
        fitting: list[tuple[int, Question]] = []
        for number, (context, continuations) in enumerate(questions):
            parts = [pieces(context, tokens, self.length, block) for tokens in continuations]
            if all(len(part) == 1 for part in parts):
                # one context for all: what fits before the longest
                cut, _ = min((part[0] for part in parts), key=lambda pair: len(pair[0]))
                fitting.append((number, (cut, continuations)))
                continue
            sums = []
            for part in parts:
                asked = [(before, [piece]) for before, piece in part]
                values = [log_likelihoods_together(model, [q], special, self.elbo) for q in asked]
                sums.append((sum(value for ((value,),) in values), False))
            yield number, sums
        fitting.sort(key=lambda question: -len(question[1][0]))
        for start in range(0, len(fitting), self.batch):
            numbers, batch = zip(*fitting[start : start + self.batch], strict=True)
            values = log_likelihoods_together(model, batch, special, self.elbo)
            for number, value, greedy in zip(numbers, values, self._are_greedy(batch), strict=True):
                yield number, list(zip(value, greedy, strict=True))

    def _are_greedy(self, questions: Sequence[Question]) -> list[list[bool]]:
        """Whether greedy sampling gives each; a row leaves when its continuations all differ."""
        block, mask = self.elbo.block, self.student.special.mask
        longest = [max(map(len, continuations)) for _, continuations in questions]
        config = SampleConfig(new_tokens=-(-max(longest) // block) * block, block=block)
        alike = [[True] * len(continuations) for _, continuations in questions]

        def stop(row: int, made: list[int]) -> bool:
            return not any(alike[row]) or len(made) >= longest[row]

        contexts = [context for context, _ in questions]
        model, special = self.student.model, self.student.special
        for state, _ in sample_steps(model, contexts, special, config, stop):
            for row, made in enumerate(state.tolist()):
                for number, wanted in enumerate(questions[row][1]):
                    pairs = zip(made, wanted, strict=False)
                    alike[row][number] &= all(token in (mask, gold) for token, gold in pairs)
            if not any(map(any, alike)):
                break
        return alike
