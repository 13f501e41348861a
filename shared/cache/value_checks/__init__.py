"""Does a shard say what a shard can? Every value's range, order and consistency with the others, without the teacher.

Checksums tell that bytes are what was written; this tells that what was written can be trained on. All is done on whole
columns. `tide verify` reports what is found here, and training refuses it.
"""

from __future__ import annotations

import pyarrow as pa

from shared.cache.manifest import Manifest
from shared.cache.row import Layout
from shared.cache.value_checks import rows, targets
from shared.cache.value_checks.columns import Columns

RULES = 2
"""Raised when a rule is added: caches that passed before are looked at again."""
_RULES = (rows.rows, rows.positions, targets.scores, targets.lists, targets.tail, rows.chunks)


def problems_in(table: pa.Table, layout: Layout, manifest: Manifest) -> list[str]:
    """What is wrong with a shard's values, in words; empty where nothing is."""
    if not table.num_rows:
        return []
    columns = Columns(table, layout, manifest)
    nulls = list(rows.nulls(columns))
    if nulls:
        return nulls
    found: list[str] = []
    for rule in _RULES:
        found += rule(columns)
        if found:  # later rules lean on what earlier ones have established
            return found
    return found
