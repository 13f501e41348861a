"""Chat templates: where, in the text that a template makes, does each message stand, and what is
trained?

Nothing is searched for. A response begins where the prompt of inference ends: the conversation
before it, rendered with a generation prompt. Contents are located by construction: the template is
rendered once with sentinels in their places, and the real text must equal the pieces between them
joined by the contents, verbatim or stripped as templates do.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from shared.system.errors import TideError, Unusable

Message = Mapping[str, Any]
Turns = Literal["last", "all"]
Span = tuple[int, int]  # start and end, in characters of a text

EXTRAS = ("tool_calls", "reasoning_content")  # parts of an answer beside its content

# What templates do to contents.
_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


@dataclass(frozen=True)
class Turn:
    """A response that is trained: from `start` to `end`, its end of turn included. Its own words,
    without white space and marks of the template around them, are `body`.
    """

    message: int
    start: int
    end: int
    body: Span


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text. What stands outside of `turns` is prompt (no loss).

    `plain` are the spans of all `contents`; None where they could not be told from the template's
    own text. `ignored` is what the conversation has and the template does not write: tools, parts
    of earlier answers.
    """

    text: str
    turns: tuple[Turn, ...]
    plain: list[Span] | None
    contents: list[str]
    ignored: tuple[str, ...] = ()

    @property
    def response_start(self) -> int:
        """Where the last response begins."""
        return self.turns[-1].start


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the contents of a sequence of roles.

    `pieces` is the fixed text before, between and after the contents; the last one is `closing` and
    what the template appends behind it. `leads` says how much of the piece before each answer
    belongs to the answer; None where the prompt of inference is no prefix of the text.
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
                fix="use the instruct version of the model, or add a template to the tokenizer's "
                "folder",
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

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> RenderedChat:
        """The text after which a model answers `messages`: where `render` lets a response begin.

        Without a think block where the template knows of one.
        """
        probes = _with_sentinels(messages)
        text = self._prompt_text(messages, tools)
        pieces = _pieces(self._prompt_text(probes, tools), len(probes))
        spans = None if pieces is None else _locate_contents(pieces, messages, text)
        return RenderedChat(text, (), spans, _contents(messages))

    def _prompt_text(self, messages: Sequence[Message], tools: Any) -> str:
        """With the generation prompt; with all that stands before an answer, where the template
        knows of no such prompt.
        """
        prompt = self._apply(messages, tools, generation=True)
        mark = _sentinel(len(messages))
        try:
            answered = self._apply([*messages, {"role": "assistant", "content": mark}], tools)
        except Unusable:
            return prompt
        before, mark_there, _ = answered.partition(mark)
        if mark_there and before.startswith(prompt) and before[len(prompt) :].strip():
            return before
        return prompt

    def render(
        self, messages: Sequence[Message], turns: Turns = "last", tools: Any = None
    ) -> RenderedChat:
        """Render `messages`, whose last one is an answer, and locate what is trained.

        Unusable where the template refuses the roles or rewrites the last answer. A trailing
        assistant header that some templates append whether or not it is asked for is cut. Earlier
        answers that cannot be located are not trained.
        """
        # 1. The text, and in it the contents between the template's fixed pieces.
        frame = self._frame(messages, tools)
        text = self._apply(messages, tools)
        last, answer = len(messages) - 1, messages[-1]
        rewritten = Unusable(
            "template rewrites the response",
            f"the chat template of {self._name} rewrites {str(answer.get('content') or '')[:60]!r}",
        )
        if not text.endswith(frame.pieces[-1]):
            raise rewritten
        spans = _locate_contents(frame.pieces, messages, text)
        # 2. The last response: from the end of its prompt to its end of turn.
        stop = len(text) - len(frame.pieces[-1])
        start = self._response_start(last, messages, tools, text, frame, spans)
        if start is None or start > stop:
            raise rewritten
        extras = [name for name in EXTRAS if answer.get(name)]
        for name in extras:
            if self._apply([*messages[:-1], _without(name, answer)], tools) == text:
                reason = f"the chat template of {self._name} drops the answer's {name}"
                raise Unusable(f"template drops {name}", reason)
        body = _own_words(text, start, stop, None if extras else answer.get("content") or "")
        if body is None:
            raise rewritten
        trained = [Turn(last, start, stop + len(frame.closing), body)]
        # 3. Earlier responses, where their contents were located.
        located = spans if spans is not None and turns == "all" else []
        for i, (first, end) in enumerate(located[:-1]):
            if messages[i]["role"] != "assistant" or any(messages[i].get(n) for n in EXTRAS):
                continue
            start = self._response_start(i, messages, tools, text, frame, spans)
            start = first if start is None else min(start, first)
            closed = len(frame.closing) if text.startswith(frame.closing, end) else 0
            if first < end:
                trained.insert(-1, Turn(i, start, end + closed, (first, end)))
        # 4. What the text would be the same without.
        ignored = []
        if tools is not None and self._apply(messages, None) == text:
            ignored.append("tools")
        for name in EXTRAS:
            if any(m.get(name) for m in messages[:-1]):
                earlier = [_without(name, m) for m in messages[:-1]]
                if self._apply([*earlier, answer], tools) == text:
                    ignored.append(f"{name} of earlier answers")
        text = text[: stop + len(frame.closing)]
        return RenderedChat(text, tuple(trained), spans, _contents(messages), tuple(ignored))

    def _response_start(
        self,
        i: int,
        messages: Sequence[Message],
        tools: Any,
        text: str,
        frame: _Frame,
        spans: list[Span] | None,
    ) -> int | None:
        """Where the prompt of answer `i` ends in the text; None where no prompt begins it."""
        if i not in frame.leads:
            # Found once for a sequence of roles, between sentinels.
            probes = _with_sentinels(messages)
            prompt = self._prompt_length(i, probes, self._apply(probes, tools), tools)
            ahead = sum(len(piece) for piece in frame.pieces[: i + 1])
            ahead += sum(len(_sentinel(k)) for k in range(i))
            lead = None if prompt is None or prompt > ahead else ahead - prompt
            extras = any(messages[i].get(name) for name in EXTRAS)
            if lead and not extras and frame.pieces[i][-lead:].strip():
                lead = 0  # the template's own words (a header, an empty think block) are no answer
            frame.leads[i] = lead
        lead = frame.leads[i]
        if spans is not None and lead is not None:
            return spans[i][0] - lead
        prompt = self._prompt_length(i, messages, text, tools)
        return spans[i][0] if prompt is None and spans is not None else prompt

    def _prompt_length(
        self, i: int, messages: Sequence[Message], text: str, tools: Any
    ) -> int | None:
        """Length of the longest prompt of answer `i` that `text` starts with."""
        lengths = []
        for generation, thinking in ((True, False), (True, True), (False, False)):
            try:
                prompt = self._apply(messages[:i], tools, generation, thinking)
            except Unusable:  # the answer comes first: some templates want a user before it
                continue
            if text.startswith(prompt):
                lengths.append(len(prompt))
        return max(lengths, default=None)

    def _frame(self, messages: Sequence[Message], tools: Any) -> _Frame:
        """The fixed text around the contents. Kept by roles where messages are but texts."""
        roles = tuple(str(m["role"]) for m in messages)
        reusable = tools is None and all(set(m) == {"role", "content"} for m in messages)
        if reusable and roles in self._frames:
            return self._frames[roles]
        probes = _with_sentinels(messages)
        text = self._apply(probes, tools)
        pieces = _pieces(text, len(probes))
        if pieces is None:
            dropped = next((i for i in range(len(roles)) if text.count(_sentinel(i)) != 1), 0)
            raise Unusable(
                "template drops a message",
                f"the chat template of {self._name} drops message {dropped} ({roles[dropped]}), or "
                "writes it twice or elsewhere",
            )
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
        self,
        messages: Sequence[Message],
        tools: Any,
        generation: bool = False,
        thinking: bool = False,
    ) -> str:
        settings: dict[str, Any] = {} if tools is None else {"tools": tools}
        if self._date is not None:
            settings["strftime_now"] = self._date.strftime
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=thinking,
                **settings,
            )
        except Exception as error:  # Jinja raises many types; templates also raise on purpose
            roles = [m["role"] for m in messages]
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Unusable(
                "template refuses the roles",
                f"the chat template of {self._name} refused roles {roles}: {reason}",
            ) from error


