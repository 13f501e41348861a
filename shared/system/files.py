"""Files that came from elsewhere, read only where they are files of a likely size; and folders to write to."""

from __future__ import annotations

import errno
import json
import stat
import tempfile
from pathlib import Path
from typing import Any

from shared.system.errors import TideError

_LARGEST_JSON = 64 << 20  # bytes


def refuse_odd(path: Path) -> None:
    """TideError where `path`, or what it links to, is a pipe, a device or a socket: reading one may never end."""
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


def read_json(path: Path) -> Any:
    """The JSON in a file. OSError where it cannot be read, ValueError where it is no JSON or larger than 64 MiB."""
    refuse_odd(path)
    with path.open("rb") as handle:
        content = handle.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise ValueError(f"it has more than {_LARGEST_JSON:,} bytes")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_unwritable(folder: Path) -> None:
    """TideError where `folder` is a file, or nothing can be made in it or in its nearest folder that exists."""
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
