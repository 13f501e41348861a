"""Chat templates: where, in the text that a template makes, does each message stand?

Alignment between two tokenisations works on message contents (DESIGN §3), so the places of the contents must be
known exactly, also when a content occurs twice, is empty, or equals a word of the template itself. A template is
therefore rendered once with sentinels in place of the contents, and the real text is checked against the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import TideError

Message = Mapping[str, str]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text. `text[:response_start]` is the prompt (no loss), the rest the response.

    `contents[i]` is the character span of message i, or None where the template altered the content.
    """

    text: str
    response_start: int
    contents: tuple[tuple[int, int] | None, ...]


def _sentinel(index: int) -> str:
    return f"\ue000tide-{index}\ue001"  # private-use characters: no template or corpus contains them


class ChatTemplate:
    """Renders conversations with a tokenizer's own Jinja template and locates the contents in the text."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not tokenizer.chat_template:
            raise TideError(
                f"the tokenizer of {name} has no chat template",
                expected="a `chat_template` in its tokenizer_config.json or chat_template.jinja",
                fix="use the instruct version of the model, or add a template to the tokenizer's folder",
            )
        self._tokenizer = tokenizer
        self._name = name
        self._pieces: dict[tuple[str, ...], list[str]] = {}

    @property
    def source(self) -> str:
        """The template's Jinja source (part of a cache's fingerprint)."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else repr(sorted(template.items()))

    def _apply(self, messages: Sequence[Message], generation: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        except Exception as error:  # Jinja raises many types; templates also raise on purpose
            raise TideError(
                f"the chat template of {self._name} refused roles {[m['role'] for m in messages]}: {error}",
                expected="roles in an order that the template knows",
                fix="mend the data, or choose a teacher whose template takes these roles",
            ) from error

    def _terminate(self, messages: Sequence[Message], text: str) -> str:
        """Cut the assistant header that some templates append whether or not it is asked for."""
        if text != self._apply(messages, generation=True):
            return text
        last = text.rfind(_sentinel(len(messages) - 1)) + len(_sentinel(len(messages) - 1))
        specials = [str(token) for token in self._tokenizer.all_special_tokens]
        ends = [end + len(token) for token in specials if (end := text.find(token, last)) >= 0]
        return text[: min(ends)] if ends else text[:last]

    def _pieces_for(self, roles: tuple[str, ...]) -> list[str]:
        """The fixed text before, between and after the contents, for this sequence of roles."""
        if roles not in self._pieces:
            probes = [{"role": role, "content": _sentinel(i)} for i, role in enumerate(roles)]
            rest = self._terminate(probes, self._apply(probes, generation=False))
            pieces = []
            for i in range(len(roles)):
                piece, found, rest = rest.partition(_sentinel(i))
                if not found:
                    raise TideError(
                        f"the chat template of {self._name} drops message {i} ({roles[i]})",
                        expected="a template that writes every message's content once, in order",
                        fix="remove that message from the data, or choose another teacher",
                    )
                pieces.append(piece)
            self._pieces[roles] = [*pieces, rest]
        return self._pieces[roles]

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Render `messages`, whose last one is the response, and locate every content.

        The text is what the template makes, except for a trailing assistant header, which is cut. Where the
        template rewrites a content (some strip white space), the altered form is located instead.
        """
        pieces = self._pieces_for(tuple(m["role"] for m in messages))
        real = self._apply(messages, generation=False)
        spans: list[tuple[int, int] | None] = []
        at = 0
        for message, piece in zip(messages, pieces[:-1], strict=True):
            if not real.startswith(piece, at):
                return self._search(messages, real)
            at += len(piece)
            content = message["content"]
            if not real.startswith(content, at):
                content = content.strip()
            spans.append((at, at + len(content)))
            at += len(content)
        last = spans[-1]
        if last is None or not (real.startswith(pieces[-1], at) and self._verbatim(messages, spans, real)):
            return self._search(messages, real)
        return RenderedChat(real[: at + len(pieces[-1])], last[0], tuple(spans))

    @staticmethod
    def _verbatim(messages: Sequence[Message], spans: Sequence[tuple[int, int] | None], real: str) -> bool:
        return all(
            span is not None and real[slice(*span)] in (message["content"], message["content"].strip())
            for message, span in zip(messages, spans, strict=True)
        )

    def _search(self, messages: Sequence[Message], real: str) -> RenderedChat:
        """The template treats this conversation in its own way: find the contents one after another."""
        spans: list[tuple[int, int] | None] = []
        at = 0
        for message in messages[:-1]:
            found = real.find(message["content"], at)
            spans.append((found, found + len(message["content"])) if found >= 0 else None)
            at = found + len(message["content"]) if found >= 0 else at
        content = messages[-1]["content"]
        found = real.rfind(content)
        if found < at or not content:
            raise TideError(
                f"the chat template of {self._name} rewrites the response {content[:60]!r}",
                expected="the response's content to stand verbatim in the chat text",
                fix="remove the example, or use a template that leaves contents as they are",
            )
        spans.append((found, found + len(content)))
        return RenderedChat(real, found, tuple(spans))
