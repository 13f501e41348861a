"""Which rows of a source take part: by a field's value, and by chance that is a hash of the content."""

from __future__ import annotations

import hashlib
from typing import Any

from shared.settings.config import DataConfig, RowFilter


def passes(row: dict[str, Any], config: DataConfig) -> bool:
    """Whether a row has what all filters ask for."""
    return all(_matches(row, rule) for rule in config.filters)


def _matches(row: dict[str, Any], rule: RowFilter) -> bool:
    value: Any = row
    for name in rule.field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if rule.contains is not None:
        return isinstance(value, str | list | tuple) and rule.contains in value
    return value == rule.equals


def chance(key: str, purpose: str) -> float:
    """A number in [0, 1) from a content's key: the same for the same content, independent between purposes."""
    digest = hashlib.blake2b(f"{purpose}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def in_split(key: str, config: DataConfig) -> bool:
    """Whether the content belongs to `config.split`. Equal contents always fall on one side."""
    if config.split == "all":
        return True
    return (chance(key, "heldout") < config.heldout_share) == (config.split == "heldout")


def copies(key: str, config: DataConfig) -> int:
    """How often a row appears under the source's weight: 0.5 keeps half of the contents, 2.5 gives two or three."""
    whole = int(config.weight)
    return whole + (chance(key, "weight") < config.weight - whole)
