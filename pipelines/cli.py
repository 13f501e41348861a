"""The command `tide`."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from pipelines.commands import (  # noqa: F401 - they register their commands
    caching,
    judging,
    maintenance,
    tools,
    training,
    using,
)
from pipelines.commands.app import app, arrange_help
from pipelines.terminal.text import printable
from shared.system.atomic import disk_is_full
from shared.system.errors import TideError
from shared.system.signals import end_with_parent, leave_in_order, stop_in_order

_INTERRUPTED = 130

arrange_help()


def main() -> NoReturn:
    """Entry point: errors that a user can mend end in a message and exit code 2, Ctrl-C in 130, SIGTERM in 143."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # what an encoding lacks becomes a question mark, and ends nothing
            stream.reconfigure(errors="replace")
    stop_in_order()
    warnings.formatwarning = _warning
    end_with_parent()
    try:
        _check_arguments(sys.argv[1:])
        app(standalone_mode=True)
    except TideError as error:
        print(f"tide: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (
        Exception
    ) as error:  # a disk that is full, a folder that is not to be written: the last net
        if not isinstance(error, OSError) and not disk_is_full(error):
            raise
        print(f"tide: error: {printable(_in_words(error))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print(
                "\ntide: stopped; what is finished is kept, the same command goes on from there",
                file=sys.stderr,
            )
            sys.exit(leave_in_order())
        raise
    sys.exit(0)


def _check_arguments(arguments: Sequence[str]) -> None:
    """TideError for one whose bytes are no text: no tokenizer reads it, and few libraries open such a path."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise TideError(
                f"the argument {os.fsencode(argument)!r} is not UTF-8",
                fix="write it in UTF-8, or rename what it names",
            ) from error


def _in_words(error: Exception) -> str:
    if disk_is_full(error):
        fix = "free some space and run the same command again; what is finished is kept"
        return f"the disk is full: {error}\n  fix: {fix}"
    return str(error)


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"tide: warning: {printable(str(message))}\n"


if __name__ == "__main__":
    main()
