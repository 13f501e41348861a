"""From a source to conversations, before any template or tokenizer: filtered, selected, judged."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.data.conversation import (
    ChatExample,
    Message,
    conversation,
    copies,
    decode,
    identity,
    normal_messages,
)
from shared.data.sources import describe_source, file_rows, source_rows
from shared.settings.config import DataConfig
from shared.system.errors import TideError, Unusable
from shared.text.templates import EXTRAS

_LISTED = 20  # bad rows in an error message


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, and why, in a few words and in one sentence."""

    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.detail or self.reason}"


@dataclass(frozen=True)
class DataSummary:
    """What one pass over a source gave: conversations, a hash of their content, the bad rows."""

    source: str
    examples: int
    content_hash: str
    bad_rows: tuple[BadRow, ...]


def _read(config: DataConfig, extras: bool) -> Iterator[ChatExample | BadRow]:
    taken = 0
    seen: Counter[str] = Counter()
    for place, raw in source_rows(config.source):
        try:
            read = conversation(raw, config)
            if read is None:
                continue
            example, _ = read
            if not extras:
                for name in EXTRAS:
                    if any(message.get(name) for message in example.messages):
                        reason = f"an answer has {name}, which only a chat template can write"
                        raise Unusable("needs a chat template", reason)
        except Unusable as error:
            yield BadRow(place, error.reason, error.what)
            continue
        for _ in range(copies(example.id, config)):
            if taken == config.limit:
                return
            yield replace(example, id=identity(example.id, seen[example.id]))
            seen[example.id] += 1
            taken += 1


def iter_examples(config: DataConfig, extras: bool = False) -> Iterator[ChatExample]:
    """The source's conversations in order. Bad rows are left out here; `scan` reports them.

    `extras`: answers may hold tool calls and reasoning, for those who give them to a chat
    template. Who reads contents alone would shorten such an answer without a word.
    """
    return (item for item in _read(config, extras) if isinstance(item, ChatExample))


def scan(config: DataConfig, extras: bool = False) -> DataSummary:
    """Read a source once: count, hash, and judge every row. `extras` as in `iter_examples`.

    Raises TideError, with the place of each, when more rows are bad than `allow_bad_rows` allows,
    and when there is no conversation at all.
    """
    digest = hashlib.sha256()
    count = 0
    bad: list[BadRow] = []
    for item in _read(config, extras):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        count += 1
        content = [item.id, item.messages, item.tools]
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode())
    refuse_bad_rows(config, len(bad), count + len(bad), bad)
    if count == 0:
        listing = "".join(f"\n    {row}" for row in bad[:_LISTED])
        raise TideError(
            f"{config.source} has no examples{listing}",
            fix="check the file, its filters and data.limit",
        )
    return DataSummary(describe_source(config.source), count, digest.hexdigest()[:32], tuple(bad))


def refuse_bad_rows(config: DataConfig, bad: int, rows: int, first: Sequence[BadRow]) -> None:
    """TideError where more of `rows` rows are bad than `allow_bad_rows` allows."""
    allowed = config.bad_rows_allowed(rows)
    if bad <= allowed:
        return
    listing = "".join(f"\n    {row}" for row in first[:_LISTED])
    more = "\n    …" if bad > len(first[:_LISTED]) else ""
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
    if not path.is_file():
        raise TideError(f"there is no file {path}", expected="JSONL with `prompt` or `messages`")
    chats = []
    for place, raw in file_rows(path):
        try:
            chats.append(_prompt(decode(raw)))
        except (Unusable, RecursionError) as error:
            raise TideError(
                f"{place} is no prompt: {getattr(error, 'what', error)}",
                expected='{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
            ) from error
    if not chats:
        raise TideError(f"{path} has no prompts", expected="a row for each")
    return chats


def waiting_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages that wait for an answer. Unusable where there are none, or the last is an answer."""
    clean = normal_messages(messages)
    if not clean:
        raise Unusable("no messages", "there are no messages")
    if clean[-1]["role"] == "assistant":
        reason = "the last message is the assistant's; an answer to it is asked for by nobody"
        raise Unusable("answered", reason)
    return clean


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
