"""What a program defined, as the test sees it: plain values here, everything else under a number over there."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

from pipelines.evaluation.sandbox import plain


class Gone(BaseException):
    """The player is gone, or speaks nonsense."""


class Remote:
    """Something of the program's that is not plain. It is called and read over there; it equals nothing but itself."""

    def __init__(self, table: Table, number: int) -> None:
        self._table, self._number = table, number

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What it returns over there."""
        return self._table.call(self, list(args), options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._table.ask("get", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._table.ask("item", self, key)

    def __iter__(self) -> Iterator[Any]:
        items = self._table.ask("iter", self)
        while found := self._table.ask("next", items):
            yield found[0]

    def __len__(self) -> int:
        return int(self._table.ask("len", self))

    def __contains__(self, item: Any) -> bool:
        return item in list(self)

    def __bool__(self) -> bool:
        return bool(self._table.ask("bool", self))

    def __str__(self) -> str:
        return str(self._table.ask("str", self))

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number


class Table:
    """The judge's side of the socket."""

    def __init__(self, line: plain.Line) -> None:
        self._line = line
        self._callbacks: list[Any] = []

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return {"kind": "player", "n": value._number}
        if callable(value):
            self._callbacks.append(value)
            return {"kind": "judge", "n": len(self._callbacks) - 1}
        raise TypeError(f"a test gives the program {type(value).__name__}, which is no plain value")

    def _elsewhere(self, found: dict[str, Any]) -> Any:
        number = found.get("n")
        if found.get("kind") == "player" and isinstance(number, int):
            return Remote(self, number)
        raise Gone("nonsense")

    def _plain(self, value: Any) -> Any:
        return plain.encode(value, self._keep)

    def _value(self, found: Any) -> Any:
        return plain.decode(found, self._elsewhere)

    def ask(self, do: str, *args: Any) -> Any:
        """Have something done; its value."""
        value, _ = self._exchange(do, [self._plain(a) for a in args])
        return value

    def call(self, function: Remote, args: list[Any], options: dict[str, Any]) -> Any:
        """Have a function called; what it returned. Lists and the like that it changed are changed here, too."""
        sent = [self._plain(function), self._plain(args), self._plain(options)]
        value, after = self._exchange("call", sent)
        if (
            isinstance(after, list)
            and len(after) == 3
            and isinstance(after[1], list)
            and after[1] != sent[1]
        ):
            for ours, theirs in zip(args, self._value(after[1]), strict=False):
                _update(ours, theirs)
        return value

    def _exchange(self, do: str, args: list[Any]) -> tuple[Any, Any]:
        try:
            self._line.send({"do": do, "args": args})
            while True:
                message = self._line.receive()
                if "callback" not in message:
                    break
                self._call_back(message)
            if "error" not in message:
                return self._value(message["value"]), message.get("after")
            names, text, last = message["error"]
            error = _error(names, text)
            error.last_line = last  # type: ignore[attr-defined]
        except Exception as problem:
            raise Gone(type(problem).__name__) from problem
        raise error

    def _call_back(self, message: dict[str, Any]) -> None:
        function = self._callbacks[message["callback"]]
        try:
            value = self._plain(function(*[self._value(a) for a in message["args"]]))
        except Exception as error:
            self._line.send({"raised": str(error)[:2000]})
        else:
            self._line.send({"value": value})


def _update(ours: Any, theirs: Any) -> None:
    """The judge's list, dict, set or bytearray as the program left it."""
    if type(ours) is not type(theirs) or ours == theirs:
        return
    if isinstance(ours, list | bytearray):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


_PLAINER: dict[type[Exception], type[Exception]] = {
    UnicodeDecodeError: ValueError,  # takes more than a text
    UnicodeEncodeError: ValueError,
    UnicodeTranslateError: ValueError,
    StopIteration: RuntimeError,  # would end a loop of the test's
    StopAsyncIteration: RuntimeError,
}


def _error(names: list[str], text: str) -> Exception:
    """An error of Python's own that is nearest to the program's, under the program's name for it."""
    kinds = [getattr(builtins, str(name), None) for name in names]
    nearest = next(
        (k for k in kinds if isinstance(k, type) and issubclass(k, Exception)), Exception
    )
    nearest = _PLAINER.get(nearest, nearest)
    kind = nearest if nearest.__name__ == names[0] else type(str(names[0])[:100], (nearest,), {})
    return kind(text)
