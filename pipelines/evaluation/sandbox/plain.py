"""Plain values as JSON, and messages on a socket. What cannot be told plainly stays where it is, under a number.

Both ends of the socket run this file. The reading end trusts nothing: whatever comes makes plain values of Python's own
types, never code.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

MOST = 64 << 20
"""Bytes of a message."""
_SMALL = 1 << 53
_KINDS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "complex": lambda v: complex(*v),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "int": lambda v: int(v, 16),
    "range": lambda v: range(*v),
    "Decimal": decimal.Decimal,
    "Fraction": lambda v: fractions.Fraction(*v),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "timedelta": lambda v: datetime.timedelta(*v),
}


def encode(value: Any, elsewhere: Callable[[Any], Any]) -> Any:
    """JSON for `value`; for what is not plain `elsewhere` gives the JSON."""

    def inner(v: Any) -> Any:
        return encode(v, elsewhere)

    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -_SMALL < number < _SMALL else {"kind": "int", "v": format(number, "x")}
    if isinstance(value, float):
        return float.__float__(value)
    if type(value) in _ENCODERS:
        name, plain = _ENCODERS[type(value)]
        return {"kind": name, "v": plain(value)}
    if isinstance(value, list):
        return [inner(v) for v in list.__iter__(value)]
    if isinstance(value, dict):
        return {"kind": "dict", "v": [[inner(k), inner(v)] for k, v in dict.items(value)]}
    kinds: tuple[Any, ...] = (tuple, set, frozenset, collections.deque)
    for kind in kinds:  # a subclass's own iteration is not asked
        if isinstance(value, kind):
            return {"kind": kind.__name__, "v": [inner(v) for v in kind.__iter__(value)]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return inner(value.item())
    if numpy is not None and type(value) is numpy.ndarray and value.dtype != object:
        return {"kind": "ndarray", "v": [str(value.dtype), inner(value.tolist())]}
    return elsewhere(value)


_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    complex: ("complex", lambda v: [v.real, v.imag]),
    bytes: ("bytes", lambda v: v.hex()),
    bytearray: ("bytearray", lambda v: v.hex()),
    range: ("range", lambda v: [v.start, v.stop, v.step]),
    decimal.Decimal: ("Decimal", str),
    fractions.Fraction: ("Fraction", lambda v: [v.numerator, v.denominator]),
    datetime.datetime: ("datetime", lambda v: v.isoformat()),
    datetime.date: ("date", lambda v: v.isoformat()),
    datetime.timedelta: ("timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
}


def decode(found: Any, elsewhere: Callable[[dict[str, Any]], Any]) -> Any:
    """The value of some JSON; `elsewhere` gives that of a number for what is not plain."""
    if isinstance(found, list):
        return [decode(v, elsewhere) for v in found]
    if not isinstance(found, dict):
        return found
    kind, value = found.get("kind"), found.get("v")
    if kind == "dict":
        return {decode(k, elsewhere): decode(v, elsewhere) for k, v in value}  # type: ignore[union-attr]
    if kind == "ndarray":
        import numpy

        return numpy.array(decode(value[1], elsewhere), dtype=value[0])  # type: ignore[index]
    if kind in _KINDS:
        return _KINDS[kind](decode(value, elsewhere))
    return elsewhere(found)


class Line:
    """A socket on which JSON messages go, each with its length before it."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Any) -> None:
        """OSError where the other end is gone, ValueError where the message is too long."""
        content = json.dumps(message).encode()
        if len(content) > MOST:
            raise ValueError("a value is too large")
        self._end.sendall(struct.pack(">I", len(content)) + content)

    def receive(self) -> Any:
        """EOFError where the other end is gone; ValueError where what came is no message."""
        (size,) = struct.unpack(">I", self._exactly(4))
        if size > MOST:
            raise ValueError("a message is too long")
        return json.loads(self._exactly(size))

    def _exactly(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = self._end.recv(min(left, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
