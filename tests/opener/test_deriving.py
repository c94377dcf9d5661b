"""Keys derived from passphrases."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.luks_images import key_file
from xenbackend.block.keys import MAX_ITERATIONS, Derivation
from xenbackend.errors import DriverError
from xenbackend.opener import deriving
from xenbackend.opener.deriving import Work, check_memory, derive, free_memory, read_passphrase

PBKDF2 = Derivation("pbkdf2", b"salt" * 8, 64, 1000, "sha256")
ARGON2 = Derivation("argon2id", b"somesalt", 32, 4, memory_kib=65536, lanes=1)


@pytest.fixture(autouse=True)
def _cores() -> object:
    """Restore the limit of core files, which tests of this process change."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_pbkdf2(tmp_path: Path) -> None:
    """PBKDF2 keys are derived as RFC 8018 says, from all bytes of the file, or without a newline at the end."""
    key = key_file(tmp_path / "key", b"pw\0\n")
    expected = hashlib.pbkdf2_hmac("sha256", b"pw\0\n", PBKDF2.salt, 1000, 64)

    assert expected == derive(str(key), PBKDF2)
    assert hashlib.pbkdf2_hmac("sha256", b"pw\0", PBKDF2.salt, 1000, 64) == derive(
        str(key), PBKDF2, without_newline=True
    )
    with pytest.raises(OSError, match="No data") as caught:
        derive(str(key_file(tmp_path / "other", b"pw")), PBKDF2, without_newline=True)
    assert errno.ENODATA == caught.value.errno


# test.c of the reference implementation (phc-winner-argon2), version 0x13: t=4, m=2^16, p=1, "password", "somesalt"
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("argon2i", "aaa953d58af3706ce3df1aefd4a64a84e31d7f54175231f1285259f88174ce5b"),
        ("argon2id", "9025d48e68ef7395cca9079da4c4ec3affb3c8911fe4f86d1a2520856f63172c"),
    ],
)
def test_argon2(tmp_path: Path, function: str, expected: str) -> None:
    """Argon2 keys are those of the reference implementation, which cryptsetup uses; they are derived one at a time."""
    pytest.importorskip("argon2")
    turns = tmp_path / "turns"
    how = Derivation(function, b"somesalt", 32, 4, memory_kib=65536, lanes=1)
    before = Path("/proc/self/oom_score_adj").read_text()

    assert expected == derive(str(key_file(tmp_path / "key", b"password")), how, str(turns)).hex()
    assert turns.exists()
    assert before == Path("/proc/self/oom_score_adj").read_text()


def test_without_the_package_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Python has no Argon2, the error names the package to install; PBKDF2 works without it."""
    monkeypatch.setitem(sys.modules, "argon2", None)
    key = key_file(tmp_path / "key")
    with pytest.raises(DriverError, match="install python3-argon2, or argon2-cffi with pip"):
        derive(str(key), ARGON2)

    assert 64 == len(derive(str(key), PBKDF2))


def test_what_is_beyond_all_measure_is_not_begun(tmp_path: Path) -> None:
    """Parameters are checked before the passphrase is read, since they come from a worker, which may be hostile."""
    with pytest.raises(DriverError, match="1 iterations of PBKDF2"):
        derive(str(tmp_path / "no key"), Derivation("pbkdf2", b"salt" * 8, 64, 1, "sha256"))


def test_a_worker_has_so_much_done_and_no_more() -> None:
    """The work for one worker is limited, so that a hostile one cannot block the others: 60 usual slots are allowed, a
    thousand are not.
    """
    work, usual = Work(), Derivation("argon2id", b"somesalt", 32, 4, memory_kib=1 << 20, lanes=4)
    for _ in range(60):
        work.take(usual)
        work.take(PBKDF2)
    with pytest.raises(DriverError, match="takes too much work; choose one with slot="):
        work.take(replace(usual, iterations=32))
    work, dear = Work(), replace(PBKDF2, iterations=MAX_ITERATIONS)
    work.take(dear)
    work.take(dear)
    with pytest.raises(DriverError, match="takes too much work"):
        work.take(dear)
    with pytest.raises(DriverError, match="1 iterations"):
        work.take(replace(PBKDF2, iterations=1))


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("missing", "cannot be read: No such file"),
        ("directory", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("empty", "has 0 bytes; a passphrase has 1 to"),
        ("large", "has 8388609 bytes"),
        ("open", "take that right away: chmod o= "),
    ],
)
def test_what_is_no_passphrase_is_refused(tmp_path: Path, what: str, problem: str) -> None:
    """A passphrase must be in a regular file that is not empty, not too large, and not readable by everybody; no other
    file makes us wait.
    """
    path = tmp_path / "key"
    match what:
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path, 0o600)
        case "empty":
            key_file(path, b"")
        case "large":
            key_file(path)
            os.truncate(path, (8 << 20) + 1)
        case "open":
            key_file(path).chmod(0o604)
    with pytest.raises(DriverError, match=problem):
        read_passphrase(str(path))


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential is looked for in the directory that systemd names, or, by a command, in that of the service."""
    monkeypatch.setattr(deriving, "_CREDENTIALS", str(tmp_path / "service"))
    (tmp_path / "service").mkdir()
    key_file(tmp_path / "service" / "guest", b"of the service")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert b"of the service" == read_passphrase("credential:guest")
    key_file(tmp_path / "guest", b"of mine")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert b"of mine" == read_passphrase("credential:guest")
    with pytest.raises(DriverError, match=r"the credential other cannot be read: .*LoadCredentialEncrypted="):
        read_passphrase("credential:other")


