"""Equations become MathML while the site is built: browsers show it without scripts or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(\\\)|\\\])</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Replace what arithmatex marked. mkdocs calls this for every page."""

    def replace(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[3]), display=display)

    return _EQUATION.sub(replace, text)
