"""Files that came from elsewhere, and folders to write to."""

import errno
import json
import stat
import tempfile
from pathlib import Path
from typing import Any

from shared.system.errors import TideError


def refuse_odd(path: Path) -> None:
    """TideError where `path` is a pipe, a device or a socket: reading one may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno != errno.ELOOP:
            return  # who opens it says that it is not there
        raise TideError(f"{path} is a link to itself", expected="a file") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TideError(f"{path} is a pipe, a device or a socket", expected="a file")


def refuse_odd_in(folder: Path) -> None:
    """`refuse_odd` for everything in a folder, where there is one."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            refuse_odd(path)


def read_json(path: Path, largest: int = 64 << 20) -> Any:
    """The JSON in a file. OSError where it cannot be read, ValueError where it is none.

    Nor may it have more than `largest` bytes.
    """
    refuse_odd(path)
    with path.open("rb") as handle:
        content = handle.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_unwritable(folder: Path) -> None:
    """TideError where nothing can be made in `folder`, or in its nearest folder that exists."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".tide-", dir=place):
            pass
    except OSError as error:
        raise TideError(
            f"{folder} cannot be written: {error.strerror}", fix="choose another folder (--out)"
        ) from error
