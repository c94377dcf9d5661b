"""What README.md and docs/ say that can be compared with the code: blocks, chains, sentences, tables.

tests/system/test_pages.py runs the commands.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests import pages
from tests.helpers_block import Machine, content, read, write
from tests.system.test_memory import MIB, bound
from xenbackend.block import drivers
from xenbackend.block.spec import parse_chain
from xenbackend.supervisor.service import settings
from xenbackend.supervisor.vbd.reasons import Reason
from xenbackend.worker.grants import FREE_SEGMENTS
from xenbackend.xl.config import read_disks
from xenbackend.xl.disk import rewrite
from xenbackend.xl.host import EVERY_XEN

DOCS = pages.ROOT / "docs"
ARENA = 32 * MIB  # of performance.md
_LEAST = 8  # characters that a part of a sentence must have to be compared
each_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.relative_to(pages.ROOT).as_posix())


def of_language(language: str) -> list[pages.Block]:
    """Return the blocks in a language, of all pages."""
    return [block for page in pages.PAGES for block in pages.blocks(page) if block.language == language]


@each_page
def test_every_block_names_its_language(page: Path) -> None:
    """Each block of a page names one of `LANGUAGES`, so that it is known whether it is run."""
    assert not pages.has_indented(page)
    assert {block.language for block in pages.blocks(page)} <= pages.LANGUAGES.keys()


def test_what_is_not_run_is_said() -> None:
    """Each row of `NOT_RUN` is about a command of some page, and names existing tests.

    Each command of xl is one that the simulated toolstack knows, or has a row.
    """
    every = [line for page in pages.PAGES for line in pages.commands(page)]
    assert all(any(line.startswith(begin) for line in every) for begin in pages.NOT_RUN), pages.NOT_RUN
    for reason in pages.NOT_RUN.values():
        assert all((pages.ROOT / file).exists() for file in re.findall(r"tests/\w+(?:/\w+\.py)?", reason)), reason
    for line in every:
        assert not line.startswith("xl ") or line.startswith(pages.TOOLSTACK) or pages.why_not_run(line), line


def test_disk_lines_are_disks() -> None:
    """Each disk line of a configuration is parsed as xl does, and names a valid chain, or phy:."""
    found = [disk.value for block in of_language("cfg") for disk in read_disks(block.text, "a page")]
    for line in found:
        if not line.startswith("phy:"):
            parse_chain((rewrite(line, EVERY_XEN) or line).partition("target=")[2])
    assert len(found) > 5


def test_tables_of_lines_and_chains_are_right() -> None:
    """The disk lines and chains in the tables are valid, except former lines for other backends."""
    chains = [after.partition("target=")[2].rstrip("`") for _, after in pages.rows(DOCS / "migration.md", "before")]
    for chain in [*chains, *pages.readme_chains()]:
        parse_chain(chain)
    assert len(chains) + len(pages.readme_chains()) > 12


def test_lines_of_blktap2_become_those_of_the_table() -> None:
    """`convert` makes of blktap2's line what migration.md says."""
    for before, after in pages.rows(DOCS / "migration.md", "before")[:1]:
        made = rewrite(before.strip("`"), EVERY_XEN)
        assert made is not None
        assert set(made.split(",")) == set(after.strip("`").split(","))


def test_settings_are_settings() -> None:
    """The service accepts each block of settings; a block of a package names the group of entry points."""
    for block in of_language("toml"):
        values = tomllib.loads(block.text)
        if "project" in values:
            assert [drivers.GROUP] == list(values["project"]["entry-points"])
        else:
            assert settings.make(values, "a page") != settings.Settings()


def test_the_driver_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver in writing-drivers.md returns what was written to it."""
    [block] = [each for each in pages.blocks(DOCS / "writing-drivers.md") if each.language == "python"]
    (tmp_path / "your_package.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(drivers.BUILT_IN, "scratch", "your_package:Scratch")
    machine = Machine()
    try:
        chain = machine.open("scratch:1M")
        assert [0] == machine.do(chain, write(4096, b"x" * 512, b"y" * 512))
        request = read(4096, 1536)
        assert [0] == machine.do(chain, request)
        chain.close()
    finally:
        machine.close()

    assert b"x" * 512 + b"y" * 512 + bytes(512) == content(request)


def test_the_sentences_of_the_pages_are_the_programs() -> None:
    """Sentences quoted in troubleshooting.md, monitoring.md and upgrade.md are in the code; `…` stands for any text."""
    source = "\n".join(file.read_text() for file in sorted((pages.ROOT / "xenbackend").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source).replace("\\`", "`")
    quoted = list(re.findall(r"> `(.+)`", (DOCS / "upgrade.md").read_text()))
    text = (DOCS / "troubleshooting.md").read_text()
    for table in re.findall(r"\n\| what (?:is printed|`status` says) \|.*\n\|.*\n((?:\|.*\n)+)", text):
        quoted += re.findall(r"^\| `([^`]+)`(?! \(by xl\)| says nothing)", table, re.MULTILINE)
    for cell, level, _ in pages.rows(DOCS / "monitoring.md", "line"):
        quoted += re.findall(r"`([^`]+)`", cell) if level in ("warning", "error") else []
    pieces = [piece.strip(" ;") for quote in quoted for piece in quote.replace("\\|", "|").split("…")]

    assert len(quoted) > 35
    assert [] == [piece for piece in pieces if len(piece) >= _LEAST and piece not in source]


def test_every_reason_is_explained() -> None:
    """The table in monitoring.md has the reasons of `status --json`, in their order."""
    words = [word.strip("`") for word, _ in pages.rows(DOCS / "monitoring.md", "`reason`")]

    assert [each.name.lower().replace("_", "-") for each in Reason] == words


def test_every_look_of_doctor_is_explained() -> None:
    """The table in troubleshooting.md has exactly the words by which findings name their look."""
    source = "\n".join(file.read_text() for file in (pages.ROOT / "xenbackend/doctor").glob("*.py"))
    used = set(re.findall(r'\b(?:ok|wrong|unknown|_limited|Probe)\(\s*"([a-z]+)"', source)) - {"host"}
    cells = [cell for cell, _ in pages.rows(DOCS / "troubleshooting.md", "word")]

    assert used == {word for cell in cells for word in re.findall("`([a-z]+)`", cell)}


def test_memory_for_many_disks() -> None:
    """The figures in capacity.md are those of one disk by the formula of performance.md, with the arena, multiplied."""
    ones = [bound(rings, slots, segments=FREE_SEGMENTS) + ARENA for rings, slots in ((8, 512), (2, 128))]
    table = pages.rows(DOCS / "capacity.md", "N")
    for number, *cells in table:
        assert [f"{round(int(number) * each / MIB)} MiB" for each in ones] == cells

    assert len(table) == 4
