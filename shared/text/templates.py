"""Chat templates: where each message stands in the text that a template makes, and what is trained.

Nothing is searched for. A response begins where the prompt of inference ends: the conversation
before it, rendered with a generation prompt. Contents are located by construction: the template is
rendered once with sentinels in their places, and the real text must equal the pieces between them
joined by the contents, verbatim or stripped as templates do.
"""

import datetime
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.system.files import TideError, Unusable
from shared.text.located import (
    EXTRAS,
    Messages,
    Span,
    contents_of,
    locate_contents,
    own_words,
    pieces_of,
    sentinel,
    unplaced_of,
    with_sentinels,
)

Turns = Literal["last", "all"]


@dataclass(frozen=True)
class Turn:
    """A response that is trained: `start` … `end`, its end of turn included; `body`: its words."""

    message: int
    start: int
    end: int
    body: Span


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text. What stands outside of `turns` is prompt (no loss).

    `plain` are the spans of all contents; None where they could not be told from the template's own
    text. `unplaced` may stand anywhere: calls, tools, contents then. `ignored` is what the
    conversation has and the template does not write: tools, parts of earlier answers.
    """

    text: str
    turns: tuple[Turn, ...]
    plain: list[Span] | None
    unplaced: list[str]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the contents of a sequence of roles.

    `pieces` is the fixed text before, between and after the contents; the last one is `closing` and
    what the template appends behind it. `leads` says, once for a sequence of roles, how much of the
    piece before each answer is the answer's; None: no prompt of inference begins the text.
    """

    pieces: list[str]
    closing: str
    leads: dict[int, int | None] = field(default_factory=dict)


