"""Text of others on the terminal."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipelines.commands.app import json_line, printable

SEQUENCES = {
    "title": "\x1b]0;evil\x07",
    "title, ended otherwise": "\x1b]2;evil\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "link": "\x1b]8;;http://evil\x1b\\",
    "clear": "\x1b[2J",
    "colour": "\x1b[31m",
    "reset": "\x1bc",
    "one byte for CSI": "\x9b2J",
    "one byte for OSC": "\x9d0;evil\x9c",
    "device control": "\x1bPevil\x1b\\",
    "application": "\x1b_evil\x1b\\",
    "bell": "\x07",
    "backspaces": "\x08\x08",
    "return": "\r",
    "unfinished": "\x1b]0;evil",
    "unfinished CSI": "\x1b[31",
    "alone": "\x1b",
    "delete": "\x7f",
    "character set": "\x1b(0",
    "another direction": "\u202e",
    "isolated": "\u2066",
}


def test_sequences_are_not_printed_and_ordinary_text_is() -> None:
    for what, sequence in SEQUENCES.items():
        assert printable(f"a{sequence}") == "a", what
    text = "naïve 中文 العربية 👩‍💻\n\tx = [1; 2] ]0; \\e[31m ✓\u200f"
    assert printable(text) == text


@given(st.text(alphabet=st.characters(max_codepoint=0x2FFF)))
def test_nothing_that_controls_is_left(text: str) -> None:
    left = printable(text)
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" for c in left)
    assert printable(left) == left


@given(st.text())
def test_json_says_the_same_without_them(text: str) -> None:
    line = json_line(json.dumps({"x": text}, ensure_ascii=False))
    assert json.loads(line) == {"x": text}
    assert printable(line) == line
