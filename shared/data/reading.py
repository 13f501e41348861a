"""From a source to conversations, before any template or tokenizer: filtered, selected, judged."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.data.conversation import UNTRAINED, ChatExample, conversation, copies, decode, identity
from shared.data.messages import Message, normal_messages
from shared.data.sources import Place, file_rows, source_rows
from shared.settings.config import DataConfig
from shared.system.files import TideError, Unusable
from shared.text.located import EXTRAS

_LISTED = 20  # bad rows in an error message
BadRow = tuple[Place, Unusable]  # where it stands, and why it cannot be used


def _read(config: DataConfig, extras: bool) -> Iterator[ChatExample | BadRow]:
    taken = 0
    seen: Counter[str] = Counter()
    for place, raw in source_rows(config.source):
        try:
            read = conversation(raw, config)
        except Unusable as error:
            if error.reason != UNTRAINED:  # no fault of the row
                yield place, Unusable(error.reason, error.what)  # without the frames of `error`
            continue
        if read is None:
            continue
        example, _ = read
        if not extras and any(m.get(name) for m in example.messages for name in EXTRAS):
            continue
        for _ in range(copies(example.id, config)):
            if taken == config.limit:
                return
            yield replace(example, id=identity(example.id, seen[example.id]))
            seen[example.id] += 1
            taken += 1


def iter_examples(config: DataConfig) -> Iterator[ChatExample]:
    """The source's conversations in order, for those who read contents alone: answers with tool
    calls or reasoning, which only a chat template can write, are left out, and so are bad rows.
    """
    return (item for item in _read(config, False) if isinstance(item, ChatExample))


def scan(config: DataConfig) -> tuple[list[ChatExample], list[BadRow]]:
    """All conversations of a source, and the rows that are none.

    TideError, with the place of each, where more rows are bad than `allow_bad_rows` allows, and
    where there is no conversation at all.
    """
    items = list(_read(config, True))
    examples = [item for item in items if isinstance(item, ChatExample)]
    bad = [item for item in items if not isinstance(item, ChatExample)]
    places = [f"{place}: {why.what}" for place, why in bad]
    refuse_bad_rows(config, len(bad), len(items), places)
    if not examples:
        listing = "".join(f"\n    {place}" for place in places[:_LISTED])
        what = f"{config.source} has no examples{listing}"
        raise TideError(what, fix="check the file, its filters and data.limit")
    return examples, bad


def refuse_bad_rows(config: DataConfig, bad: int, rows: int, places: Sequence[str]) -> None:
    """TideError where more of `rows` rows are bad than `allow_bad_rows` allows. `places` are the
    first of them, and why.
    """
    allowed = int(config.allow_bad_rows)
    if 0 < config.allow_bad_rows < 1:  # a share allows ten, however few rows there are
        allowed = max(10, int(config.allow_bad_rows * rows))
    if bad <= allowed:
        return
    listing = "".join(f"\n    {place}" for place in places[:_LISTED])
    more = "\n    …" if bad > len(places[:_LISTED]) else ""
    raise TideError(
        f"{bad:,} of {rows:,} rows of {config.source} cannot be used, {allowed:,} are allowed:"
        f"{listing}{more}",
        expected='{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": '
        '"…"}]}, or another form of docs/data.md',
        fix="mend the rows, say which fields to read (data.form, data.prompt_field and "
        "data.response_field), or allow more with data.allow_bad_rows (a share, or a number)",
    )


def read_prompts(path: Path) -> list[list[Message]]:
    """Of every row the messages that wait for an answer, out of the same kinds of files as data.

    TideError with the place of the first row that has none.
    """
    expected = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
    if not path.is_file():
        raise TideError(f"there is no file {path}", expected=f"rows such as {expected}")
    chats = []
    for place, raw in file_rows(path):
        try:
            chats.append(_prompt(decode(raw)))
        except (Unusable, RecursionError) as error:
            what = f"{place} is no prompt: {getattr(error, 'what', error)}"
            raise TideError(what, expected=expected) from error
    if not chats:
        raise TideError(f"{path} has no prompts", expected="a row for each")
    return chats


def _prompt(row: Any) -> list[Message]:
    if not isinstance(row, dict):
        raise Unusable("no known form", f"the row is a {type(row).__name__}, not an object")
    for name in ("messages", "conversations", "prompt"):
        if isinstance(row.get(name), list) and row[name]:
            messages = normal_messages(row[name])
            # A row of data ends with an answer, which is not part of the question.
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return waiting_messages(messages)
    for name in ("prompt", "question", "instruction"):
        if row.get(name) is not None:
            return normal_messages([{"role": "user", "content": row[name]}])
    raise Unusable("no known form", f"it has the fields {', '.join(map(str, row)) or '(none)'}")


def waiting_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages that wait for an answer. Unusable where there are none, or the last is an answer."""
    clean = normal_messages(messages)
    if not clean:
        raise Unusable("no messages", "there are no messages")
    if clean[-1]["role"] == "assistant":
        reason = "the last message is the assistant's; an answer to it is asked for by nobody"
        raise Unusable("answered", reason)
    return clean
