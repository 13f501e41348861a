"""The page of all settings, made from the dataclasses that hold them: names, types, defaults and their own words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from shared.settings import config, data, objectives

SECTIONS: dict[str, tuple[type, ...]] = {
    "[cache]": (config.CacheConfig,),
    "[cache.data] (a table, or a list of them)": (data.DataConfig,),
    "[cache.lengths]": (data.LengthConfig,),
    "[cache.noise]": (config.NoiseConfig,),
    "[cache.targets]": (config.TargetConfig,),
    "[cache.engine]": (config.EngineConfig,),
    "[train]": (config.TrainConfig,),
    "[train.student]": (config.StudentConfig,),
    "[train.distillation], by its `type`": (
        objectives.NoDistillation, objectives.KL, objectives.ReverseKL, objectives.Calm, objectives.ReverseCalm,
    ),
    "[train.distillation.tidal]": (objectives.Tidal,),
}  # fmt: skip


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of the page. mkdocs calls this for every page."""
    return markdown.replace("<!-- all settings -->", "\n".join(all_sections()))


def all_sections() -> list[str]:
    """Every section as Markdown."""
    lines = []
    for title, kinds in SECTIONS.items():
        lines += [f"## {title}", ""]
        for kind in kinds:
            if len(kinds) > 1 and "distillation" in title:
                lines += [
                    f"### `{getattr(kind, 'type', None) or kind.__name__}`",
                    "",
                    inspect.getdoc(kind) or "",
                    "",
                ]
            words = _own(kind)
            rows = [
                _row(field, *words[field.name])
                for field in dataclasses.fields(kind)
                if field.name in words
            ]
            if rows:
                lines += ["| setting | type | default | |", "|---|---|---|---|", *rows, ""]
    return lines


def _own(kind: type) -> dict[str, tuple[str, str]]:
    """Of the fields that the class or one it is made from declares: the type as written, and what is said below it."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _declared(base)
    return found


def _declared(kind: type) -> dict[str, tuple[str, str]]:
    (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for line, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            said = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                said = inspect.cleandoc(str(below.value.value))
            found[line.target.id] = (ast.unparse(line.annotation), said)
    return found


def _row(field: dataclasses.Field[Any], written: str, said: str) -> str:
    if field.default is not dataclasses.MISSING:
        default = f"`{field.default}`"
    else:
        default = "its own" if field.default_factory is not dataclasses.MISSING else "none"
    cells = (f"`{field.name}`", f"`{written}`", default, said)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
