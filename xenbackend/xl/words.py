"""Words of a disk line that follow a chain, and which of them is wrong.

Must not parse a line: `disk` does, and asks here about words that are left over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xenbackend.disks import vdev_to_devid
from xenbackend.errors import ConfigError

ACCESS = ("r", "ro", "w", "rw")
_HEX = re.compile(r"0x[0-9a-f]{1,8}")  # strtoul accepts it, and so does xl


def trailing(chain: str) -> list[str]:
    """Return the words after a chain that are not options of its last layer, which contain a ``=``."""
    words: list[str] = []
    while True:
        chain, comma, word = chain.rpartition(",")
        is_escaped = (len(chain) - len(chain.rstrip("\\"))) % 2
        if not comma or is_escaped or "=" in word or "|" in word:
            return [each for each in reversed(words) if each]
        words.append(word.strip())


def misplaced(chain: str) -> str:
    """Return the words after a chain that belong in a guest's configuration, such as ``,xvda,w``; empty if none."""
    words = trailing(chain)
    return f",{','.join(words)}" if words and is_device(words[0]) else ""


def check(words: Sequence[str]) -> None:
    """Check that these words are a device and at most one access. Raises: ConfigError, with the first wrong word."""
    device, *others = words
    check_device(device)
    for each in others:
        if each not in ACCESS:
            raise ConfigError(f"{each!r} is not an access mode of a disk: write r or w after the device {device}")
    if others[1:]:
        raise ConfigError(f"{others[0]!r} and {others[1]!r} both say what access the guest has; remove one")


def check_device(name: str) -> None:
    """Check that this is the name of a guest's device. Raises: ConfigError."""
    if not _HEX.fullmatch(name):
        vdev_to_devid(name)


def is_device(name: str) -> bool:
    """Return whether a guest can have a device with this name."""
    try:
        check_device(name)
    except ConfigError:
        return False
    return True
