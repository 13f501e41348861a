"""The command `tide`."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import NoReturn

from pipelines.commands.app import app
from pipelines.terminal import printable
from shared.system.atomic import disk_is_full
from shared.system.errors import TideError
from shared.system.signals import end_with_parent, leave_in_order, stop_in_order

# Each registers its commands; their order is that of the help.
# isort: off
from pipelines.commands import stage_one, stage_two, caches, students, installation  # noqa: F401
# isort: on

_INTERRUPTED = 130


class BesideBars(logging.Handler):
    """Log records on stderr, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(printable(self.format(record)), file=sys.stderr)


def set_up_logging() -> None:
    """Records of this project from INFO on, of libraries from WARNING on, with time and rank."""
    handler = BesideBars()
    rank = os.environ.get("RANK")
    who = "%(asctime)s" if rank is None else f"%(asctime)s rank {rank}"
    handler.setFormatter(logging.Formatter(f"{who} %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for room in ("shared", "teacher_cache", "student_train", "pipelines"):
        logging.getLogger(room).setLevel(logging.INFO)


def main() -> NoReturn:
    """Entry point. What a user can mend ends in a message and exit code 2, Ctrl-C in 130, SIGTERM
    in 143.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what an encoding lacks becomes a question mark
    stop_in_order()
    warnings.formatwarning = lambda message, *_, **__: f"tide: warning: {printable(str(message))}\n"
    set_up_logging()
    end_with_parent()
    try:
        for argument in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise TideError(
                    f"the argument {os.fsencode(argument)!r} is not UTF-8",
                    fix="write it in UTF-8, or rename what it names",
                )
        app(standalone_mode=True)
    except (TideError, OSError) as error:  # OSError: a folder that is not to be written, …
        _fail(error)
    except Exception as error:
        if not disk_is_full(error):
            raise
        _fail(error)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print(
                "\ntide: stopped; what is finished is kept, the same command goes on from there",
                file=sys.stderr,
            )
            sys.exit(leave_in_order())
        raise
    sys.exit(0)


def _fail(error: Exception) -> NoReturn:
    text = str(error)
    if disk_is_full(error):
        fix = "free some space and run the same command again; what is finished is kept"
        text = f"the disk is full: {error}\n  fix: {fix}"
    print(f"tide: error: {printable(text)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
