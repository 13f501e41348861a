"""Names of settings that exist, for one that does not."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any


def names_at(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Names of the settings of `kind` below `place`, a path of pydantic's: fields, tags of variants, list members."""
    kinds = _dataclasses(kind)
    for step in place:
        below = [hint for k in kinds if (hint := _hints(k).get(str(step))) is not None]
        tagged = [k for k in kinds if getattr(k, "type", None) == step]
        if below:
            kinds = [k for hint in below for k in _dataclasses(hint)]
        elif tagged:
            kinds = tagged
    return sorted({name for k in kinds for name in _hints(k)})


def advice(name: str, names: Sequence[str]) -> str:
    """Words that point to the nearest of `names`, or to all of them."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(names)}" if names else "there are none here"


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _dataclasses(kind: Any) -> list[type]:
    """The dataclasses that a type may be, through unions, annotations and tuples."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [found for part in typing.get_args(kind) for found in _dataclasses(part)]
