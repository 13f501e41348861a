"""Tokenizers, student's and teacher's alike, behind one small face: ids, bytes of every token, chat text.

Offsets of Hugging Face tokenizers count characters, and several tokens may share one (an emoji is four bytes and
often three tokens). Alignment needs bytes, so a table of every token's bytes is built once from the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from shared.errors import TideError
from shared.templates import ChatTemplate, Message, RenderedChat


def byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet: the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table.update({chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)})
    return table


_ALPHABET = byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a token written in the byte-level alphabet; None where a character is not of it."""
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:
        return None


def _sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: `<0xE4>` is a byte, U+2581 is a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


class Tokenizer:
    """A tokenizer with its chat template, the bytes of every token and a fingerprint."""

    def __init__(self, backend: Any, name: str) -> None:
        self.backend = backend
        self.name = name

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load from a folder or a hub id, without remote code. Raises TideError where that fails."""
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            backend = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as error:
            raise TideError(
                f"no tokenizer could be loaded from {path}: {str(error).splitlines()[0]}",
                expected="a folder with tokenizer.json (or a vocabulary) and tokenizer_config.json, or a hub id",
                fix="check the path; a hub id needs network access",
            ) from error
        finally:
            transformers_logging.set_verbosity(level)
        return cls(backend, str(path))

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; TideError if the tokenizer has none."""
        return ChatTemplate(self.backend, self.name)

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """The chat as text, with the places of its contents."""
        return self.template.render(messages)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no token is added that the text does not contain."""
        if not texts:
            return []
        return self.backend(list(texts), add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def __len__(self) -> int:
        return len(self.backend)

    def special_id(self, role: str, token: str | None = None) -> int:
        """Id of the `role` token (`eos`, `pad`, `mask`), or of `token` where it is named."""
        if token is not None:
            found = self.backend.convert_tokens_to_ids(token)
            if found is None or self.backend.convert_ids_to_tokens(found) != token:
                raise TideError(
                    f"the tokenizer of {self.name} has no token {token!r}",
                    expected=f"the {role} token in its vocabulary",
                    fix=f"add {token!r} to the tokenizer as a special token",
                )
            return int(found)
        value = getattr(self.backend, f"{role}_token_id")
        if value is None:
            raise TideError(
                f"the tokenizer of {self.name} names no {role} token",
                expected=f"`{role}_token` in tokenizer_config.json",
                fix="set it there, or name the token in the configuration",
            )
        return int(value)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of every token, by id. Added tokens stand for their own text; unused ids are empty."""
        vocabulary: dict[str, int] = self.backend.get_vocab()
        added = {int(i): str(t.content) for i, t in self.backend.added_tokens_decoder.items()}
        sample = (t for t, i in vocabulary.items() if i not in added)
        byte_level = all(byte_level_bytes(t) is not None for t, _ in zip(sample, range(4096), strict=False))
        table = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
        for token, index in vocabulary.items():
            table[index] = (byte_level_bytes(token) or token.encode()) if byte_level else _sentencepiece_bytes(token)
        for index, content in added.items():
            table[index] = content.encode()
        return table

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of added tokens: those outside the trained vocabulary."""
        return frozenset(int(i) for i in self.backend.added_tokens_decoder)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Length of every token in bytes, int32[vocabulary]."""
        return np.array([len(b) for b in self.token_bytes], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """A hash over vocabulary, added tokens, normaliser, pre-tokeniser and merges."""
        backend = getattr(self.backend, "backend_tokenizer", None)
        if backend is not None:
            state = json.loads(backend.to_str())
            state.pop("padding", None)  # settings of the last call, not of the tokenizer
            state.pop("truncation", None)
        else:
            state = sorted(self.backend.get_vocab().items())
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]
