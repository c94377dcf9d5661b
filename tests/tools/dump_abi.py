"""Writes tests/data/abi.json: what a C compiler makes of Xen's headers. Run it after those headers changed.

Needs gcc that can compile for i386 (no 32-bit C library), objcopy, and Debian's libxen-dev. Must not import anything
of ours: it is the other opinion.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from struct import Struct
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
RESULT = SOURCE.parent.parent / "data" / "abi.json"
NEEDED = ("gcc", "objcopy")  # programs
HEADER = Path("/usr/include/xen/io/blkif.h")
_NUMBER = Struct("<60si")
_SAMPLE = Struct("<60sI128s")


def compile_for(machine: str) -> dict[str, Any]:
    """Return the protocol, the numbers and the sample bytes (as hex) for ``-m64`` or ``-m32``."""
    with tempfile.TemporaryDirectory() as directory:
        unit = Path(directory) / "abi.o"
        subprocess.run(["gcc", machine, "-ffreestanding", "-Wall", "-Werror", "-c", SOURCE, "-o", unit], check=True)
        protocol, numbers, samples = (_section(unit, name) for name in ("protocol", "numbers", "samples"))
    return {
        "protocol": _text(protocol),
        "numbers": {_text(name): value for name, value in _NUMBER.iter_unpack(numbers)},
        "samples": {_text(name): raw[:size].hex() for name, size, raw in _SAMPLE.iter_unpack(samples)},
    }


def dump() -> dict[str, Any]:
    """Return all layouts by the name of their protocol."""
    layouts = [compile_for(machine) for machine in ("-m64", "-m32")]
    return {layout.pop("protocol"): layout for layout in layouts}


def _section(unit: Path, name: str) -> bytes:
    raw = unit.with_name(name)
    subprocess.run(["objcopy", "-O", "binary", "--only-section", f".abi_{name}", unit, raw], check=True)
    return raw.read_bytes()


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()


def main() -> None:
    """Write the file anew."""
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}", "libxen-dev"]
    source = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    RESULT.write_text(json.dumps({"source": source, "layouts": dump()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
