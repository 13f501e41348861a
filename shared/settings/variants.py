"""Settings as types: frozen dataclasses that refuse unknown names, and kinds of one thing told apart by `type`.

@variant("kl")
class KL(Tempered): ...

Distillation = Annotated[NoDistillation | KL, BY_TYPE]      # in TOML: { type = "kl", temperature = 2.0 }
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field

T = TypeVar("T")

BY_TYPE = Field(discriminator="type")
"""For unions of variants: pydantic chooses the class by its `type`."""


def require(condition: bool, message: str) -> None:
    """ValueError with `message` where a setting does not hold."""
    if not condition:
        raise ValueError(message)


class Variant:
    """What every variant has: the name of its kind, also a field of what is read from and written to TOML and JSON."""

    type: ClassVar[str]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def strict(cls: type[T]) -> type[T]:
    """A frozen dataclass; a name that it does not have is an error where it is built from TOML."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def variant(name: str) -> Callable[[type[T]], type[T]]:
    """`strict`, as the kind `name`."""

    def make(cls: type[T]) -> type[T]:
        cls.__annotations__ = {**inspect.get_annotations(cls), "type": Literal[name]}
        cls.type = name  # type: ignore[attr-defined]
        return strict(cls)

    return make
