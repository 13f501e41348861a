"""What a process gives up before foreign code runs in it: Landlock and seccomp, as far as this kernel has them.

Neither asks for privileges. Landlock: no file outside a few folders, no TCP, no signal and no ptrace to processes
outside. Seccomp: no sockets but local ones, no reading of other processes, no kernel memory that outlives the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every architecture
_NO_NEW_PRIVS, _SECCOMP, _DUMPABLE, _SUBREAPER, _DEATH_SIGNAL = 38, 22, 4, 36, 1
_EXECUTE, _WRITE, _READ, _READ_DIR = 1, 2, 4, 8
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
SCOPES_SIGNALS = 6
"""The version of Landlock from which it keeps signals inside."""
_OF_FILES = _EXECUTE | _WRITE | _READ | 1 << 14 | 1 << 15

_NUMBERS = {
    "x86_64": {
        "arch": 0xC000003E, "socket": 41, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
        "pidfd_getfd": 438, "io_uring_setup": 425, "shmget": 29, "msgget": 68, "semget": 64, "kill": 62, "tkill": 200,
        "tgkill": 234, "pidfd_send_signal": 424, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
    },
    "aarch64": {
        "arch": 0xC00000B7, "socket": 198, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
        "pidfd_getfd": 438, "io_uring_setup": 425, "shmget": 194, "msgget": 186, "semget": 190, "kill": 129,
        "tkill": 130, "tgkill": 131, "pidfd_send_signal": 424, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
    },
}  # fmt: skip
_DENIED = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "io_uring_setup", "shmget", "msgget", "semget",
)  # fmt: skip
_SIGNALS = ("tkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Of the kernel; 0 where it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _libc().syscall(_CREATE, None, 0, 1))


def guard_process() -> None:
    """Of the judge: orphans come to it, it dies with its parent, and others of this user cannot look into it."""
    if sys.platform.startswith("linux"):
        libc = _libc()
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)
        libc.prctl(_DUMPABLE, 0, 0, 0, 0)


def hide_process() -> None:
    """This process's memory and environment are no longer to be read by others of this user, where it is not root."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Of the player, until the program says otherwise."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_DEATH_SIGNAL, 9, 0, 0, 0)


def lock_in(readable: list[str], writable: list[str]) -> None:
    """Give up all files but these. OSError where the kernel has Landlock and refuses; nothing where it has none."""
    version = landlock_version()
    if version == 0:
        return
    libc = _libc()
    rights = _RIGHTS[min(version, 5)]
    content = struct.pack("<Q", rights)
    content += struct.pack("<Q", 3) if version >= 4 else b""  # TCP: neither bind nor connect
    content += (
        struct.pack("<Q", 3) if version >= SCOPES_SIGNALS else b""
    )  # abstract sockets and signals: only inside
    rules = libc.syscall(_CREATE, content, len(content), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        for paths, allowed in ((readable, _EXECUTE | _READ | _READ_DIR), (writable, rights)):
            for path in paths:
                _allow(libc, rules, path, allowed)
        libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.syscall(_RESTRICT, rules, 0) < 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    try:
        allowed = rights if os.path.isdir(path) else rights & _OF_FILES
        if libc.syscall(_ADD, rules, 1, struct.pack("<Qi", allowed, place), 0) < 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule for {path}")
    finally:
        os.close(place)


def forbid_calls(signals: bool) -> None:
    """Give up system calls that reach other processes or the network; `signals`: and signals to any but oneself.
    Nothing where the processor is not known.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None or not sys.platform.startswith("linux"):
        return
    libc = _libc()
    program = _filter(numbers, signals)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_SECCOMP, 2, header, 0, 0) < 0 and ctypes.get_errno() not in (
        errno.EINVAL,
        errno.ENOSYS,
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def _filter(numbers: dict[str, int], signals: bool) -> bytes:
    """The BPF program."""
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, numbers["arch"]), (give, 0, 0, 0x00050000 | errno.ENOSYS),
        (load, 0, 0, 0),
    ]  # fmt: skip
    if numbers["arch"] == 0xC000003E:  # the x32 calls of the same processor
        code += [(0x35, 0, 1, 0x40000000), (give, 0, 0, 0x00050000 | errno.ENOSYS)]
    for name in (*_DENIED, *(_SIGNALS if signals else ())):
        code += [(equal, 0, 1, numbers[name]), (give, 0, 0, refuse)]
    for name in ("kill", "tgkill") if signals else ():
        code += [(equal, 0, 4, numbers[name]), (load, 0, 0, 16), (equal, 1, 0, os.getpid()), (give, 0, 0, refuse),
                 (give, 0, 0, allow)]  # fmt: skip
    code += [(equal, 0, 4, numbers["socket"]), (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, refuse),
             (give, 0, 0, allow), (give, 0, 0, allow)]  # fmt: skip
    return b"".join(struct.pack("<HBBI", *line) for line in code)
