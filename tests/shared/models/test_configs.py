"""What a config says is obeyed: rope of transformers 4 and 5; tokenizers that lie in parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER

SCALINGS: dict[str, Any] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, old name": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
}  # fmt: skip
SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
                         "max_position_embeddings": 256}  # fmt: skip
STOCK: dict[str, Any] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@pytest.mark.parametrize("architecture", STOCK)
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_is_what_transformers_makes_of_the_same_folder(
    architecture: str, name: str, tmp_path: Path
) -> None:
    config_class, model_class = STOCK[architecture]
    torch.manual_seed(0)
    model_class(config_class(**SIZES)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("rope_parameters")
    values |= {"rope_theta": 5000.0, "rope_scaling": SCALINGS[name]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    stock = model_class.from_pretrained(tmp_path).eval()
    ours: Any = load_model(open_checkpoint(str(tmp_path)), architecture, torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


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
    with pytest.raises(
        TideError, match=r"by none of the patterns that are known[\s\S]*tokens fall apart"
    ):
        Tokenizer.load(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(TideError, match="cannot be read"):
        Tokenizer.load(folder)
    other = in_parts(STUDENT_TOKENIZER, tmp_path / "s")
    (other / "added_tokens.json").write_text('{"<|x|>": 9000}')
    with pytest.raises(TideError, match="has id 9000"):
        Tokenizer.load(other)
