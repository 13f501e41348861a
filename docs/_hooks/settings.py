"""The page of all settings, made from the dataclasses that hold them, in their own words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from typing import Any

from shared.settings import config, data, objectives
from shared.settings.build import field_types, limits

SECTIONS: dict[str, list[type]] = {
    "[cache]": [config.CacheConfig],
    "[cache.data] (a table, or a list of them)": [data.DataConfig],
    "[cache.lengths]": [data.LengthConfig],
    "[cache.noise]": [config.NoiseConfig],
    "[cache.targets]": [config.TargetConfig],
    "[cache.engine]": [config.EngineConfig],
    "[train]": [config.TrainConfig],
    "[train.student]": [config.StudentConfig],
    "[train.distillation], by its `type`": [
        *typing.get_args(typing.get_args(objectives.Distillation)[0])
    ],
    "[train.distillation.tidal]": [objectives.Tidal],
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of the page. mkdocs calls this for every page."""
    marker = "<!-- all settings -->"
    return markdown.replace(marker, "\n".join(all_sections())) if marker in markdown else markdown


def all_sections() -> list[str]:
    """Every section as Markdown: a table of its settings, their types, defaults and words."""
    lines = []
    for title, kinds in SECTIONS.items():
        lines += [f"## {title}", ""]
        for kind in kinds:
            if len(kinds) > 1:
                lines += [f"### `{kind.type}`", "", inspect.getdoc(kind) or "", ""]  # type: ignore[attr-defined]
            lines += ["| setting | type | default | |", "|---|---|---|---|"]
            words, hints = _words(kind), typing.get_type_hints(kind)
            annotated = field_types(kind)
            for field in dataclasses.fields(kind):
                hint = hints[field.name]
                name = (
                    hint.__name__
                    if isinstance(hint, type) and not typing.get_args(hint)
                    else str(hint)
                )
                name = re.sub(r"\b(?:\w+\.)+(?=[A-Za-z])", "", name)
                if bounds := limits(annotated[field.name]):
                    name += f", {bounds}"
                made = field.default is dataclasses.MISSING
                default = "its own" if made else f"`{field.default}`"
                cells = (f"`{field.name}`", f"`{name}`", default, words.get(field.name, ""))
                row = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
                lines.append(f"| {row} |")
            lines.append("")
    return lines


def _words(kind: type) -> dict[str, str]:
    """The text below each field of the class and of those that it is made from."""
    words = {}
    for base in reversed(kind.__mro__):
        if not hasattr(base, "__dataclass_fields__"):
            continue
        (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for line, below in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                words[line.target.id] = str(below.value.value)
    return words
