"""Equations become MathML while the site is built: no scripts, no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(\\\)|\\\])</\1>', re.DOTALL
)
_FUNCTION = re.compile(r"\\(log|exp|cos)\s+(?=[a-z\\])")
"""A name before its argument, as in log p: MathML puts no space there by itself."""


def on_page_content(text: str, **_: Any) -> str:
    """Replace what arithmatex marked. mkdocs calls this for every page."""

    def replace(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        spaced = _FUNCTION.sub(r"\g<0>\\, ", html.unescape(found[3]))
        return convert(spaced, display=display)

    return _EQUATION.sub(replace, text)
