"""Answers to benchmark questions as JSON lines, so that an interrupted evaluation goes on where it was.

lm-eval's own cache is a database of pickles, which run code when they are read; a run's folder may be somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shared.system.errors import TideError
from shared.system.files import refuse_odd

_LONGEST_LINE = 1 << 24


class Answers:
    """What was answered so far, in `path`; each line has a checksum, and lines that do not hold count for nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _read(path)

    def get(self, kind: str, *question: Any) -> Any:
        """The answer to a question; None where there is none yet."""
        return self._known.get(_key(kind, question))

    def add(self, kind: str, question: tuple[Any, ...], answer: Any) -> None:
        """Keep an answer, in memory and on disk. TideError where it cannot be written."""
        key = _key(kind, question)
        self._known[key] = answer
        line = json.dumps(
            {"sum": _sum(key, answer), "key": key, "answer": answer}, ensure_ascii=False
        )
        try:
            with self._path.open("a", encoding="utf-8", errors="surrogatepass") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise TideError(
                f"{self._path} cannot be written: {error.strerror}", fix="give another --output"
            ) from error

    def discard(self) -> None:
        """Delete the file: the result is written."""
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not path.exists():
        return found
    refuse_odd(path)
    with path.open("rb") as handle:
        while line := handle.readline(_LONGEST_LINE):
            try:
                row = json.loads(line)
                if row["sum"] == _sum(row["key"], row["answer"]):
                    found[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut, or changed
    if path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("ab") as handle:
            handle.write(b"\n")  # what comes next is a line of its own
    return found


def _key(kind: str, question: tuple[Any, ...]) -> str:
    return hashlib.sha256(
        json.dumps([kind, *question], sort_keys=True, default=str).encode()
    ).hexdigest()[:32]


def _sum(key: str, answer: Any) -> str:
    return hashlib.sha256(json.dumps([key, answer], sort_keys=True).encode()).hexdigest()[:16]
