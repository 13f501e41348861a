"""Which prepared examples a cache takes, and in what order: weights, limits, repeats, several sources interleaved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from shared.data.selection import copies
from shared.settings.config import DataConfig

Entries = Int[np.ndarray, "examples 3"]
"""Columns: number of the part, number of the example in it, occurrence of its content."""


@dataclass
class Selector:
    """Takes the examples of one source after another, part by part."""

    dedup: bool
    duplicates: int = 0
    _seen: dict[int, int] = field(default_factory=dict)
    _entries: list[list[tuple[int, int, int]]] = field(default_factory=list)
    _keys: list[list[str]] = field(default_factory=list)

    def begin(self) -> None:
        """The next source."""
        self._entries.append([])
        self._keys.append([])

    def take(self, part: int, keys: Sequence[str], config: DataConfig) -> bool:
        """Take what the source's weight and limit allow of a part's examples; False once the limit is reached."""
        mine, names = self._entries[-1], self._keys[-1]
        for row, key in enumerate(keys):
            for _ in range(copies(key, config)):
                if len(mine) == config.limit:
                    return False
                number = int(key, 16)
                occurrence = self._seen.get(number, 0)
                self._seen[number] = occurrence + 1
                if occurrence:
                    self.duplicates += 1
                if not (occurrence and self.dedup):
                    mine.append((part, row, occurrence))
                    names.append(key)
        return len(mine) != config.limit

    @property
    def taken(self) -> list[int]:
        """Examples of each source."""
        return [len(mine) for mine in self._entries]

    def finish(self) -> tuple[Entries, str]:
        """All examples in their order, and a hash of their contents.

        Several sources are interleaved evenly, each in its own order.
        """
        rows = [np.array(mine, np.int32).reshape(-1, 3) for mine in self._entries]
        places = [(np.arange(len(mine)) + 0.5) / max(1, len(mine)) for mine in rows]
        order = np.argsort(np.concatenate(places), kind="stable") if rows else np.zeros(0, np.int64)
        entries = np.concatenate(rows)[order] if rows else np.zeros((0, 3), np.int32)
        names = [key for mine in self._keys for key in mine]
        digest = hashlib.sha256()
        for i, occurrence in zip(order.tolist(), entries[:, 2].tolist(), strict=True):
            digest.update(f"{names[i]}#{occurrence}\n".encode())
        return entries, digest.hexdigest()[:32]
