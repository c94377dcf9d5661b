"""Where a passphrase is, and how a key is derived from it: shared by a chain's text, a layer and the opener.

Must not read a passphrase, nor derive a key from one: the opener does (`opener.deriving`), a process of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any

from xenbackend.block.options import KEY, Kind, uses_of
from xenbackend.errors import DriverError

CREDENTIAL = "credential:"  # before the name of a credential that systemd gives to the service, systemd.exec(5)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")

HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512")
PBKDF2, ARGON2 = "pbkdf2", ("argon2i", "argon2id")

# The limits for a header's parameters. No tool writes less than the minimum, which would serve to guess passphrases.
# More than the maximum would keep the host busy for minutes; cryptsetup uses up to 4 GiB and 4 lanes.
MIN_ITERATIONS, MAX_ITERATIONS = 1000, 100_000_000  # of PBKDF2
MIN_PASSES, MIN_MEMORY_KIB = 4, 32  # of Argon2, as in lib/crypto_backend/pbkdf_check.c of cryptsetup
MAX_MEMORY_KIB = 4 << 20
MAX_WORK_KIB = 128 << 20  # memory times passes
MAX_LANES = 16
MAX_LENGTH, MAX_SALT = 128, 64  # bytes, of the key and of the salt


def parse_key(text: str) -> str:
    """Check a chain's option that says where a passphrase is. Raises: ValueError with a sentence."""
    name = text.removeprefix(CREDENTIAL)
    if not text:
        raise ValueError("it is empty; name a file with the passphrase, or credential:NAME")
    if name != text and (not _NAME.fullmatch(name) or name in (".", "..")):
        raise ValueError(f"{name!r} is not a name for a credential; use letters, digits and any of _ . -")
    return text


KeySource = Annotated[str, Kind("file or credential:NAME", parse_key, use=KEY)]


def key_files_of(options: Any) -> dict[str, str]:
    """Return the files with passphrases that parsed options name, as option to path."""
    keys = {value for value, use in uses_of(options).items() if use == KEY and not value.startswith(CREDENTIAL)}
    return {each.name: getattr(options, each.name) for each in fields(options) if getattr(options, each.name) in keys}


@dataclass(frozen=True, slots=True)
class Derivation:
    """How a key of `length` bytes is derived from a passphrase.

    function     PBKDF2 or one of ARGON2
    iterations   those of PBKDF2 (RFC 8018), or the passes of Argon2 (RFC 9106)
    hash         the hash of PBKDF2
    memory_kib, lanes   parameters of Argon2
    """

    function: str
    salt: bytes
    length: int
    iterations: int
    hash: str = ""
    memory_kib: int = 0
    lanes: int = 0

    def check(self) -> None:
        """Check that the parameters are within the limits. Raises: DriverError."""
        if not 0 < self.length <= MAX_LENGTH or not 8 <= len(self.salt) <= MAX_SALT:
            raise DriverError(
                f"its header is damaged: it says a key of {self.length} bytes and {len(self.salt)} bytes of salt"
            )
        if self.function == PBKDF2:
            if self.hash not in HASHES:
                known = ", ".join(HASHES)
                raise DriverError(
                    f"its keys are derived with the hash {self.hash[:32]!r}; this driver supports {known}"
                )
            if not MIN_ITERATIONS <= self.iterations <= MAX_ITERATIONS:
                raise DriverError(
                    f"deriving one of its keys needs {self.iterations} iterations of PBKDF2; {MIN_ITERATIONS} to "
                    f"{MAX_ITERATIONS} are allowed"
                )
        elif self.function in ARGON2:
            self._check_argon2()
        else:
            raise DriverError(
                f"its keys are derived by {self.function!r}; this driver supports pbkdf2, argon2i and argon2id"
            )

    def _check_argon2(self) -> None:
        cost = f"{self.iterations} passes of Argon2 over {self.memory_kib} KiB in {self.lanes} lanes"
        if not 1 <= self.lanes <= MAX_LANES or 8 * self.lanes > self.memory_kib:
            raise DriverError(f"its header is damaged: {cost}")
        if self.iterations < MIN_PASSES or self.memory_kib < MIN_MEMORY_KIB:
            raise DriverError(
                f"deriving one of its keys needs only {cost}; at least {MIN_PASSES} passes and {MIN_MEMORY_KIB} KiB "
                "are required"
            )
        if self.memory_kib > MAX_MEMORY_KIB or self.memory_kib * self.iterations > MAX_WORK_KIB:
            raise DriverError(
                f"deriving one of its keys needs {self.iterations} passes of Argon2 over {self.memory_kib >> 10} MiB; "
                f"at most {MAX_MEMORY_KIB >> 10} MiB, and {MAX_WORK_KIB >> 10} MiB in all passes, are allowed"
            )