def test_memory_that_is_not_there_is_not_taken() -> None:
    """E2: the memory that a key needs is compared with what is free before it is taken; the error has both."""
    check_memory(1 << 30, (1 << 30) + (64 << 20))
    with pytest.raises(DriverError, match="needs 1024 MiB of memory, and only 512 MiB are free") as caught:
        check_memory(1 << 30, 512 << 20)

    assert errno.ENOMEM == caught.value.errno


def test_what_is_left(tmp_path: Path) -> None:
    """The free memory is the least of the host's and what each control group above this process may still take."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:   4194304 kB\n")
    groups, group = tmp_path / "cgroup", tmp_path / "cgroup" / "system.slice" / "xenbackend.service"
    group.mkdir(parents=True)
    assert 4 << 30 == free_memory(meminfo, groups, "/system.slice/xenbackend.service")
    (group / "memory.max").write_text(f"{512 << 20}\n")
    (group / "memory.current").write_text(f"{200 << 20}\n")
    (group / "memory.stat").write_text(f"anon {100 << 20}\nfile {100 << 20}\n")
    (group.parent / "memory.max").write_text("max\n")
    assert 412 << 20 == free_memory(meminfo, groups, "/system.slice/xenbackend.service")
    (group.parent / "memory.max").write_text(f"{300 << 20}\n")
    (group.parent / "memory.current").write_text(f"{250 << 20}\n")
    (group.parent / "memory.stat").write_text("anon 0\n")

    assert 50 << 20 == free_memory(meminfo, groups, "/system.slice/xenbackend.service")
    assert 0 < free_memory()


def test_a_group_with_too_little_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E2: if the unit's limit is too small, no key is derived, and no process is killed."""
    pytest.importorskip("argon2")
    monkeypatch.setattr(deriving, "free_memory", lambda: 100 << 20)
    with pytest.raises(DriverError, match="needs 64 MiB of memory, and only 100 MiB are free"):
        derive(str(key_file(tmp_path / "key")), ARGON2)


def test_no_core_file_has_a_passphrase(tmp_path: Path) -> None:
    """The process that has a passphrase leaves no core file. A limit below a page means none, and 1 is the only limit
    with which Linux does not pass a core to a program (`kernel.core_pattern` with `|`).
    """
    program = (
        "import resource, sys\nfrom xenbackend.block.keys import Derivation\n"
        "from xenbackend.opener.deriving import derive\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (4096, 4096))\n"
        "derive(sys.argv[1], Derivation('pbkdf2', b'salt' * 8, 64, 1000, 'sha256'))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    command = [sys.executable, "-c", program, str(key_file(tmp_path / "key"))]

    assert "1\n" == subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_who_makes_a_key_is_the_first_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Argon2 has its memory, the kernel would kill this process before any other; afterwards its score is as
    before. The passphrase is overwritten.
    """
    low_level = pytest.importorskip("argon2").low_level
    score, read, scores = Path("/proc/self/oom_score_adj"), list[bytearray](), []
    before = score.read_text()

    def kept(source: str) -> bytearray:
        read.append(read_passphrase(source))
        return read[-1]

    def seen(*_: object) -> int:
        scores.append(score.read_text())
        return 0

    monkeypatch.setattr(deriving, "read_passphrase", kept)
    monkeypatch.setattr(low_level, "lib", SimpleNamespace(argon2_hash=seen, ARGON2_OK=0))
    derive(str(key_file(tmp_path / "key", b"password")), ARGON2)

    assert ["1000\n"] == scores
    assert before == score.read_text()
    assert [bytearray(8)] == read
