"""Likelihoods of many continuations: questions share passes; what is too long goes in pieces."""

from collections.abc import Iterator, Sequence

from student_train.using.elbo import ElboConfig, Question, log_likelihoods_together
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, sample_steps


def pieces(
    context: Sequence[int], tokens: Sequence[int], length: int, block: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """A continuation behind the end of its context that fits into `length` tokens.

    Where the continuation itself does not fit: in pieces of half the length, each behind what
    stands before it.
    """
    room = (length - len(tokens)) // block * block
    if room >= block:
        return [(context[-room:], tokens)]
    size = max(block, length // 2 // block * block)
    room = max(1, (length - size) // block * block)
    starts = range(0, len(tokens), size)
    return [([*context, *tokens[:start]][-room:], tokens[start : start + size]) for start in starts]


def score(
    student: LoadedStudent, questions: Sequence[Question], elbo: ElboConfig, length: int, batch: int
) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """Each question's number, and for each of its continuations the ELBO (nats) and whether greedy
    sampling would give it (False, unasked, where it goes in pieces).

    A pass takes `batch` questions, each of at most `length` tokens.
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
            asked = [(before, [piece]) for before, piece in part]
            values = [log_likelihoods_together(model, [q], special, elbo)[0][0] for q in asked]
            sums.append((sum(values), False))
        yield number, sums
    # 2. The others share passes, long contexts first
    fitting.sort(key=lambda question: -len(question[1][0]))
    for start in range(0, len(fitting), batch):
        numbers, together = zip(*fitting[start : start + batch], strict=True)
        values = log_likelihoods_together(model, together, special, elbo)
        greedy = are_greedy(student, together, elbo.block)
        for number, value, is_greedy in zip(numbers, values, greedy, strict=True):
            yield number, list(zip(value, is_greedy, strict=True))


def are_greedy(
    student: LoadedStudent, questions: Sequence[Question], block: int
) -> list[list[bool]]:
    """Whether greedy sampling gives each; a row leaves when its continuations all differ."""
    longest = [max(map(len, continuations)) for _, continuations in questions]
    config = SampleConfig(new_tokens=-(-max(longest) // block) * block, block=block)
    alike = [[True] * len(continuations) for _, continuations in questions]

    def stop(row: int, made: list[int]) -> bool:
        return not any(alike[row]) or len(made) >= longest[row]

    contexts, mask = [context for context, _ in questions], student.special.mask
    for state, _ in sample_steps(student.model, contexts, student.special, config, stop):
        for row, made in enumerate(state.tolist()):
            for number, wanted in enumerate(questions[row][1]):
                pairs = zip(made, wanted, strict=False)
                alike[row][number] &= all(token in (mask, gold) for token, gold in pairs)
        if not any(map(any, alike)):
            break
    return alike
