"""The parts of a bench that are in C, built by an installed compiler.

Must not fail: if they cannot be built, a bench runs without them, and says why.

The C parts show the attainable limit, or keep the load generator from being the limit. Nothing that serves guests is in
C.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-std=gnu11")
_PATIENCE = 60.0  # seconds for one file


@dataclass(frozen=True, slots=True)
class Native:
    """The built files; None if one was not built, and `missing` says why."""

    ring_server: Path | None = None  # a program
    loop: Path | None = None  # a shared library, for `bench/blkif_native.py`
    missing: str = ""


def build(directory: Path) -> Native:
    """Compile both parts into `directory`."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return Native(missing=f"no C compiler ({', '.join(COMPILERS)}) is installed")
    server, loop = directory / "ring_server", directory / "blkif_loop.so"
    problem = _compile(compiler, SOURCES / "ring_server.c", server) or _compile(
        compiler, SOURCES / "blkif_loop.c", loop, "-shared", "-fPIC"
    )
    return Native(missing=problem) if problem else Native(server, loop)


def _compile(compiler: str, source: Path, target: Path, *flags: str) -> str:
    """Compile one file, and return why that failed, empty if it did not."""
    command = [compiler, *FLAGS, *flags, "-o", str(target), str(source)]
    try:
        status, said = _run(command, target.parent)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} did not compile {source.name}: {error}"
    if status == 0:
        return ""
    lines = said.splitlines()
    why = next((line for line in lines if "error" in line), lines[0] if lines else f"status {status}")
    return f"{compiler} did not compile {source.name}: {why.strip()}"


def _run(command: list[str], directory: Path) -> tuple[int, str]:
    """Return exit status and messages of a compiler. If we are interrupted, it is killed with all its children.

    Its temporary files are in `directory`, which the caller removes.
    """
    environment = {**os.environ, "TMPDIR": str(directory)}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        try:
            _, said = process.communicate(timeout=_PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said
