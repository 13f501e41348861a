"""Some shards of an epoch and the order of their rows. Rows are decoded by whoever trains on them: with P processes
each decodes one of P.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.cache.row import CacheRow
from shared.system.errors import TideError
from student_train.batches.shards import OpenShard

_RUN = 16
"""Batches among which rows are sorted by length."""

Draws = list[CacheRow]
"""The draws of one example that are trained on together."""


class Window:
    """`shards[i]` are the draws of part i. Examples stand in an order of their own, number `begin` of the epoch first;
    of every `batch` examples each of `processes` takes one in turn.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[OpenShard]],
        begin: int,
        batch: int,
        processes: int,
        stream: np.random.Generator,
    ) -> None:
        for draws in shards:
            refuse_other_examples(draws)
        self._shards, self._begin, self._batch, self._processes = shards, begin, batch, processes
        lengths = [draws[0].lengths for draws in shards]
        self._home = [(part, row) for part, own in enumerate(lengths) for row in range(len(own))]
        self._order = _order(np.concatenate(lengths), -begin % batch, batch, stream)
        self._decoded: dict[int, dict[int, Draws]] = {}

    def examples(self, places: Sequence[int]) -> list[Draws]:
        """The examples at these places of the window's order."""
        found = []
        for place in places:
            process = self._process_of(place)
            if process not in self._decoded:
                self._decoded[process] = self._decode(process)
            found.append(self._decoded[process][place])
        return found

    def _process_of(self, place: int) -> int:
        return (self._begin + place) % self._batch % self._processes

    def _decode(self, process: int) -> dict[int, Draws]:
        """All examples of the window that are this process's, shard by shard."""
        mine: list[list[tuple[int, int]]] = [[] for _ in self._shards]
        for place, number in enumerate(self._order):
            if self._process_of(place) == process:
                part, row = self._home[number]
                mine[part].append((row, place))
        found: dict[int, Draws] = {}
        for draws, chosen in zip(self._shards, mine, strict=True):
            if chosen:
                columns = [shard.rows([row for row, _ in chosen]) for shard in draws]
                for (_, place), rows in zip(chosen, zip(*columns, strict=True), strict=True):
                    found[place] = list(rows)
        return found

    def __len__(self) -> int:
        return len(self._order)


def refuse_other_examples(draws: Sequence[OpenShard]) -> None:
    """TideError unless the draws of a part are of the same examples in the same order."""
    for other in draws[1:]:
        if not other.examples.equals(draws[0].examples):
            raise TideError(
                f"{draws[0].path} and {other.path} hold other examples",
                expected="the same examples in every draw of a part, to train on several draws of an example at once",
                fix="train with draws_per_step=1",
            )


def _order(lengths: np.ndarray, begun: int, batch: int, stream: np.random.Generator) -> list[int]:
    """Shuffled; then, but for the `begun` examples that fill up the last window's batch, sorted by length inside runs
    of 16 batches, and whole batches shuffled.
    """
    order = [int(i) for i in stream.permutation(len(lengths))]
    head, rest = order[:begun], order[begun:]
    span = _RUN * batch
    by_length = [
        i
        for at in range(0, len(rest), span)
        for i in sorted(rest[at : at + span], key=lengths.__getitem__)
    ]
    whole = len(by_length) // batch * batch
    batches = [by_length[at : at + batch] for at in range(0, whole, batch)]
    return (
        head + [i for b in stream.permutation(len(batches)) for i in batches[b]] + by_length[whole:]
    )