def _contents(messages: Sequence[Message]) -> list[str]:
    return [str(message.get("content") or "") for message in messages]


def _sentinel(index: int) -> str:
    return f"\ue000tide-{index}\ue001"  # private-use characters: nothing else contains them


def _with_sentinels(messages: Sequence[Message]) -> list[Message]:
    return [{**m, "content": _sentinel(i)} for i, m in enumerate(messages)]


def _without(name: str, message: Message) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _pieces(text: str, count: int) -> list[str] | None:
    """`text` cut at its sentinels; None where one is missing, stands twice or out of order."""
    pieces, rest = [], text
    for i in range(count):
        piece, sentinel, rest = rest.partition(_sentinel(i))
        if not sentinel:
            return None
        pieces.append(piece)
    return None if any(_sentinel(i) in rest for i in range(count)) else [*pieces, rest]


def _locate_contents(
    pieces: Sequence[str], messages: Sequence[Message], text: str
) -> list[Span] | None:
    """The span of every content, where `text` is `pieces` joined by the contents, each changed as
    templates do; None where it is not.
    """
    contents = _contents(messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    thinks = any("</think>" in contents[i] for i in answers)
    for of_answers, of_others, of_last in _ways_to_change(thinks):
        spans: list[Span] = []
        parts = [pieces[0]]
        at = len(pieces[0])
        for i, content in enumerate(contents):
            changed = of_others(content)
            if i in answers:
                changed = (of_last if i == answers[-1] else of_answers)(content)
            spans.append((at, at + len(changed)))
            parts += [changed, pieces[i + 1]]
            at += len(changed) + len(pieces[i + 1])
        if at == len(text) and "".join(parts) == text:
            return spans
    return None


def _ways_to_change(thinks: bool) -> Iterator[tuple[Callable[[str], str], ...]]:
    """What templates do to earlier answers, to the other messages, and to the last answer."""
    for change in _CHANGES:
        yield change, change, change
    for of_answers, of_others in product(_CHANGES, _CHANGES):
        if of_answers is not of_others:
            yield of_answers, of_others, of_answers
    if thinks:
        for of_answers, of_others, of_last in product(_CHANGES, repeat=3):
            # Of an earlier answer only what stands behind its think block is kept.
            yield lambda t, f=of_answers: f(t.rpartition("</think>")[2]), of_others, of_last


def _own_words(text: str, start: int, stop: int, content: str | None) -> Span | None:
    """An answer's own words inside start … stop: `content` verbatim behind white space, or
    stripped. None where they are other words. Without `content`: all but white space in front.
    """
    region = text[start:stop]
    lead = len(region) - len(region.lstrip())
    if content is None:
        return start + lead, stop
    if region.endswith(content) and not region[: len(region) - len(content)].strip():
        return stop - len(content), stop
    inner = content.strip()
    if region.strip() != inner:
        return None
    first = start + lead if inner else start
    return first, first + len(inner)
