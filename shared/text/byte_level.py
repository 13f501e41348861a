"""Byte-level BPE: the bytes that its words stand for, and tokenizers that lie in parts.

In parts means vocab.json, merges.txt, added tokens, and a class that no library has (Dream's kind),
whose code would say by which pattern text is cut before merges apply. Here it is recognised: under
the right one each token of the vocabulary stays in one piece.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.system.files import TideError

_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
# The known families; "embedded" is this project's own. Of those as good as each other the first.
PATTERNS = {
    "qwen2": _WORDS + r"|\p{N}" + _REST,
    "embedded": r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n\s*|\s+(?!\S)|\s+",
    "llama3": _WORDS + r"|\p{N}{1,3}" + _REST,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# Shares of the tokens: real vocabularies hold some that their own pattern cuts (1,673 of 150,195 in
# Qwen's).
_MOST_CUT, _AS_GOOD = 0.03, 0.001


# GPT-2's: the printable character that stands for each byte in a vocabulary.
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


def byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a token in the byte-level alphabet; None where a character is not of it."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return None


def is_in_parts(folder: Path) -> bool:
    """Whether the folder holds such a tokenizer: no tokenizer.json, and no class that is known."""
    there = [(folder / name).exists() for name in ("vocab.json", "merges.txt", "tokenizer.json")]
    if there != [True, True, False]:
        return False
    kind = str(_read(folder / "tokenizer_config.json").get("tokenizer_class"))
    general = kind.startswith(("PreTrained", "Tokenizers", "Python"))
    return general or not hasattr(transformers, kind)


def tokenizer_from_parts(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer. TideError where a file is damaged, or no known pattern fits it."""
    # 1. The files.
    try:
        vocabulary: dict[str, int] = _read(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        model: Any = models.BPE(vocab=vocabulary, merges=[(a, b) for a, b in merges])
        settings = _read(folder / "tokenizer_config.json")
        added = _read(folder / "added_tokens.json")
        stated = settings.get("added_tokens_decoder") or {}
        added |= {token["content"]: int(index) for index, token in stated.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the tokenizer in {folder} cannot be read: {error}"
        raise TideError(what, fix="download its files again") from error
    # 2. The steps around the merges; added tokens, roles and template are in the files.
    name = _pattern_of(vocabulary, folder)
    raw: Any = Tokenizer(model)
    if name == "qwen2":
        raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
    prefix = bool(settings.get("add_prefix_space"))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder), tokenizer_object=raw)
    # 3. Added tokens, each at its id.
    for token, index in added.items():
        if (room := fast.convert_tokens_to_ids(token)) != index:
            what = f"the added token {token!r} of {folder} has id {index}, its files have room for "
            raise TideError(what + str(room), fix="download the tokenizer's files again")
    return fast


def _pattern_of(vocabulary: dict[str, int], folder: Path) -> str:
    """The pattern that cuts the fewest tokens. TideError where it cuts more than a few."""
    texts = []
    for token in vocabulary:
        try:
            texts.append((byte_level_bytes(token) or b"").decode())
        except UnicodeDecodeError:
            continue  # a part of a character: no pattern cuts there
    cut = {}
    for name, pattern in PATTERNS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        cut[name] = sum(len(split.pre_tokenize_str(text)) > 1 for text in texts)
    best = next(n for n in PATTERNS if cut[n] <= min(cut.values()) + _AS_GOOD * len(texts))
    if cut[best] > _MOST_CUT * max(1, len(texts)):
        raise TideError(
            f"the tokenizer in {folder} cuts text by none of the known patterns "
            f"({', '.join(PATTERNS)}): the best of them cuts {cut[best]} of {len(texts)} tokens",
            fix="save it with transformers as tokenizer.json, where its own class runs",
        )
    return best


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
