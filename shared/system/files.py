"""The error that reaches a user; files from elsewhere; files of ours, whole or not there at all.

What is written goes to a temporary name first, to the disk (fsync), and then to its place (rename).
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_NUMBER = itertools.count()
_HOST = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-\d+\.tide-tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write files themselves; torch names the place in its own source alone.
_FULL_IN_WORDS = ("No space left", "inline_container.cc", "quota exceeded", "File too large")


class TideError(ValueError):
    """What came, what was expected, how to mend it.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, what: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.what, self.expected, self.fix = what, expected, fix
        parts = [what]
        if expected is not None:
            parts.append(f"expected: {expected}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__("\n  ".join(parts))


class Unusable(TideError):
    """A row of data that cannot be used.

    It is left out and counted under `reason`; it never stops a run by itself.
    """

    def __init__(self, reason: str, what: str | None = None) -> None:
        self.reason = reason
        fix = "mend the data, or choose a model whose chat template takes it as it is"
        super().__init__(what or reason, fix=fix)


def refuse_odd(path: Path, within: Path | None = None) -> None:
    """TideError where `path` is a pipe, a device or a socket: reading one may never end.

    `within`, for what is passed on: also where a link leads out of that folder, or a hub's blobs.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TideError(f"{path} is a pipe, a device or a socket", expected="a file")
    if within is not None:
        real, home = Path(os.path.realpath(path)), within.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
            what, expected = f"{path} leads to {real}", f"a file that lies in {within} itself"
            raise TideError(what, expected=expected, fix="put a copy there if you trust it")


def refuse_odd_in(folder: Path) -> None:
    """`refuse_odd` for a model's folder; a link leads out to a file of the same name alone."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            renamed = Path(os.path.realpath(path)).name != path.name
            refuse_odd(path, folder if renamed else None)


def sha256_of(path: Path, within: Path | None = None) -> str:
    """Of a file's content. TideError as `refuse_odd`."""
    refuse_odd(path, within)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_bytes(path: Path, within: Path | None = None) -> bytes:
    """A file's content. TideError as `refuse_odd`."""
    refuse_odd(path, within)
    return path.read_bytes()


def read_json(path: Path, largest: int = 64 << 20) -> Any:
    """The JSON in a file of at most `largest` bytes.

    OSError where it cannot be read, ValueError where it is none.
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


def this_process() -> str:
    """A name that no other process has, of this host or another."""
    return f"{_HOST}-{os.getpid()}"


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nothing else, in this process or another, writes to."""
    return path.with_name(f".{path.name}.{this_process()}-{next(_NUMBER)}.tide-tmp")


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` only where the block ends well.

    Synced to disk first where `durable`. TideError where the disk is full or cannot be written to.
    """
    temporary = temporary_path(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                if durable:
                    os.fsync(handle.fileno())
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
    except BaseException:  # Ctrl-C too leaves nothing half written behind
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """`atomic_file` for content at hand."""
    with atomic_file(path, durable) as handle:
        handle.write(content)


def link(source: Path, target: Path, within: Path) -> None:
    """The same file, which lies `within`, elsewhere: a hard link, or a copy on another disk."""
    refuse_odd(source, within)
    temporary = temporary_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_bytes(target, source.read_bytes())
    else:
        temporary.replace(target)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end and gone where that fails.

    Where another process was first, its folder stays.
    """
    temporary = temporary_path(folder)
    with explained(folder):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        sync_folder(folder.parent)
    except OSError as error:
        if disk_is_full(error):
            with explained(folder):
                raise
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(places: Sequence[Path]) -> None:
    """Delete what killed processes left in each folder, or beside each file.

    Only names that `temporary_path` gives go, and none whose process lives on this host.
    """
    for place in places:
        inside = place.is_dir()
        pattern = ".*.tide-tmp" if inside else f".{place.name}.*.tide-tmp"
        for path in place.rglob(pattern) if inside else place.parent.glob(pattern):
            made = _TEMPORARY.fullmatch(path.name)
            if made is None:
                continue
            pid = int(made["pid"])
            if made["host"] == _HOST and pid != os.getpid() and _lives(pid):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether a process of this host has that number, of whichever user."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, also of a library that was writing, is for want of room on the disk."""
    said = any(words in str(error) for words in _FULL_IN_WORDS)
    return said or getattr(error, "errno", None) in _FULL


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """For a block that writes `path`: an OSError becomes a TideError that says how to mend it."""
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            kept = "free some space and run the same command again; all finished files are kept"
            what, fix = f"the disk is full: {path} could not be written", kept
        else:
            what = f"{path} cannot be written: {error.strerror or error}"
            fix = "choose another folder"
        raise TideError(what, fix=fix) from error


def refuse_unwritable(folder: Path) -> None:
    """TideError where nothing can be made in `folder`, or in its nearest folder that exists."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with explained(folder), tempfile.TemporaryDirectory(prefix=".tide-", dir=place):
        pass
