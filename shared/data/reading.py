"""From a source to conversations, before any template or tokenizer: read, filtered, selected, judged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared.data.conversation import BadRow, ChatExample, identity
from shared.data.files import Raw
from shared.data.forms import parse
from shared.data.selection import copies, in_split, passes
from shared.data.sources import describe_source, source_rows
from shared.settings.config import DataConfig
from shared.system.errors import TideError, Unusable
from shared.text.rendered import EXTRAS

_REPORTED = 20


@dataclass(frozen=True)
class DataSummary:
    """What one pass over a source found: number of conversations, a hash of their content, the rows that are none."""

    source: str
    examples: int
    content_hash: str
    bad_rows: tuple[BadRow, ...]


def decode(raw: Raw) -> Any:
    """The row in a line of JSON. Unusable where it is no JSON."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8", "surrogateescape"))
    except RecursionError as error:
        raise Unusable("not JSON", "not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:  # also integers of more digits than Python converts
        raise Unusable("not JSON", f"not JSON: {str(error)[:120]}") from error


def conversation(raw: Raw, config: DataConfig) -> tuple[ChatExample, str] | None:
    """The conversation in a row, and its form; None where a filter leaves the row out. Unusable where there is none."""
    row = decode(raw)
    if isinstance(row, dict) and not passes(row, config):
        return None
    try:
        return parse(row, config)
    except RecursionError as error:
        raise Unusable("not in its form", "it is nested too deeply") from error


def _read(config: DataConfig, extras: bool) -> Iterator[ChatExample | BadRow]:
    good = 0
    seen: Counter[str] = Counter()
    for place, raw in source_rows(config.source):
        try:
            found = conversation(raw, config)
            if found is not None and not extras:
                _refuse_extras(found[0])
        except Unusable as error:
            yield BadRow(place, error.reason, error.what)
            continue
        if found is None or not in_split(found[0].id, config):
            continue
        example, _ = found
        for _ in range(copies(example.id, config)):
            if good == config.limit:
                return
            yield ChatExample(
                identity(example.id, seen[example.id]),
                example.messages,
                example.tools,
                example.label,
            )
            seen[example.id] += 1
            good += 1


def _refuse_extras(example: ChatExample) -> None:
    """Unusable where an answer is more than a text: who reads contents alone would shorten it without a word."""
    for message in example.messages:
        for name in EXTRAS:
            if message.get(name):
                raise Unusable(
                    "needs a chat template",
                    f"an answer has {name}, which only a chat template can write",
                )


def iter_examples(config: DataConfig, extras: bool = False) -> Iterator[ChatExample]:
    """The source's conversations in order. Rows that are none are left out here; `scan` reports them.

    `extras`: answers may hold tool calls and reasoning, for those who give them to a chat template.
    """
    return (item for item in _read(config, extras) if isinstance(item, ChatExample))


def scan(config: DataConfig, extras: bool = False) -> DataSummary:
    """Read a source once: count, hash, and judge every row. `extras` as in `iter_examples`.

    Raises TideError, with the place of each, when more rows are malformed than `allow_bad_rows` allows, and when there
    is no conversation at all.
    """
    digest, count = hashlib.sha256(), 0
    bad: list[BadRow] = []
    for item in _read(config, extras):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        count += 1
        digest.update(
            json.dumps(
                [item.id, item.messages, item.tools], ensure_ascii=False, sort_keys=True
            ).encode()
        )
    refuse_bad_rows(config, len(bad), count + len(bad), bad)
    if count == 0:
        listing = "".join(f"\n    {row}" for row in bad[:_REPORTED])
        raise TideError(
            f"{config.source} has no examples{listing}",
            fix="check the file, its filters and data.limit",
        )
    return DataSummary(describe_source(config.source), count, digest.hexdigest()[:32], tuple(bad))


def refuse_bad_rows(config: DataConfig, bad: int, rows: int, first: list[BadRow]) -> None:
    """TideError where more of `rows` rows are bad than `allow_bad_rows` allows."""
    allowed = config.bad_rows_allowed(rows)
    if bad <= allowed:
        return
    listing = "".join(f"\n    {row}" for row in first[:_REPORTED])
    more = "\n    …" if bad > len(first[:_REPORTED]) else ""
    raise TideError(
        f"{bad:,} of {rows:,} rows of {config.source} cannot be used, {allowed:,} are allowed:{listing}{more}",
        expected='{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or another '
        "form of docs/data.md",
        fix="mend the rows, say which fields to read (data.form, data.prompt_field and data.response_field), or allow "
        "more with data.allow_bad_rows (a share below 1, or a number)",
    )