class ChatTemplate:
    """Renders conversations with a tokenizer's own Jinja template, which transformers runs in a
    sandbox. `date` is what the template takes for today.
    """

    def __init__(self, tokenizer: Any, name: str, date: datetime.date | None = None) -> None:
        if not tokenizer.chat_template:
            raise TideError(
                f"the tokenizer of {name} has no chat template",
                expected="a `chat_template` in its tokenizer_config.json or chat_template.jinja",
                fix="use the instruct version of the model, or set student_chat_template, or "
                "teacher_chat_template, to a file with a template",
            )
        self._tokenizer, self._name, self._date = tokenizer, name, date
        self._frames: dict[tuple[str, ...], _Frame] = {}

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
        """What stands behind an answer. Unusable where the template refuses a plain exchange."""
        chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        return self._frame(chat, None).closing

    def prompt(self, messages: Messages, tools: Any = None) -> RenderedChat:
        """The text after which a model answers `messages`: where `render` lets a response begin.

        Without a think block where the template knows of one.
        """
        probes = with_sentinels(messages)
        text = self._prompt_text(messages, tools)
        pieces = pieces_of(self._prompt_text(probes, tools), probes)
        spans = None if pieces is None else locate_contents(pieces, messages, text)
        return RenderedChat(text, (), spans, unplaced_of(messages, tools, spans))

    def _prompt_text(self, messages: Messages, tools: Any) -> str:
        """With the generation prompt, or all else that stands before an answer."""
        prompt = self._apply(messages, tools, generation=True)
        mark = sentinel(len(messages))
        try:
            answered = self._apply([*messages, {"role": "assistant", "content": mark}], tools)
        except Unusable:
            return prompt
        before, _, _ = answered.partition(mark)
        more = before != answered and before.startswith(prompt) and before[len(prompt) :].strip()
        return before if more else prompt

    def render(self, messages: Messages, turns: Turns = "last", tools: Any = None) -> RenderedChat:
        """Render `messages`, whose last one is an answer, and locate what is trained.

        Unusable where the template refuses the roles or rewrites the last answer. A trailing
        assistant header that some templates append whether or not it is asked for is cut. Earlier
        answers that cannot be located are not trained.
        """
        # 1. The text, and in it the contents between the template's fixed pieces.
        frame = self._frame(messages, tools)
        text = self._apply(messages, tools)
        last, answer, content = len(messages) - 1, messages[-1], contents_of(messages)[-1]
        extras = [name for name in EXTRAS if answer.get(name)]
        bare = [*messages[:-1], {"role": "assistant", "content": ""}]
        tail = self._frame(bare, tools) if extras else frame  # extras may stand behind the content
        tail = tail if text.endswith(tail.pieces[-1]) else frame
        rewritten = self._unusable("template rewrites the response", f"rewrites {content[:60]!r}")
        if not text.endswith(tail.pieces[-1]):
            raise rewritten
        spans = locate_contents(frame.pieces, messages, text)

        def start_of(i: int) -> int | None:
            """Where the prompt of answer `i` ends; None where no prompt begins the text."""
            lead = self._lead(i, messages, tools, frame)
            if spans is not None and lead is not None:
                return spans[i][0] - lead
            prompt = self._prompt_length(i, messages, text, tools)
            return spans[i][0] if prompt is None and spans is not None else prompt

        # 2. The last response: from the end of its prompt to its end of turn.
        stop = len(text) - len(tail.pieces[-1])
        start = start_of(last)
        if start is None or start > stop:
            raise rewritten
        dropped = self._dropped(messages, tools)
        for name, own in sorted(dropped):  # results without calls, in turns that say nothing
            if own or name == "tool_calls":
                raise self._unusable(f"template drops {name}", f"drops {name}, or a part of them")
        body = own_words(text, start, stop, None if extras else content)
        if body is None:
            raise rewritten
        trained = [Turn(last, start, stop + len(tail.closing), body)]
        # 3. Earlier responses, where their contents were located.
        located = spans if spans is not None and turns == "all" else []
        for i, (first, end) in enumerate(located[:-1]):
            m = messages[i]
            if m["role"] != "assistant" or m.get("train") is False or any(map(m.get, EXTRAS)):
                continue
            start = start_of(i)
            start = first if start is None else min(start, first)
            closed = len(frame.closing) if text.startswith(frame.closing, end) else 0
            if first < end:
                trained.insert(-1, Turn(i, start, end + closed, (first, end)))
        # 4. What the text would be the same without.
        ignored = [f"{name} of earlier answers" for name, _ in dropped]
        if tools is not None and self._apply(messages, None) == text:
            ignored.append("tools")
        text = text[: trained[-1].end]
        unplaced = unplaced_of(messages, tools, spans)
        return RenderedChat(text, tuple(trained), spans, unplaced, tuple(ignored))

    def _dropped(self, messages: Messages, tools: Any) -> set[tuple[str, bool]]:
        """Of which parts beside contents the template leaves out something (a call, a call's
        arguments), and whether the last answer's: one text says it, with marks in their places.
        """
        parts: list[tuple[str, bool, list[str]]] = []  # any of the marks is to stand there

        def marked(call: Any, own: bool) -> dict[str, Any]:
            name, arguments = (f"tide-{kind}-{len(parts)}-" for kind in ("name", "arguments"))
            needed = call["function"].get("arguments") not in ({}, "{}", "", None)
            parts.append(("tool_calls", own, [arguments] if needed else [arguments, name]))
            return {**call, "function": {"name": name, "arguments": {arguments: 0}}}

        probes = []
        for message in messages:
            probe, own = dict(message), message is messages[-1]
            if "tool_calls" in probe:
                probe["tool_calls"] = [marked(call, own) for call in probe["tool_calls"]]
            if "reasoning_content" in probe:
                probe["reasoning_content"] = f"tide-thought-{len(parts)}-"
                parts.append(("reasoning_content", own, [probe["reasoning_content"]]))
            probes.append(probe)
        text = self._apply(probes, tools) if parts else ""
        return {(name, own) for name, own, marks in parts if not any(m in text for m in marks)}

    def _lead(self, i: int, messages: Messages, tools: Any, frame: _Frame) -> int | None:
        """How much of the text in front of answer `i`'s content is its own (`leads`)."""
        if i not in frame.leads:
            probes = with_sentinels(messages)
            prompt = self._prompt_length(i, probes, self._apply(probes, tools), tools)
            written = [*frame.pieces[: i + 1], *(probe["content"] for probe in probes[:i])]
            ahead = sum(map(len, written))
            lead = None if prompt is None or prompt > ahead else ahead - prompt
            extras = any(messages[i].get(name) for name in EXTRAS)
            if lead and not extras and frame.pieces[i][-lead:].strip():
                lead = 0  # the template's own words (a header, an empty think block) are no answer
            frame.leads[i] = lead
        return frame.leads[i]

    def _prompt_length(self, i: int, messages: Messages, text: str, tools: Any) -> int | None:
        """Length of the longest prompt of answer `i` that `text` starts with."""
        prompts = []
        for generation, thinking in ((True, False), (True, True), (False, False)):
            with suppress(Unusable):  # the answer comes first: some templates want a user before it
                prompts.append(self._apply(messages[:i], tools, generation, thinking))
        return max((len(prompt) for prompt in prompts if text.startswith(prompt)), default=None)

    def _frame(self, messages: Messages, tools: Any) -> _Frame:
        """The fixed text around the contents. Kept by roles where messages are but texts."""
        roles = tuple(str(m["role"]) for m in messages)
        reusable = tools is None and all(set(m) <= {"role", "content", "train"} for m in messages)
        if reusable and roles in self._frames:
            return self._frames[roles]
        probes = with_sentinels(messages)
        text = self._apply(probes, tools)
        pieces = pieces_of(text, probes)
        if pieces is None:
            counts = [text.count(probe["content"] or text) for probe in probes]
            dropped = next((i for i, count in enumerate(counts) if count != 1), 0)
            what = f"drops message {dropped} ({roles[dropped]}), or writes it twice or elsewhere"
            raise self._unusable("template drops a message", what)
        closing = pieces[-1]
        if text == self._apply(probes, tools, generation=True):
            # A header is appended whether or not it is asked for: a turn ends at its control token.
            tokens = [str(t) for t in self._tokenizer.all_special_tokens if str(t) in closing]
            end = min((closing.find(token) + len(token) for token in tokens), default=0)
            closing = closing[:end] if closing[end:].strip() else closing
        frame = _Frame(pieces, closing)
        if reusable:
            self._frames[roles] = frame
        return frame

    def _apply(
        self, messages: Messages, tools: Any, generation: bool = False, thinking: bool = False
    ) -> str:
        given = {"tools": tools, "strftime_now": self._date and self._date.strftime}
        settings = {name: value for name, value in given.items() if value is not None}
        settings |= {"add_generation_prompt": generation, "enable_thinking": thinking}
        chat = [dict(message) for message in messages]
        for message in chat:
            message.pop("train", None)
        objects: list[str] = []

        def with_text(value: dict[str, Any]) -> dict[str, Any]:
            if isinstance(arguments := value.get("arguments"), dict | list) and "name" in value:
                objects.append(str(arguments))
                value["arguments"] = json.dumps(arguments, ensure_ascii=False)
            return value

        called = [message for message in chat if message.get("tool_calls")]
        texts = json.loads(json.dumps(chat if called else []), object_hook=with_text)
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, **settings)
        except Exception as error:  # Jinja raises many types; templates also raise on purpose
            if not objects:
                roles = [m["role"] for m in messages]
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                what = f"refused roles {roles}: {reason}"
                raise self._unusable("template refuses the roles", what) from error
        else:
            if not any(python in text for python in objects if python != "{}"):
                return text
        # Most templates write a call's arguments as JSON; this one wants them so written.
        return self._apply(texts, tools, generation, thinking)

    def _unusable(self, reason: str, what: str) -> Unusable:
        return Unusable(reason, f"the chat template of {self._name} {what}")
