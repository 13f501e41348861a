"""While the site is built equations become MathML (no scripts, no network).

As a program it writes the page of all settings, from the dataclasses that hold them.
"""

import ast
import dataclasses
import html
import inspect
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from shared.settings import config, data
from shared.settings.build import field_types, limits

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SECTIONS: dict[str, list[type]] = {
    "[cache]": [config.CacheConfig],
    "[cache.data] (a table, or a list of them)": [data.DataConfig],
    "[cache.lengths]": [data.LengthConfig],
    "[cache.noise]": [data.NoiseConfig],
    "[cache.targets]": [data.TargetConfig],
    "[cache.engine]": [config.EngineConfig],
    "[train]": [config.TrainConfig],
    "[train.student]": [config.StudentConfig],
    "[train.student.lora]": [config.Lora],
    "[train.distillation], by its `type`": [
        one.__origin__ for one in typing.get_args(typing.get_args(config.Distillation)[0])[:-1]
    ],
    "[train.distillation.tidal]": [config.Tidal],
}


def settings_page(page: str) -> str:
    """The page with its sections, all below the first of them, made anew."""
    lines = [page[: page.index("\n## ")]]
    for title, kinds in SECTIONS.items():
        lines += [f"## {title}", ""]
        for kind in kinds:
            if len(kinds) > 1:
                lines += [f"### `{kind.type}`", "", inspect.getdoc(kind) or "", ""]  # type: ignore[attr-defined]
            lines += ["| setting | type | default | |", "|---|---|---|---|", *_rows(kind), ""]
    return "\n".join(lines)


def _rows(kind: type) -> Iterator[str]:
    # 1. the text below each field, of the class and of those that it is made from
    words = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for line, below in itertools.pairwise(tree.body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                words[ast.unparse(line.target)] = str(ast.literal_eval(below.value))
    # 2. types, with their bounds
    hints, annotated = typing.get_type_hints(kind), field_types(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        plain = isinstance(hint, type) and not typing.get_args(hint)
        name = re.sub(r"\b(?:\w+\.)+(?=[A-Za-z])", "", hint.__name__ if plain else str(hint))
        if bounds := limits(annotated[field.name]):
            name += f", {bounds}"
        made = field.default is dataclasses.MISSING
        default = "its own" if made else f"`{field.default}`"
        hint = name.replace(" | ", " or ")  # no table has a | in code everywhere
        cells = (f"`{field.name}`", f"`{hint}`", default, words.get(field.name, ""))
        row = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        yield f"| {row} |"


def on_page_content(text: str, **_: Any) -> str:
    """Replace what arithmatex marked. mkdocs calls this for every page."""

    def as_mathml(equation: re.Match[str]) -> str:
        # a name before its argument, as in log p: MathML puts no space there by itself
        text = re.sub(r"\\(log|exp|cos)\s+(?=[a-z\\])", r"\g<0>\\, ", html.unescape(equation[2]))
        return convert(text, display="block" if equation[1] == "div" else "inline")

    return EQUATION.sub(as_mathml, text)


if __name__ == "__main__":
    place = Path(__file__).parents[1] / "settings.md"
    place.write_text(settings_page(place.read_text()))
