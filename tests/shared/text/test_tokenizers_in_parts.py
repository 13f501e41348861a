"""Tokenizers in parts (vocab.json, merges.txt) that name a class which would be remote code."""

import json
import shutil
from pathlib import Path

import pytest

from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER


def in_parts(source: Path, target: Path) -> Path:
    """The same tokenizer without tokenizer.json, and with a class that would be remote code."""
    target.mkdir()
    raw = json.loads((source / "tokenizer.json").read_text())
    (target / "vocab.json").write_text(json.dumps(raw["model"]["vocab"], ensure_ascii=False))
    merges = (m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (target / "added_tokens.json").write_text(
        json.dumps({t["content"]: t["id"] for t in raw["added_tokens"]})
    )
    config = json.loads((source / "tokenizer_config.json").read_text())
    roles = {k: v for k, v in config.items() if k.endswith("_token")}
    own = {
        "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
        "tokenizer_class": "XTokenizer",
    }
    special = [t["content"] for t in raw["added_tokens"]]
    settings = {**roles, **own, "additional_special_tokens": special}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (target / "tokenization_x.py").write_text("raise SystemExit('remote code was run')\n")
    shutil.copy(source / "chat_template.jinja", target)
    return target


TEXTS = [
    "def f(x):\n    return x + 1  # naïve 😀<|eot_id|> it's 12",
    "\n\n  a\t\tb  \r\n",
    "你好 x1=22;;  y",
    "",
]


def test_a_tokenizer_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    whole, parts = (
        Tokenizer.load(TEACHER_TOKENIZER),
        Tokenizer.load(in_parts(TEACHER_TOKENIZER, tmp_path / "t")),
    )
    assert parts.encode(TEXTS) == whole.encode(TEXTS)
    assert parts.token_bytes == whole.token_bytes
    for role in ("eos", "pad", "mask"):
        assert parts.special_id(role) == whole.special_id(role)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parts.render(chat) == whole.render(chat)


def test_parts_that_no_known_pattern_fits_or_that_are_damaged_are_explained(tmp_path: Path) -> None:
    folder = in_parts(TEACHER_TOKENIZER, tmp_path / "t")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    odd = {f"a{i}Ġb{i}": 5000 + i for i in range(600)}
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, **odd}))
    with pytest.raises(TideError):
        Tokenizer.load(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(TideError):
        Tokenizer.load(folder)
    other = in_parts(STUDENT_TOKENIZER, tmp_path / "s")
    (other / "added_tokens.json").write_text('{"<|x|>": 9000}')
    with pytest.raises(TideError) as error:
        Tokenizer.load(other)
    assert "9000" in str(error.value)
