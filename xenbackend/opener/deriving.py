"""Makes keys of passphrases for layers that encrypt: by PBKDF2 and Argon2, in a process that is not a worker.

Must not give a passphrase to anybody, write one down, or make a key in a way that would let a worker try out
passphrases faster than by the header that it has.

Argon2 takes as much memory as a header says, up to 4 GiB. The openers of a service take it one at a time, and none
twice while another one waits (`kernel.in_turn`); a command takes it at once. Host and control group must have as much
left. If the kernel runs out of memory all the same, it ends this process first.

Sources: RFC 8018 and 9106; systemd.exec(5) for credentials, cgroups(7) and proc(5) for memory; do_coredump() in
fs/coredump.c of Linux for the meaning of a core limit of 1.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xenbackend.block.keys import CREDENTIAL, MAX_ITERATIONS, MAX_WORK_KIB, PBKDF2, Derivation
from xenbackend.errors import DriverError, printable
from xenbackend.kernel.in_turn import in_turn

_MAX_PASSPHRASE = 8 << 20  # bytes, the same as in cryptsetup
_SPARE = 64 << 20  # bytes of memory that are left to others
_CREDENTIALS = "/run/credentials/xenbackend.service"  # for commands, to which systemd hands nothing
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 63


class Work:
    """Limits the work for one worker, which a guest may have taken over, to twice the most that one key may take."""

    def __init__(self) -> None:
        self._iterations, self._kib = 2 * MAX_ITERATIONS, 2 * MAX_WORK_KIB

    def take(self, how: Derivation) -> None:
        """Count the work of one key, and refuse what exceeds the limit. Raises: DriverError."""
        how.check()
        if how.function == PBKDF2:
            self._iterations -= how.iterations
        else:
            self._kib -= how.memory_kib * how.iterations
        if min(self._iterations, self._kib) < 0:
            problem = "trying all of its key slots takes too much work; choose one with slot="
            raise DriverError(problem, errno=errno.EDQUOT)


def derive(source: str, how: Derivation, turns: str = "", *, without_newline: bool = False) -> bytearray:
    """Return a key, the caller's to wipe, made of the passphrase that `source` names.

    Args:
        source: as `block.keys.KeySource`.
        how: is checked here.
        turns: the file by which processes take turns (`kernel.in_turn`).
        without_newline: leave out the newline at its end; ENODATA if it has none.

    Raises: DriverError, OSError.
    """
    how.check()
    _leave_no_core()
    passphrase = read_passphrase(source)
    try:
        if without_newline:
            if passphrase[-1:] != b"\n":
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            del passphrase[-1:]
        if how.function == PBKDF2:
            return bytearray(hashlib.pbkdf2_hmac(how.hash, passphrase, how.salt, how.iterations, how.length))
        with in_turn(turns):
            return _argon2(passphrase, how)
    finally:
        passphrase[:] = bytes(len(passphrase))


def read_passphrase(source: str) -> bytearray:
    """Return all bytes of a passphrase, the caller's to wipe. Raises: DriverError."""
    path, what = source, f"the key file {printable(source)}"
    if source.startswith(CREDENTIAL):
        name = source.removeprefix(CREDENTIAL)
        path = f"{os.environ.get('CREDENTIALS_DIRECTORY') or _CREDENTIALS}/{name}"
        what = f"the credential {name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        advice = "; pass it to the service's unit with LoadCredentialEncrypted=" if path != source else ""
        problem = f"{what} cannot be read: {error.strerror}{advice}"
        raise DriverError(problem, path=path, errno=error.errno or errno.EIO) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise DriverError(f"{what} is not a regular file", path=path, errno=errno.EINVAL)
        if found.st_mode & stat.S_IRWXO:
            raise DriverError(
                f"every user may access {what}; take that right away: chmod o= {path}", path=path, errno=errno.EPERM
            )
        if not 0 < found.st_size <= _MAX_PASSPHRASE:
            problem = f"{what} has {found.st_size} bytes; a passphrase has 1 to {_MAX_PASSPHRASE}"
            raise DriverError(problem, path=path, errno=errno.EINVAL)
        passphrase = bytearray(found.st_size)
        if os.readv(fd, [passphrase]) != len(passphrase):
            raise DriverError(f"{what} was changed meanwhile", path=path, errno=errno.EAGAIN)
        return passphrase
    finally:
        os.close(fd)


