"""Tokenizers, student's and teacher's alike: ids, the bytes of every token, chat text.

Offsets of Hugging Face tokenizers count characters, and several tokens may share one (an emoji is
four bytes and often three tokens). Alignment needs bytes, so a table of every token's bytes is
built once from the vocabulary.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from shared.system.errors import TideError, Unusable
from shared.system.files import refuse_odd_in
from shared.text.byte_level import byte_level_bytes, is_in_parts, tokenizer_from_parts
from shared.text.templates import ChatTemplate, Message, RenderedChat, Span, Turns


class Tokenizer:
    """A tokenizer with its chat template, the bytes of every token and a fingerprint.

    `date` is what the chat template takes for today; None: today.
    """

    def __init__(self, backend: Any, name: str, date: datetime.date | None = None) -> None:
        self.backend = backend
        self.name = name
        self.date = date

    @classmethod
    def load(cls, path: str | Path, date: datetime.date | None = None) -> "Tokenizer":
        """Load from a folder or a hub id, without remote code. TideError where that fails."""
        refuse_odd_in(Path(path))
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            if is_in_parts(Path(path)):
                backend: Any = tokenizer_from_parts(Path(path))
            else:
                backend = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except TideError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TideError(
                f"no tokenizer could be loaded from {path}: {reason}",
                expected="a folder with tokenizer.json (or a vocabulary) and "
                "tokenizer_config.json, or a hub id",
                fix="check the path; a hub id needs network access",
            ) from error
        finally:
            transformers_logging.set_verbosity(level)
        return cls(backend, str(path), date)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; TideError if the tokenizer has none."""
        return ChatTemplate(self.backend, self.name, self.date)

    def render(
        self, messages: Sequence[Message], turns: Turns = "last", tools: Any = None
    ) -> RenderedChat:
        """The chat as text, with the places of its contents and of what is trained."""
        return self.template.render(messages, turns, tools)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no token is added that the text does not contain."""
        if not texts:
            return []
        return self.backend(list(texts), add_special_tokens=False)["input_ids"]

    def encode_chats(self, chats: Sequence[RenderedChat]) -> list[list[list[int]] | Unusable]:
        """Ids of each chat cut at its turns: prompt, response, prompt, response, … and the rest, if
        any. Each is tokenised apart, as at inference.

        What contents spell is never a control token. Unusable where they spell one, and cannot be
        told from the template's own text.
        """
        # 1. Where each chat is cut, and what in its contents looks like a control token.
        cuts, spelled = [], []
        easy: list[str] = []
        for chat in chats:
            edges = [0]
            for turn in chat.turns:
                edges += [turn.start, turn.end]
            if edges[-1] < len(chat.text):
                edges.append(len(chat.text))
            cuts.append(list(pairwise(edges)))
            spelled.append(self._spelled(chat))
            if spelled[-1] == []:
                easy += [chat.text[start:stop] for start, stop in cuts[-1]]
        # 2. Chats whose contents spell none, nearly all, are tokenised in one call.
        encoded = iter(self.encode(easy))
        # 3. The others around what is spelled.
        results: list[list[list[int]] | Unusable] = []
        for chat, spans, plain in zip(chats, cuts, spelled, strict=True):
            if isinstance(plain, Unusable):
                results.append(plain)
            elif plain:
                results.append([self._encode_around(chat.text, a, b, plain) for a, b in spans])
            else:
                results.append([next(encoded) for _ in spans])
        return results

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Ids of the text after which a model answers. Unusable as in `encode_chats`."""
        (parts,) = self.encode_chats([self.template.prompt(messages, tools)])
        if isinstance(parts, Unusable):
            raise parts
        return [i for part in parts for i in part]

    def _spelled(self, chat: RenderedChat) -> list[Span] | Unusable:
        """Spans of the text that look like control tokens and are content."""
        if self._control is None:
            return []
        if chat.plain is None:
            for content in chat.contents:
                if match := self._control.search(content):
                    reason = f"a content spells {match.group()!r}"
                    return Unusable("spells a control token", reason)
            return []
        spans = []
        for match in self._control.finditer(chat.text):
            start, stop = match.span()
            if any(start < b and stop > a for a, b in chat.plain):
                spans.append((start, stop))
        return spans

    def _encode_around(self, text: str, start: int, stop: int, plain: Sequence[Span]) -> list[int]:
        """Ids of text[start:stop]: control tokens by their ids, all else, `plain` too, as text."""
        assert self._control is not None
        ids: list[int] = []
        at = start
        controls = [m for m in self._control.finditer(text, start, stop) if m.span() not in plain]
        for match in [*controls, None]:
            words = text[at : match.start() if match else stop]
            if words:
                words_as_text = self.backend(
                    words, add_special_tokens=False, split_special_tokens=True
                )
                ids += words_as_text["input_ids"]
            if match:
                ids.append(int(self.backend.convert_tokens_to_ids(match.group())))
                at = match.end()
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Control tokens, the longest first; None where there are none."""
        added = {str(t.content) for t in self.backend.added_tokens_decoder.values() if t.special}
        names = sorted({*added, *map(str, self.backend.all_special_tokens)}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.backend.decode(list(ids), **settings)

    def __len__(self) -> int:
        return len(self.backend)

    def special_id(self, role: str, token: str | None = None) -> int:
        """Id of the `role` token (`eos`, `pad`, `mask`), or of `token` where it is named."""
        if token is not None:
            index = self.backend.convert_tokens_to_ids(token)
            if index is None or self.backend.convert_ids_to_tokens(index) != token:
                raise TideError(
                    f"the tokenizer of {self.name} has no token {token!r}",
                    expected=f"the {role} token in its vocabulary",
                    fix=f"add {token!r} to the tokenizer as a special token",
                )
            return int(index)
        index = getattr(self.backend, f"{role}_token_id")
        if index is None:
            raise TideError(
                f"the tokenizer of {self.name} names no {role} token",
                expected=f"`{role}_token` in tokenizer_config.json",
                fix="set it there, or name the token in the configuration",
            )
        return int(index)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of every token, by id. Added tokens stand for their own text; unused ids are empty.

        A vocabulary is byte-level or SentencePiece's, where `<0xE4>` is a byte, U+2581 a space.
        """
        vocabulary: dict[str, int] = self.backend.get_vocab()
        added = {int(i): str(t.content) for i, t in self.backend.added_tokens_decoder.items()}
        sample = [token for token, i in vocabulary.items() if i not in added][:4096]
        byte_level = all(byte_level_bytes(token) is not None for token in sample)
        table = [b""] * (max([*vocabulary.values(), *added], default=-1) + 1)
        for token, index in vocabulary.items():
            if byte_level:
                table[index] = byte_level_bytes(token) or token.encode()
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                table[index] = bytes([int(token[3:5], 16)])
            else:
                table[index] = token.replace("\u2581", " ").encode()
        for index, content in added.items():
            table[index] = content.encode()
        return table

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Ids of the control tokens that the chat template writes behind an answer; none where it
        has no template.
        """
        try:
            closing = self.template.closing
        except TideError:
            return ()
        tokens = [] if self._control is None else self._control.findall(closing)
        return tuple(int(self.backend.convert_tokens_to_ids(token)) for token in tokens)

    @cached_property
    def writes_space_in_front(self) -> bool:
        """Whether a text without a space in front gets one, as in SentencePiece."""
        first = self.encode(["a"])[0]
        return bool(first) and self.token_bytes[first[0]].startswith(b" ")

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
