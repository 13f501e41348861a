"""Chat templates: where, in the text that a template makes, does each message stand, and what is trained?

Nothing is searched for. A response begins where the prompt of inference ends: the conversation before it, rendered with
a generation prompt. Contents are located by construction: the template is rendered once with sentinels in their places,
and the real text must equal the pieces between them joined by the contents, verbatim or stripped as templates do.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from shared.system.errors import TideError, Unusable
from shared.text.deadline import OutOfTime, within
from shared.text.located import Span, body_span, joined
from shared.text.rendered import EXTRAS, Message, Probe, RenderedChat, Turn, Turns

_SECONDS = 5.0


def _sentinel(index: int) -> str:
    return (
        f"\ue000tide-{index}\ue001"  # private-use characters: no template or corpus contains them
    )


class ChatTemplate:
    """Renders conversations with a tokenizer's own Jinja template. `date` is what the template takes for today."""

    def __init__(self, tokenizer: Any, name: str, date: datetime.date | None = None) -> None:
        if not tokenizer.chat_template:
            raise TideError(
                f"the tokenizer of {name} has no chat template",
                expected="a `chat_template` in its tokenizer_config.json or chat_template.jinja",
                fix="use the instruct version of the model, or add a template to the tokenizer's folder",
            )
        self._tokenizer, self._name, self._date = tokenizer, name, date
        self._probes: dict[tuple[str, ...], Probe] = {}

    @property
    def source(self) -> str:
        """The template's Jinja source (part of a cache's fingerprint)."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else repr(sorted(template.items()))

    @property
    def knows_today(self) -> bool:
        """Whether the template writes the date of the day."""
        return "strftime_now" in self.source

    @property
    def closing(self) -> str:
        """What stands behind an answer. Unusable where the template refuses a question and an answer."""
        return self._probe(
            [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], None
        ).closing

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> RenderedChat:
        """The text after which a model answers `messages`: where `render` lets a response begin. Without a think block
        where the template knows of one.
        """
        probes = [{**m, "content": _sentinel(i)} for i, m in enumerate(messages)]
        text, fixed = (self._prompt_text(chat, tools) for chat in (messages, probes))
        pieces = self._split(probes, fixed)
        spans = None if pieces is None else joined(pieces, messages, text)
        return RenderedChat(text, (), (), *_plain(spans, messages))

    def _prompt_text(self, messages: Sequence[Message], tools: Any) -> str:
        """With the generation prompt; with all that stands before an answer, where the template knows of no such."""
        prompt = self._apply(messages, True, tools)
        mark = _sentinel(len(messages))
        try:
            answered = self._apply(
                [*messages, {"role": "assistant", "content": mark}], False, tools
            )
        except Unusable:
            return prompt
        before, found, _ = answered.partition(mark)
        return (
            before
            if found and before.startswith(prompt) and before[len(prompt) :].strip()
            else prompt
        )

    def render(
        self, messages: Sequence[Message], turns: Turns = "last", tools: Any = None
    ) -> RenderedChat:
        """Render `messages`, whose last one is an answer, and locate what is trained.

        Unusable where the template refuses the roles or rewrites the last answer. A trailing assistant header that some
        templates append whether or not it is asked for is cut. Earlier answers that cannot be located are not trained.
        """
        probe = self._probe(messages, tools)
        real = self._apply(messages, False, tools)
        if not real.endswith(probe.pieces[-1]):
            raise self._rewrites(messages[-1])
        spans = joined(probe.pieces, messages, real)
        stop = len(real) - len(probe.pieces[-1])
        last = self._last_turn(messages, real, probe, spans, stop, tools)
        earlier = []
        if turns == "all":
            found = (
                self._earlier_turn(i, messages, real, probe, spans, tools)
                for i in _answers(messages[:-1])
            )
            earlier = [turn for turn in found if turn is not None and turn.body[0] < turn.body[1]]
        contents: list[Span | None] = [None] * len(messages)
        for i, span in enumerate(spans or ()):
            text = messages[i].get("content") or ""
            contents[i] = span if real[slice(*span)] in (text, text.strip()) else None
        return RenderedChat(
            real[: stop + len(probe.closing)], (*earlier, last), tuple(contents), *_plain(spans, messages),
            tuple(self._ignored(messages, real, tools)),
        )  # fmt: skip

    def _last_turn(
        self,
        messages: Sequence[Message],
        real: str,
        probe: Probe,
        spans: list[Span] | None,
        stop: int,
        tools: Any,
    ) -> Turn:
        answer, number = messages[-1], len(messages) - 1
        start = self._start(number, messages, real, probe, spans, tools)
        if start is None or start > stop:
            raise self._rewrites(answer)
        for name in EXTRAS:
            if answer.get(name):
                self._refuse_ignored(name, messages, real, tools)
        extras = any(answer.get(name) for name in EXTRAS)
        body = body_span(real, start, stop, None if extras else answer.get("content") or "")
        if body is None:
            raise self._rewrites(answer)
        return Turn(number, start, stop + len(probe.closing), body)

    def _earlier_turn(
        self,
        i: int,
        messages: Sequence[Message],
        real: str,
        probe: Probe,
        spans: list[Span] | None,
        tools: Any,
    ) -> Turn | None:
        """The turn of answer `i`, which is not the last message; None where it cannot be located."""
        if spans is None or any(messages[i].get(name) for name in EXTRAS):
            return None
        start, (first, stop) = self._start(i, messages, real, probe, spans, tools), spans[i]
        if start is None or start > first:
            start = first
        closed = real.startswith(probe.closing, stop)
        return Turn(i, start, stop + (len(probe.closing) if closed else 0), (first, stop))

    def _start(
        self,
        i: int,
        messages: Sequence[Message],
        real: str,
        probe: Probe,
        spans: list[Span] | None,
        tools: Any,
    ) -> int | None:
        """Where the prompt of answer `i` ends in the text; None where no prompt is a prefix of it."""
        if i not in probe.leads:
            probes = [{**m, "content": _sentinel(k)} for k, m in enumerate(messages)]
            prefix = self._prompt_of(i, probes, self._apply(probes, False, tools), tools)
            ahead = sum(len(p) for p in probe.pieces[: i + 1]) + sum(
                len(_sentinel(k)) for k in range(i)
            )
            lead = None if prefix is None or prefix > ahead else ahead - prefix
            own = any(messages[i].get(name) for name in EXTRAS)
            if lead and not own and probe.pieces[i][-lead:].strip():
                lead = 0  # the template's own words (a header, an empty think block) are no part of the answer
            probe.leads[i] = lead
        lead = probe.leads[i]
        if spans is not None and lead is not None:
            return spans[i][0] - lead
        found = self._prompt_of(i, messages, real, tools)
        return found if found is not None or spans is None else spans[i][0]

    def _prompt_of(self, i: int, messages: Sequence[Message], text: str, tools: Any) -> int | None:
        """Length of the longest prompt of answer `i` that `text` starts with."""
        found = []
        for generation, thinking in ((True, False), (True, True), (False, False)):
            try:
                prompt = self._apply(messages[:i], generation, tools, thinking)
            except (
                Unusable
            ):  # a conversation that begins with the answer: some templates want a user first
                continue
            if text.startswith(prompt):
                found.append(len(prompt))
        return max(found, default=None)

    def _probe(self, messages: Sequence[Message], tools: Any) -> Probe:
        """The fixed text before, between and after the contents. Kept by roles where messages are but texts."""
        plain = tools is None and all(set(m) == {"role", "content"} for m in messages)
        roles = tuple(str(m["role"]) for m in messages)
        if plain and roles in self._probes:
            return self._probes[roles]
        probes = [{**m, "content": _sentinel(i)} for i, m in enumerate(messages)]
        text = self._apply(probes, False, tools)
        pieces = self._split(probes, text)
        if pieces is None:
            dropped = next(
                i
                for i in range(len(messages))
                if _sentinel(i) not in text or text.count(_sentinel(i)) > 1
            )
            raise Unusable(
                "template drops a message", f"the chat template of {self._name} drops message {dropped} "
                f"({roles[dropped]}), or writes it twice or elsewhere",
            )  # fmt: skip
        closing = pieces[-1]
        if text == self._apply(
            probes, True, tools
        ):  # a header is appended whether or not it is asked for
            closing = self._until_special(closing)
        made = Probe(pieces, closing)
        if plain:
            self._probes[roles] = made
        return made

    @staticmethod
    def _split(probes: Sequence[Message], text: str) -> list[str] | None:
        """`text` cut at its sentinels; None where one is missing, stands twice or out of order."""
        pieces, rest = [], text
        for i in range(len(probes)):
            piece, found, rest = rest.partition(_sentinel(i))
            if not found:
                return None
            pieces.append(piece)
        return None if any(_sentinel(i) in rest for i in range(len(probes))) else [*pieces, rest]

    def _until_special(self, text: str) -> str:
        """What closes a turn, without a header behind it."""
        ends = [
            end + len(str(t))
            for t in self._tokenizer.all_special_tokens
            if (end := text.find(str(t))) >= 0
        ]
        end = min(ends, default=0)
        return text[:end] if text[end:].strip() else text

    def _refuse_ignored(
        self, name: str, messages: Sequence[Message], real: str, tools: Any
    ) -> None:
        """Unusable where the template writes the same text without the answer's `name`."""
        without = [*messages[:-1], {k: v for k, v in messages[-1].items() if k != name}]
        if self._apply(without, False, tools) == real:
            raise Unusable(
                f"template drops {name}",
                f"the chat template of {self._name} drops the answer's {name}",
            )

    def _ignored(self, messages: Sequence[Message], real: str, tools: Any) -> Iterator[str]:
        """What the text would be the same without."""
        if tools is not None and self._apply(messages, False, None) == real:
            yield "tools"
        for name in EXTRAS:
            if any(m.get(name) for m in messages[:-1]):
                without = [{k: v for k, v in m.items() if k != name} for m in messages[:-1]]
                if self._apply([*without, messages[-1]], False, tools) == real:
                    yield f"{name} of earlier answers"

    def _rewrites(self, answer: Message) -> Unusable:
        content = str(answer.get("content") or "")[:60]
        return Unusable(
            "template rewrites the response",
            f"the chat template of {self._name} rewrites {content!r}",
        )

    def _apply(
        self, messages: Sequence[Message], generation: bool, tools: Any, thinking: bool = False
    ) -> str:
        settings: dict[str, Any] = {} if tools is None else {"tools": tools}
        if self._date is not None:
            settings["strftime_now"] = self._date.strftime
        try:
            with within(_SECONDS):
                return self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation,
                    enable_thinking=thinking, **settings,
                )  # fmt: skip
        except OutOfTime as error:
            raise TideError(
                f"the chat template of {self._name} did not end within {_SECONDS:.0f} seconds",
                expected="a template that renders a conversation at once",
                fix="use the model's own template, from a place that you trust",
            ) from error
        except Exception as error:  # Jinja raises many types; templates also raise on purpose
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Unusable(
                "template refuses the roles",
                f"the chat template of {self._name} refused roles {[m['role'] for m in messages]}: {reason}",
            ) from error


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def _plain(
    spans: list[Span] | None, messages: Sequence[Message]
) -> tuple[tuple[Span, ...] | None, tuple[str, ...]]:
    if spans is not None:
        return tuple(spans), ()
    return None, tuple(str(m.get("content") or "") for m in messages)
