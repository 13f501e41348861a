"""The teachers: one small declarative entry each, in `registry.toml` or in a file of the user's.

An entry names an architecture (`shared.models.architectures`) and what differs between checkpoints
of it; the code has no teacher's name in it.
"""

import difflib
import tomllib
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from shared.settings.build import BY_TYPE, Count, build, read_toml, strict
from shared.system.files import TideError


@strict
class Full:
    """Every position sees every other."""

    type: Literal["full"] = "full"


@strict
class BlockCausal:
    """Every position sees its own block and the earlier ones."""

    block: Count
    type: Literal["block_causal"] = "block_causal"


@strict
class X0Xt:
    """Block diffusion over [x_0 ; x_t]: a block sees itself noised and the earlier blocks clean."""

    block: Count
    type: Literal["x0_xt"] = "x0_xt"


@strict
class Native:
    """WeDLM's own: [x_0 ; x_t], in each block observed tokens first, masks last; causal."""

    block: Count
    type: Literal["native"] = "native"


Attention = Annotated[Full | BlockCausal | X0Xt | Native, BY_TYPE]
# The names of `architectures.ARCHITECTURES`, which would import torch.
ArchitectureName = Literal[
    "llama", "llada", "dream", "qwen2", "qwen3", "qwen3_moe", "llada_moe", "llada2_moe", "smollm3"
]


@strict
class TeacherEntry:
    """What must be known of a teacher beside its checkpoint."""

    model: str
    """Hub id, path, or `embedded:NAME` for weights that ship with the package."""
    architecture: ArchitectureName
    mask_id: int
    student_tokens: bool
    """True: the teacher shares the student's tokenizer and reads its very ids."""
    length: int
    """Reference length in tokens."""
    student: str
    """Hub id or path whose tokenizer the student uses by default."""
    attention: Attention = field(default_factory=Full)
    shift: bool = False
    """Row i of the model predicts token i + 1."""
    eos_id: int | None = None
    """Checked against the checkpoint where stated, as are `pad_id` and `vocabulary`."""
    pad_id: int | None = None
    vocabulary: int | None = None
    shape: str | None = None
    """A table of shapes.toml: the sizes in the checkpoint's config, for plans without it."""
    about: str = ""


def _packaged(name: str) -> dict[str, Any]:
    path = resources.files("teacher_cache.teachers").joinpath(name)
    return tomllib.loads(path.read_text(encoding="utf-8"))


def all_teachers(extra: Path | None = None) -> dict[str, TeacherEntry]:
    """The built-in entries and those of `extra` (a TOML file), which may replace built-in ones."""
    files = {"registry.toml": _packaged("registry.toml")}
    if extra is not None:
        files[str(extra)] = read_toml(extra)
    entries = {}
    for where, tables in files.items():
        for name, table in tables.items():
            if not isinstance(table, dict):
                expected = "one table a teacher, such as [my-teacher]"
                raise TideError(f"{where}: {name} is a value", expected=expected)
            entries[name] = build(TeacherEntry, table, f"teacher {name} in {where}")
    return entries


def find_teacher(name: str, extra: Path | None = None) -> TeacherEntry:
    """The entry `name`; TideError with the nearest names where there is none."""
    entries = all_teachers(extra)
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "see `tide teachers`"
        raise TideError(
            f"unknown teacher {name!r}",
            expected=f"one of {', '.join(sorted(entries))}",
            fix=f"{hint} A teacher of your own goes into a TOML file (--teachers FILE)",
        )
    return entries[name]


def known_shape(entry: TeacherEntry) -> dict[str, Any] | None:
    """The sizes of a published checkpoint, in the keys of its own config; None where unknown."""
    return published_shape(entry.shape) if entry.shape else None


def published_shape(name: str) -> dict[str, Any] | None:
    """A table of shapes.toml; None where there is none of that name."""
    return _packaged("shapes.toml").get(name)
