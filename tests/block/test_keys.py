"""Where passphrases are kept, and how much work a header may ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xenbackend.block.keys import MAX_ITERATIONS, MAX_MEMORY_KIB, Derivation, key_files_of
from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import ConfigError, DriverError

SOUND = Derivation("pbkdf2", bytes(32), 64, 1000, "sha256")
ARGON2 = Derivation("argon2id", bytes(16), 64, 4, memory_kib=1 << 20, lanes=4)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (SOUND, ""),
        (ARGON2, ""),
        (replace(ARGON2, function="argon2i", memory_kib=32), ""),
        (replace(SOUND, iterations=999), "999 iterations of PBKDF2; 1000 to"),
        (replace(SOUND, iterations=MAX_ITERATIONS + 1), "iterations of PBKDF2"),
        (replace(SOUND, hash="md5"), "with the hash 'md5'"),
        (replace(SOUND, hash=""), "with the hash ''"),
        (replace(SOUND, hash="x" * 3000), "with the hash 'x{32}'; this driver supports"),
        (replace(SOUND, length=0), "a key of 0 bytes"),
        (replace(SOUND, length=129), "a key of 129 bytes"),
        (replace(SOUND, salt=b"x" * 7), "7 bytes of salt"),
        (replace(SOUND, salt=b"x" * 65), "65 bytes of salt"),
        (replace(SOUND, function="scrypt"), "are derived by 'scrypt'; this driver supports"),
        (replace(ARGON2, memory_kib=MAX_MEMORY_KIB + 1), "passes of Argon2 over 4096 MiB; at most 4096 MiB"),
        (replace(ARGON2, iterations=200), "200 passes of Argon2 over 1024 MiB"),
        (replace(ARGON2, iterations=0), "needs only 0 passes"),
        (replace(ARGON2, iterations=3), "needs only 3 passes of Argon2 over 1048576 KiB in 4 lanes; at least 4 passes"),
        (
            replace(ARGON2, memory_kib=31, lanes=1),
            "needs only 4 passes of Argon2 over 31 KiB in 1 lanes; at least 4 passes and 32",
        ),
        (replace(ARGON2, lanes=0), "in 0 lanes"),
        (replace(ARGON2, lanes=17), "in 17 lanes"),
        (replace(ARGON2, memory_kib=31), "damaged: 4 passes of Argon2 over 31 KiB"),
    ],
)
def test_what_is_beyond_all_measure_is_refused(how: Derivation, problem: str) -> None:
    """A header must not ask for so much work that a host stops, nor for so little that guessing is easy."""
    if not problem:
        how.check()
        return
    with pytest.raises(DriverError, match=problem):
        how.check()


def test_key_files_are_named_whole() -> None:
    """In a chain in service, key files are named by absolute paths. A credential is not a file."""
    check_whole_paths(parse_chain("luks:key=/k|aio:/img"))
    check_whole_paths(parse_chain("luks:key=credential:guest|aio:/img"))
    with pytest.raises(ConfigError, match="option key: k is relative to the service's working directory"):
        check_whole_paths(parse_chain("luks:key=k|aio:/img"))

    assert {"key": "/k"} == key_files_of(parse_chain("luks:key=/k|aio:/img").layers[0].options)
    assert {} == key_files_of(parse_chain("luks:key=credential:x|aio:/img").layers[0].options)
    assert {} == key_files_of(parse_chain("aio:/img").layers[0].options)
