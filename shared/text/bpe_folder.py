"""Tokenizers that lie in parts: vocab.json, merges.txt, added tokens, and a class that no library has (Dream's kind).

They are byte-level BPE, and all there is to them stands in these files but for one thing: the pattern by which text is
cut
before merges apply. The class would say it, as code; here it is found. A vocabulary was learnt inside of the pieces, so
under the right pattern each of its tokens stays in one piece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.system.errors import TideError
from shared.text.bytes_of_tokens import byte_level_bytes

_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PATTERNS = {
    "qwen2": _WORDS + r"|\p{N}" + _REST,
    "embedded": r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n\s*|\s+(?!\S)|\s+",
    "llama3": _WORDS + r"|\p{N}{1,3}" + _REST,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""Those of the families that are known, this project's own tokenizers among them; of those as good as each other the
first is taken.
"""

_BROKEN, _NEARLY = 0.03, 0.001
"""Shares of the tokens. Real vocabularies hold some that their own pattern cuts (1,673 of 150,195 in Qwen's), so at
most a few in a hundred may, and patterns that differ by less than one in a thousand are as good as each other.
"""
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "mask_token",
    "sep_token",
    "cls_token",
)


def is_in_parts(folder: Path) -> bool:
    """Whether the folder holds such a tokenizer, and no tokenizer.json."""
    parts = (folder / "vocab.json", folder / "merges.txt")
    return all(part.exists() for part in parts) and not (folder / "tokenizer.json").exists()


def tokenizer_from_parts(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer. TideError where a file is damaged, or no known pattern fits the vocabulary."""
    try:
        vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges: Any = [
            tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
        ]
        model: Any = models.BPE(vocab=vocabulary, merges=merges)
        settings = _read(folder / "tokenizer_config.json")
        added = _added(folder, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TideError(
            f"the tokenizer in {folder} cannot be read: {error}", fix="download its files again"
        ) from error
    name = _pattern_of(vocabulary, folder)
    raw = Tokenizer(model)
    if name == "qwen2":
        raw.normalizer = normalizers.NFC()  # type: ignore[attr-defined]
    raw.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [
            pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=False
            ),
        ]
    )
    raw.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    for index, token in sorted(added.items()):
        raw.add_tokens([token])
        if raw.token_to_id(token.content) != index:
            raise TideError(
                f"the added token {token.content!r} of {folder} has id {index}, its files leave room for "
                f"{raw.token_to_id(token.content)}",
                fix="download the tokenizer's files again",
            )
    roles = {name: settings[name] for name in _ROLES if settings.get(name) is not None}
    roles = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in roles.items()
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    template = folder / "chat_template.jinja"
    fast.chat_template = (
        template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
    )
    return fast


def _pattern_of(vocabulary: dict[str, int], folder: Path) -> str:
    """The pattern under which the fewest tokens fall apart. TideError where these are more than a few in a hundred."""
    texts = []
    for token in vocabulary:
        content = byte_level_bytes(token)
        try:
            texts.append("" if content is None else content.decode())
        except UnicodeDecodeError:
            continue  # a part of a character: no pattern cuts there
    broken = {name: _broken(texts, pattern) for name, pattern in PATTERNS.items()}
    least = min(broken.values())
    best = next(name for name in PATTERNS if broken[name] <= least + _NEARLY * len(texts))
    if broken[best] > _BROKEN * max(1, len(texts)):
        raise TideError(
            f"the tokenizer in {folder} cuts text by none of the patterns that are known ({', '.join(PATTERNS)}): "
            f"under the best of them {broken[best]} of {len(texts)} tokens fall apart",
            fix="save it with transformers as tokenizer.json, where its own class runs",
        )
    return best


def _broken(texts: list[str], pattern: str) -> int:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return sum(len(split.pre_tokenize_str(text)) > 1 for text in texts)


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or added_tokens.json."""
    named = {str(settings.get(role)) for role in _ROLES}
    named |= {str(token) for token in settings.get("additional_special_tokens") or []}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    found = {
        int(index): AddedToken(
            token["content"], **{flag: token[flag] for flag in flags if flag in token}
        )
        for index, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    for content, index in _read(folder / "added_tokens.json").items():
        found.setdefault(
            int(index), AddedToken(content, normalized=False, special=content in named)
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
