"""Tokenizers, student's and teacher's alike: ids, the bytes of every token, chat text.

Offsets of Hugging Face tokenizers count characters, and several tokens may share one (an emoji is
four bytes and often three tokens). Alignment needs bytes, so a table of every token's bytes is
built once from the vocabulary.
"""

import datetime
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence, Set
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from shared.system.files import TideError, Unusable, read_json, refuse_odd_in, write_bytes
from shared.text.byte_level import byte_level_bytes, is_in_parts, tokenizer_from_parts
from shared.text.located import Message, Span
from shared.text.templates import ChatTemplate, RenderedChat


class Tokenizer:
    """A tokenizer with its chat template, the bytes of every token and a fingerprint.

    `date` is what the chat template takes for today; None: today.
    """

    def __init__(self, backend: Any, name: str, date: datetime.date | None = None) -> None:
        self.backend = backend
        self.name = name
        self.date = date

    @classmethod
    def load(
        cls, path: str | Path, date: datetime.date | None = None, chat_template: Path | None = None
    ) -> "Tokenizer":
        """Load from a folder or a hub id, without remote code; `chat_template`, a file, stands in
        for its own. TideError where that fails.
        """
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
                expected="a folder with tokenizer.json and tokenizer_config.json, or a hub id",
                fix="check the path; a hub id needs network access",
            ) from error
        finally:
            transformers_logging.set_verbosity(level)
        model: Any = getattr(getattr(backend, "backend_tokenizer", None), "model", None)
        if getattr(model, "dropout", None):
            model.dropout = None  # or one text had other ids each time
        if chat_template is not None:
            try:
                backend.chat_template = chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                what = f"the chat template {chat_template} cannot be read: {error}"
                raise TideError(what, expected="a text in Jinja's language") from error
        return cls(backend, str(path), date)

    def save(self, folder: Path) -> None:
        """Write it so that transformers 4 loads it as well as 5, with equal ids: under a class that
        both know, which takes everything from tokenizer.json.
        """
        self.backend.save_pretrained(folder)
        config = read_json(folder / "tokenizer_config.json")
        if isinstance(names := config.pop("extra_special_tokens", None), list):
            config["additional_special_tokens"] = names
        for name in ("backend", "is_local", "local_files_only"):  # of how it was loaded here
            config.pop(name, None)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_bytes(folder / "tokenizer_config.json", text.encode())

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; TideError if the tokenizer has none."""
        return ChatTemplate(self.backend, self.name, self.date)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; no token is added that the text does not contain."""
        if not texts:
            return []
        return self.backend(
            [*texts], add_special_tokens=False, split_special_tokens=False
        ).input_ids

    def encode_chats(
        self, chats: Sequence[RenderedChat | Unusable]
    ) -> list[list[list[int]] | Unusable]:
        """Ids of each chat cut at its turns: prompt, response, prompt, response, … and the rest, if
        any. Each is tokenised apart, as at inference.

        What contents spell is never a control token. Unusable where they spell one, and cannot be
        told from the template's own text; what is unusable already stays so.
        """
        results: list[Any] = list(chats)
        easy: list[tuple[int, int, list[str]]] = []  # with the number of control tokens
        for number, chat in enumerate(chats):
            if isinstance(chat, Unusable):
                continue
            # 1. Where it is cut.
            edges = [0]
            for turn in chat.turns:
                edges += [turn.start, turn.end]
            if edges[-1] < len(chat.text):
                edges.append(len(chat.text))
            # 2. What in its contents looks like a control token is tokenised as text.
            matches = list(self._control.finditer(chat.text))
            found = next(filter(None, map(self._control.search, chat.unplaced)), None)
            if found is not None:
                reason = f"a content, a call or a tool spells {found.group()!r}"
                results[number] = Unusable("spells a control token", reason)
                continue
            # Spans are in order: the last one that begins before a match ends decides.
            spans = chat.plain or []
            plain = {
                m.span() for m in matches
                if (i := bisect_left(spans, (m.end(),))) and spans[i - 1][1] > m.start()
            }  # fmt: skip
            if plain:
                cuts = pairwise(edges)
                results[number] = [self._encode_around(chat.text, a, b, plain) for a, b in cuts]
            else:
                easy.append((number, len(matches), [chat.text[a:b] for a, b in pairwise(edges)]))
        # 3. Chats whose contents spell none, nearly all, in one call. Where such tokens are looked
        #    for in what a normaliser makes of the text, it is seen by the ids alone.
        encoded = iter(self.encode([part for *_, parts in easy for part in parts]))
        normal = any(token.normalized for token in self._flags.values())
        for number, known, parts in easy:
            results[number] = [next(encoded) for _ in parts]
            if normal and sum(i in self._control_ids for p in results[number] for i in p) > known:
                reason = "a content spells a control token once it is normalised"
                results[number] = Unusable("spells a control token", reason)
        return results

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Ids of the text after which a model answers. Unusable as in `encode_chats`."""
        (parts,) = self.encode_chats([self.template.prompt(messages, tools)])
        if isinstance(parts, Unusable):
            raise parts
        return [i for part in parts for i in part]

    def _encode_around(self, text: str, start: int, stop: int, plain: Set[Span]) -> list[int]:
        """Ids of text[start:stop]: control tokens by their ids, all else, `plain` too, as text."""
        ids: list[int] = []
        as_text = {"add_special_tokens": False, "split_special_tokens": True}
        for match in [*self._control.finditer(text, start, stop), None]:
            if match is None or match.span() not in plain:
                words = text[start : match.start() if match else stop]
                flags = match and self._flags[match.group()]
                if words := words.rstrip() if flags and flags.lstrip else words:
                    if ids and self._inside is not None:
                        ids += self._inside.encode(words, add_special_tokens=False).ids
                    else:
                        ids += self.backend(words, **as_text)["input_ids"]
                if match and flags:
                    ids.append(int(self.backend.convert_tokens_to_ids(match.group())))
                    start = match.end()
                    if flags.rstrip:
                        start = stop - len(text[start:stop].lstrip())
        return ids

    @cached_property
    def _inside(self) -> Any:
        """For text behind a control token, where the first text of all is read otherwise."""
        raw = getattr(self.backend, "backend_tokenizer", None)
        state = raw.to_str() if raw is not None else ""
        if '"prepend_scheme":"first"' not in state:
            return None
        never = state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        inside = RawTokenizer.from_str(never)
        inside.no_padding()
        inside.no_truncation()
        inside.encode_special_tokens = True
        return inside

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Control tokens, the longest first; one that must be a word, between what is none."""
        ways = ["(?!)"]  # what matches nothing
        for name in sorted(self._flags, key=len, reverse=True):
            word = self._flags[name].single_word
            ways.append(rf"(?<!\w){re.escape(name)}(?!\w)" if word else re.escape(name))
        return re.compile("|".join(ways))

    @cached_property
    def _flags(self) -> dict[str, AddedToken]:
        """Of each control token what it says of itself: which white space is its own, and so on."""
        names = map(str, self.backend.all_special_tokens)
        flags = {name: AddedToken(name, normalized=False) for name in names}
        added = self.backend.added_tokens_decoder.values()
        return flags | {str(token.content): token for token in added if token.special}

    @cached_property
    def _control_ids(self) -> set[int]:
        ids = {self.backend.convert_tokens_to_ids(name) for name in self._flags}
        return ids - {self.backend.unk_token_id}

    def text(self, ids: Sequence[int]) -> str:
        """Text of `ids` without control tokens, and without the space that `encode` puts in front:
        decoders of one family keep that, those of another take one that is the text's own.
        """
        known = (i for i in ids if i < len(self.token_bytes) and i not in self._control_ids)
        text = b"".join(self.token_bytes[i] for i in known).decode(errors="replace")
        return text.removeprefix(" ") if self.writes_space_in_front else text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self.backend.decode(list(ids), clean_up_tokenization_spaces=False)

    def __len__(self) -> int:
        return len(self.backend)

    def special_id(self, role: str, token: str | None = None) -> int:
        """Id of the `role` token (`eos`, `pad`, `mask`), or of `token` where it is named."""
        names = self.backend
        index = names.convert_tokens_to_ids(token) if token else getattr(names, f"{role}_token_id")
        if index is None or (token and names.convert_ids_to_tokens(index) != token):
            named = f" {token!r}" if token else ""
            raise TideError(
                f"the tokenizer of {self.name} has no {role} token{named}",
                expected=f"`{role}_token` in tokenizer_config.json, or a token of the vocabulary",
                fix="set it there, or name another token in the configuration",
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
        tokens = self._control.findall(closing)
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