def _leave_no_core() -> None:
    """Forbid core dumps of this process: with a limit of 0 a program may still get one, core(5), with 1 none does."""
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (1, limit or 1))  # from 0 only root may raise it


def check_memory(wanted: int, free: int) -> None:
    """Check that there are so many bytes of memory. Raises: DriverError."""
    if wanted + _SPARE > free:
        raise DriverError(
            f"deriving the key needs {wanted >> 20} MiB of memory, and only {max(0, free) >> 20} MiB are free; give "
            "the service more, or make a key slot that takes less, by cryptsetup luksAddKey --pbkdf-memory",
            errno=errno.ENOMEM,
        )


def free_memory(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS, own: str = "") -> int:
    """Return the bytes that this process may still take: the least of host and all control groups that it is in.

    `own` is the group's path, by default this process's. Raises: OSError.
    """
    own = own or _own_group()
    return min([_UNLIMITED, *_of_host(meminfo), *_of_groups(groups, own)])


def _of_host(meminfo: Path) -> Iterator[int]:
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            yield int(value.split()[0]) << 10


def _own_group() -> str:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("0::"):
                return line[3:]
    return "/"


def _of_groups(groups: Path, own: str) -> Iterator[int]:
    """Yield the bytes that are left in each group; its page cache counts as left."""
    group = groups / own.lstrip("/")
    while groups in group.parents:
        with suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text(encoding="ascii"))
            used = int((group / "memory.current").read_text(encoding="ascii"))
            stats = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            yield limit - used + int(stats.get("file", "0"))
        group = group.parent


def _argon2(passphrase: bytearray, how: Derivation) -> bytearray:
    try:
        from argon2 import low_level
    except ImportError as error:
        problem = "its keys are derived by Argon2, for which this Python has no package"
        raise DriverError(f"{problem}; install python3-argon2, or argon2-cffi with pip", errno=errno.ENOSYS) from error
    check_memory(how.memory_kib << 10, free_memory())
    kind = low_level.Type.I if how.function == "argon2i" else low_level.Type.ID
    key, ffi = bytearray(how.length), low_level.ffi
    lib: Any = low_level.lib  # type: ignore[attr-defined]  # every version has it, and none says so
    given, salt, into = ffi.from_buffer(passphrase), ffi.from_buffer(how.salt), ffi.from_buffer(key)
    with _first_to_go():  # argon2_hash of argon2.h, in our own memory: hash_secret_raw leaves copies that nobody wipes
        status = lib.argon2_hash(
            how.iterations, how.memory_kib, how.lanes, given, len(passphrase), salt, len(how.salt), into, how.length,
            ffi.NULL, 0, kind.value, low_level.ARGON2_VERSION,
        )  # fmt: skip
    if status != lib.ARGON2_OK:
        why = low_level.error_to_str(status)
        raise DriverError(f"Argon2 over {how.memory_kib >> 10} MiB failed: {why}", errno=errno.ENOMEM)
    return key


@contextmanager
def _first_to_go() -> Iterator[None]:
    """Within this context, have the kernel end this process before any other if memory runs out."""
    score, before = Path("/proc/self/oom_score_adj"), ""
    with suppress(OSError):
        before = score.read_text(encoding="ascii")
        score.write_text("1000", encoding="ascii")
    try:
        yield
    finally:
        if before:
            with suppress(OSError):
                score.write_text(before, encoding="ascii")
