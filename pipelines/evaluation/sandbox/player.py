"""Runs the program, and does what the judge asks of what it defined. Nothing that it says is a verdict."""

from __future__ import annotations

import resource
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from pipelines.evaluation.sandbox import jail, plain


class _Host:
    """What is not plain stays here, under numbers; the judge's functions come as callbacks."""

    def __init__(self, line: plain.Line) -> None:
        self.line = line
        self._kept: list[Any] = []
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return {"kind": "player", "n": len(self._kept) - 1}

    def encode(self, value: Any) -> Any:
        return plain.encode(value, self._keep)

    def decode(self, found: Any) -> Any:
        return plain.decode(found, self._elsewhere)

    def _elsewhere(self, found: dict[str, Any]) -> Any:
        number = found["n"]
        if found["kind"] == "player":
            return self._kept[number]

        def callback(*args: Any) -> Any:
            self.line.send({"callback": number, "args": [self.encode(a) for a in args]})
            return self.answer()

        return callback

    def answer(self) -> Any:
        """The judge's answer to a callback; what it asks meanwhile is done."""
        while True:
            message = self.line.receive()
            if "value" in message:
                return self.decode(message["value"])
            if "raised" in message:
                raise RuntimeError(message["raised"])
            self.serve(message)

    def serve(self, message: dict[str, Any]) -> None:
        """Do one thing that the judge asks, and tell what came of it."""
        try:
            args = [self.decode(a) for a in message.get("args", [])]
            value = self.encode(getattr(self, f"_{message['do']}")(*args))
            after = [
                self.encode(a) if isinstance(a, list | dict | set | bytearray) else None
                for a in args
            ]
            self.line.send({"value": value, "after": after})
        except Exception as error:
            self.line.send({"error": _told(error)})

    def _load(self, program: str, wanted: list[str]) -> dict[str, Any]:
        exec(compile(program, "program", "exec"), self.names)
        return {name: self.names[name] for name in wanted if name in self.names}

    def _call(self, function: Any, args: list[Any], options: dict[str, Any]) -> Any:
        return function(*args, **options)

    def _get(self, value: Any, name: str) -> Any:
        return getattr(value, name)

    def _item(self, value: Any, key: Any) -> Any:
        return value[key]

    def _iter(self, value: Any) -> Iterator[Any]:
        return iter(value)

    def _next(self, value: Any) -> list[Any]:
        for item in value:
            return [item]
        return []

    def _len(self, value: Any) -> int:
        return len(value)

    def _str(self, value: Any) -> str:
        return str(value)

    def _bool(self, value: Any) -> bool:
        return bool(value)


def _told(error: Exception) -> list[Any]:
    """Names of the error's classes, its text, and its last line as in a traceback; each cut to a length."""
    last = (traceback.format_exception_only(error) or [""])[-1].strip()
    return [[kind.__name__ for kind in type(error).__mro__], str(error)[:2000], last[:2000]]


def main() -> None:
    """Arguments: the socket, and the limits in bytes of memory, seconds of CPU, bytes of a file."""
    end, memory, seconds, size = (int(text) for text in sys.argv[1:5])
    jail.die_with_parent()
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    # SIGXCPU first, which says what it is; where both limits are one, SIGKILL comes, which may be anybody's.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    sys.set_int_max_str_digits(0)
    jail.lock_in(sys.argv[6:], [sys.argv[5], "/dev/null"])
    jail.forbid_calls(signals=jail.landlock_version() < jail.SCOPES_SIGNALS)
    sys.argv[1:] = []
    host = _Host(plain.Line(socket.socket(fileno=end)))
    while True:
        try:
            message = host.line.receive()
        except EOFError:
            return
        host.serve(message)
