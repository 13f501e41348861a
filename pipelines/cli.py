"""The command `tide`."""

from __future__ import annotations

import sys
from typing import NoReturn

from pipelines.commands import (  # noqa: F401 - they register their commands
    caching,
    judging,
    maintenance,
    tools,
    training,
    using,
)
from pipelines.commands.app import app, arrange_help
from shared.errors import TideError

_INTERRUPTED = 130

arrange_help()


def main() -> NoReturn:
    """Entry point: errors that a user can mend end in a message and exit code 2, Ctrl-C in 130."""
    try:
        app(standalone_mode=True)
    except TideError as error:
        print(f"tide: error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print("\ntide: stopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
