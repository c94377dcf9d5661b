"""The commands of the README that need no Xen, in their order."""

from __future__ import annotations

import shlex
from pathlib import Path
from random import Random

import pytest

from tests.qemu import qemu_img
from xenbackend.cli.main import main

README = Path(__file__).parents[2] / "README.md"


def commands(heading: str) -> list[list[str]]:
    """Return the words of each line of the first command block below a heading, without its comment."""
    _, _, rest = README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    lines = rest.partition("\n## ")[0].strip("\n").partition("\n\n")[0].splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_the_images_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command about images does what its comment says, one after the other; xl's lines are the Xen suite's."""
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "a.raw"
    raw.write_bytes(Random(1).randbytes(1 << 20).ljust(4 << 20, b"\0"))
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    done = []
    for program, *words in commands("Images"):
        if program == "xl":
            continue
        assert program == "xenbackend"
        assert 0 == main([word.replace("/img/", f"{tmp_path}/") for word in words]), (words, capsys.readouterr().err)
        done.append(words[1])

    assert {"info", "convert", "snapshot", "check", "commit", "rebase", "compare", "measure", "resize"} == set(done)
    assert 0 == main(["image", "compare", "aio:a.raw", "qcow2:b.qcow2"])
