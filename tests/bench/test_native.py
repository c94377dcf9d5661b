"""The parts in C: how they are built, and what is reported if they cannot be."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xenbackend.bench import blkif_native, native

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C compiler is installed")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", ["ring_server.c", "blkif_loop.c"])
def test_no_compiler_has_anything_to_remark(tmp_path: Path, compiler: str, name: str) -> None:
    """Compilers give no warning for the sources."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, *native.FLAGS, "-Wall", "-Wextra", "-Wshadow", "-Werror", "-c", "-o", str(tmp_path / "object")]

    done = subprocess.run([*command, str(native.SOURCES / name)], capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)


@needs_compiler
@pytest.mark.slow
def test_both_are_built(tmp_path: Path) -> None:
    """With a compiler a program and a library are built, and nothing else is left in the directory."""
    built = native.build(tmp_path)

    assert ("", {built.ring_server, built.loop}) == (built.missing, set(tmp_path.iterdir()))
    usage = subprocess.run([str(built.ring_server)], capture_output=True, text=True, check=False)
    assert (2, True) == (usage.returncode, "is started by `xenbackend bench`" in usage.stderr)


def test_without_a_compiler_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the reason says so, which is no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    built = native.build(tmp_path)

    assert native.Native(missing="no C compiler (cc, gcc, clang) is installed") == built


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'x.c:1: note: hm' >&2; echo 'x.c:2: fatal error: stdint.h: No such file' >&2; exit 1", "fatal error"),
        ("echo 'cannot execute cc1' >&2; exit 1", "ring_server.c: cannot execute cc1"),
        ("exit 3", "ring_server.c: status 3"),
        ("kill -9 $$", "ring_server.c: status -9"),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    """If a compiler fails, its message is the reason, and there are no parts in C."""
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    built = native.build(tmp_path)

    assert (None, None) == (built.ring_server, built.loop)
    assert expected in built.missing


def test_both_sides_have_one_structure() -> None:
    """The load generator's state has the same fields, order and size in C and in Python."""
    source = (native.SOURCES / "blkif_loop.c").read_text()
    body = re.sub(r"/\*.*?\*/", "", source.partition("struct loop {")[2].partition("};")[0], flags=re.DOTALL)
    sizes = {"int64_t": 8, "uint64_t": 8, "int32_t": 4, "uint32_t": 4}
    in_c = []
    for line in filter(None, map(str.strip, body.split(";"))):
        kind, name = re.fullmatch(r"(.*?)(\*?\w+)", line, re.DOTALL).groups()
        in_c.append((name.lstrip("*"), 8 if name.startswith("*") else sizes[kind.split()[-1]]))
    state = blkif_native._State

    assert in_c == [(name, getattr(state, name).size) for name, _ in state._fields_]


def test_both_sides_have_the_same_numbers() -> None:
    """The library's return values have the same meaning in C and in Python."""
    source = (native.SOURCES / "blkif_loop.c").read_text().partition("enum status {")[2].partition("};")[0]
    in_c = dict(re.findall(r"([A-Z_]+) = (\d+),", source))

    assert in_c == {name: str(getattr(blkif_native, f"_{name}")) for name in in_c}
    assert 7 == len(in_c)
