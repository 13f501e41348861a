"""Byte-level BPE: the bytes that its words stand for, and tokenizers that lie in parts.

In parts means vocab.json, merges.txt, added tokens, and a class that no library has (Dream's kind).
All there is to such a tokenizer stands in these files but for one thing: the pattern by which text
is cut before merges apply. The class would say it, as code; here it is recognised. A vocabulary was
learnt inside of the pieces, so under the right pattern each of its tokens stays in one piece.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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
_ROLES = ("bos", "eos", "unk", "pad", "mask", "sep", "cls")


# GPT-2's: the printable character that stands for each byte in a vocabulary.
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


def byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a token in the byte-level alphabet; None where a character is not of it."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return None


def is_in_parts(folder: Path) -> bool:
    """Whether the folder holds such a tokenizer, and no tokenizer.json."""
    parts = (folder / "vocab.json", folder / "merges.txt")
    return all(part.exists() for part in parts) and not (folder / "tokenizer.json").exists()


def tokenizer_from_parts(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer. TideError where a file is damaged, or no known pattern fits it."""
    # 1. The files.
    try:
        vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        model: Any = models.BPE(vocab=vocabulary, merges=[(a, b) for a, b in merges])
        settings = _read(folder / "tokenizer_config.json")
        added = _added_tokens(folder, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TideError(
            f"the tokenizer in {folder} cannot be read: {error}", fix="download its files again"
        ) from error
    # 2. The steps around the merges.
    name = _pattern_of(vocabulary, folder)
    raw: Any = Tokenizer(model)
    if name == "qwen2":
        raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
    prefix = bool(settings.get("add_prefix_space"))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    raw.decoder = decoders.ByteLevel()
    # 3. Added tokens, each at its id.
    for index, token in sorted(added.items()):
        raw.add_tokens([token])
        room = raw.token_to_id(token.content)
        if room != index:
            raise TideError(
                f"the added token {token.content!r} of {folder} has id {index}, its files leave "
                f"room for {room}",
                fix="download the tokenizer's files again",
            )
    # 4. Their roles, and the chat template.
    roles = {}
    for role in _ROLES:
        token = settings.get(f"{role}_token")
        if token is not None:
            roles[f"{role}_token"] = token["content"] if isinstance(token, dict) else token
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    fast.chat_template = template
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


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or added_tokens.json."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    tokens = {}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        own = {flag: token[flag] for flag in flags if flag in token}
        tokens[int(index)] = AddedToken(token["content"], **own)
    special = {str(settings.get(f"{role}_token")) for role in _ROLES}
    special |= {str(token) for token in settings.get("additional_special_tokens") or []}
    for content, index in _read(folder / "added_tokens.json").items():
        token = AddedToken(content, normalized=False, special=content in special)
        tokens.setdefault(int(index), token)
    return tokens


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
