"""Text of others on the terminal: shown, never obeyed."""

from __future__ import annotations

import re
import unicodedata

import typer

_KEPT = "\n\t"
_SEQUENCE = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: titles, links, the clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, clearing
    r"|\x1b[ -/]*[0-~]?"  # the short ones
)


def printable(text: str) -> str:
    """`text` without control sequences; of control characters only line breaks and tabs stay. Characters that turn the
    direction of writing go too: with them a line shows another text than it holds.
    """
    text = _SEQUENCE.sub("", text)
    return "".join(c for c in text if c in _KEPT or not (_control(c) or c in _DIRECTIONS))


_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _control(character: str) -> bool:
    return unicodedata.category(character) == "Cc"


def say(text: str) -> None:
    """Print `text` and a line break, without control sequences."""
    typer.echo(printable(text))


def json_line(text: str) -> str:
    """JSON that holds the same, with the control characters escaped that JSON would leave."""
    return re.sub("[\x7f-\x9f" + _DIRECTIONS + "]", lambda found: f"\\u{ord(found[0]):04x}", text)
