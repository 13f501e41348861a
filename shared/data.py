"""Chat examples from JSONL, zstandard JSONL, Parquet, the hub, or the standard library of the Python at hand.

A source is a string: a path, `hf://NAME[:SPLIT]`, or `stdlib:train|heldout|all`. Rows hold `messages` (role and
content, the last one from the assistant), or two named fields (`prompt_field`, `response_field`).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shared.config import DataConfig
from shared.errors import TideError
from shared.stdlib_corpus import corpus_origin, iter_stdlib_functions

_REPORTED_BAD_ROWS = 20


@dataclass(frozen=True)
class ChatExample:
    """A conversation; its last message is the response that the student learns."""

    id: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class BadRow:
    """A row that is no chat example: where it stands and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class DataSummary:
    """What one pass over a source found: number of examples, a hash of their content, the malformed rows."""

    source: str
    examples: int
    content_hash: str
    bad_rows: tuple[BadRow, ...]


def example_id(messages: Iterable[dict[str, str]]) -> str:
    """An id from the content: the same conversation has the same id wherever it stands."""
    text = json.dumps(list(messages), ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _parse(row: Any, config: DataConfig) -> ChatExample | str:
    """The example in a row, or the reason why there is none."""
    if not isinstance(row, dict):
        return f"the row is a {type(row).__name__}, not an object"
    if config.prompt_field is not None and config.response_field is not None:
        pair = (("user", config.prompt_field), ("assistant", config.response_field))
        messages: Any = [{"role": role, "content": row.get(field)} for role, field in pair]
    else:
        messages = row.get("messages")
        if messages is None:
            return f"no `messages` (fields: {', '.join(map(str, row)) or 'none'})"
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list with at least one message"
    clean = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {i} has no `role`"
        if not isinstance(message.get("content"), str):
            return f"the content of message {i} is {type(message.get('content')).__name__}, not text"
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            return f"the content of message {i} has lone surrogates, which no tokenizer can encode"
        clean.append({"role": message["role"], "content": message["content"]})
    if clean[-1]["role"] != "assistant":
        return f"the last message is from {clean[-1]['role']!r}, not from 'assistant'"
    name = row.get("id")
    identity = str(name) if isinstance(name, str | int) and not isinstance(name, bool) else example_id(clean)
    return ChatExample(identity, tuple(clean))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        raw = path.open("rb")
        stream = zstandard.ZstdDecompressor().stream_reader(raw, closefd=True) if path.suffix == ".zst" else raw
        with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape") as text:
            for number, line in enumerate(text, 1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"{path}:{number}", BadRow(f"{path}:{number}", f"not JSON: {error}")
    except zstandard.ZstdError as error:
        raise TideError(f"{path} is no readable zstandard file: {error}", fix="write the file again") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        number = itertools.count(1)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}:{next(number)}", row
    except (pa.ArrowException, OSError) as error:
        raise TideError(f"{path} is no readable Parquet file: {error}", fix="write the file again") from error


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise TideError(
            f"hf://{name} needs the datasets library", fix='install it: pip install "tide-distill[hub]"'
        ) from error
    dataset, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"hf://{name}:{number}", row
    except Exception as error:  # the library raises many types, most of them about the network
        raise TideError(
            f"hf://{name} could not be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="the name of a data set on the hub, as hf://OWNER/NAME or hf://OWNER/NAME:SPLIT",
            fix="check name, split and network, or download the data and give its path",
        ) from error


def _rows(config: DataConfig) -> Iterator[tuple[str, Any]]:
    source = config.source
    if source.startswith("stdlib:"):
        split = source.removeprefix("stdlib:")
        if split not in ("train", "heldout", "all"):
            raise TideError(f"unknown split in {source!r}", expected="stdlib:train, stdlib:heldout or stdlib:all")
        functions = iter_stdlib_functions(split)
        return ((f"{source}:{f.name}", {"messages": f.messages()}) for f in functions)
    if source.startswith("hf://"):
        return _hub_rows(source.removeprefix("hf://"))
    path = Path(source)
    if not path.is_file():
        raise TideError(
            f"there is no data file {source}",
            expected="a .jsonl, .jsonl.zst or .parquet file, hf://NAME, or stdlib:train",
            fix="check the path given as data.source (--data)",
        )
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".json", ".zst", ".ndjson"):
        return _jsonl_rows(path)
    raise TideError(f"{source} has an unknown ending", expected=".jsonl, .jsonl.zst or .parquet")


def _read(config: DataConfig) -> Iterator[ChatExample | BadRow]:
    rows = _rows(config)
    good = 0
    for place, row in rows:
        parsed = row if isinstance(row, BadRow) else _parse(row, config)
        if isinstance(parsed, ChatExample):
            if config.limit is not None and good == config.limit:
                return
            good += 1
        yield BadRow(place, parsed) if isinstance(parsed, str) else parsed


def iter_examples(config: DataConfig) -> Iterator[ChatExample]:
    """The source's examples in order. Malformed rows are left out here; `scan` has reported them."""
    return (item for item in _read(config) if isinstance(item, ChatExample))


def scan(config: DataConfig) -> DataSummary:
    """Read the whole source once, before any other work: count, hash, and judge every row.

    Raises TideError, with file and line of each, when more than `allow_bad_rows` rows are malformed, and when
    there is no example at all.
    """
    digest = hashlib.sha256()
    count = 0
    bad: list[BadRow] = []
    most = max(_REPORTED_BAD_ROWS, config.allow_bad_rows + 1)
    for item in _read(config):
        if isinstance(item, BadRow):
            bad.append(item)
            if len(bad) >= most:
                break
            continue
        count += 1
        digest.update(json.dumps([item.id, item.messages], ensure_ascii=False).encode())
    if len(bad) > config.allow_bad_rows:
        listing = "".join(f"\n    {row.place}: {row.reason}" for row in bad[:_REPORTED_BAD_ROWS])
        more = " (there may be more)" if len(bad) >= most else ""
        raise TideError(
            f"{len(bad)} malformed rows in {config.source}{more}:{listing}",
            expected='{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
            fix="mend the rows, or allow some with data.allow_bad_rows",
        )
    if count == 0:
        raise TideError(f"{config.source} has no examples", fix="check the file, and data.limit")
    name = f"{config.source} ({corpus_origin()})" if config.source.startswith("stdlib:") else config.source
    return DataSummary(name, count, digest.hexdigest()[:32], tuple(bad))
