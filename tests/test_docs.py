"""What the product says of itself is true: manuals and their examples."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

from tests.tools import diagrams
from xenbackend.block import drivers
from xenbackend.block.options import describe_options
from xenbackend.block.spec import parse_chain
from xenbackend.protocol import messages

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
SUPERVISOR = sorted(ROOT.glob("xenbackend/supervisor/*/__init__.py"))
HEADINGS = ["Synopsis", "Description", "Options", "Behaviour", "Example", "Limits"]
IS_THIRD_PARTY_HERE = bool(metadata.entry_points(group=drivers.GROUP, name="xor"))
NAMES = [*sorted(drivers.BUILT_IN), *(["xor"] if IS_THIRD_PARTY_HERE else [])]


def section(manual: str, heading: str) -> str:
    """Return the text under a heading of a manual."""
    match = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", manual + "\n", re.MULTILINE)
    assert match is not None, heading
    return inspect.cleandoc(match[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_manual_has_its_sections_in_order(name: str) -> None:
    """Each driver's manual begins with its name and has the six sections, none of them empty, in their order."""
    manual = drivers.manual(drivers.find_driver(name))

    assert manual.startswith(f"{name}: ")
    assert HEADINGS == re.findall(r"^(\w+):$", manual, re.MULTILINE)
    assert all(section(manual, heading) for heading in HEADINGS)


@pytest.mark.parametrize("name", NAMES)
def test_a_manuals_examples_are_chains(name: str) -> None:
    """Each line of a driver's example is a valid chain that uses the driver."""
    driver = drivers.find_driver(name)
    for line in section(drivers.manual(driver), "Example").splitlines():
        assert driver in [layer.driver for layer in parse_chain(line).layers]


@pytest.mark.parametrize("name", NAMES)
def test_a_synopsis_names_every_option(name: str) -> None:
    """The synopsis has each option but the target as key=, and the table has a line for each option."""
    driver = drivers.find_driver(name)
    manual = drivers.manual(driver)
    for each in describe_options(driver.Options):
        assert each.is_target or f"{each.name}=" in section(manual, "Synopsis")
        assert re.search(rf"^{each.name}: ", section(manual, "Options"), re.MULTILINE)


def test_the_diagrams_are_the_tables() -> None:
    """ARCHITECTURE.md shows the states and phases as the code has them; `tests.tools.diagrams` writes them."""
    page = diagrams.PAGE.read_text()

    assert diagrams.with_diagrams(page) == page
    assert all(diagram() in page for diagram in diagrams.DIAGRAMS.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Each link from one page to another leads to an existing file, and to a heading if it names one."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, part = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if part else []
        assert not part or part in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_table_is_whole(page: Path) -> None:
    """A table has a heading and a rule, and each row is one line; anything else would be shown as a paragraph."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        if any(line.startswith("|") for line in lines):
            start = next(place for place, line in enumerate(lines) if line.startswith("|"))
            broken = [line for line in lines[start:] if not (line.startswith("|") and line.endswith("|"))]
            assert not broken
            assert re.fullmatch(r"[-|: ]+", "".join(lines[start + 1 : start + 2])), lines[start]


@pytest.mark.parametrize("room", [f"supervisor/{each.parent.name}" for each in SUPERVISOR] + ["protocol", "loop"])
def test_every_file_of_the_control_plane_is_introduced(room: str) -> None:
    """In ARCHITECTURE.md each of these rooms has a table with a line for each of its files."""
    _, _, after = (ROOT / "ARCHITECTURE.md").read_text().partition(f"\n`{room}/` is ")
    _, _, table = after.partition("\n\n")
    introduced = re.findall(r"^\| `(\w+\.py)` \| .+ \|$", table.partition("\n\n")[0], re.MULTILINE)

    assert sorted(set(introduced)) == sorted(introduced)
    assert {file.name for file in (ROOT / "xenbackend" / room).glob("*.py")} - {"__init__.py"} <= set(introduced)


def test_every_message_is_introduced() -> None:
    """ARCHITECTURE.md names each message between supervisor and worker."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for message in get_args(messages.Message):
        assert re.search(rf"\b{message.__name__}\b", text), message


def test_every_note_is_introduced() -> None:
    """ARCHITECTURE.md has a row for each field of the notes, and none for another."""
    notes = pytest.importorskip("xenbackend.supervisor.vbd.notes")
    _, _, table = (ROOT / "ARCHITECTURE.md").read_text().partition("\n| field | holds |\n")
    names = re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)

    assert [each.name for each in fields(notes.Notes)] == names


def test_the_glossary_has_one_line_for_each_word() -> None:
    """No word is explained twice in the glossary."""
    _, _, glossary = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Glossary\n")
    rows = re.findall(r"^\| (.+?) \| .+? \| ?(.*?) ?\|$", glossary, re.MULTILINE)
    words = [word for heads, _ in rows if heads != "word" for word in heads.split(", ")]

    assert len(rows) > 40
    assert sorted(set(words)) == sorted(words)


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/decisions.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    """Each path that a page about the code names exists."""
    for path in set(re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.(?:py|md|toml|c|json))?)`", (ROOT / page).read_text())):
        places = (ROOT, ROOT / "xenbackend", ROOT / "xenbackend/supervisor", ROOT / "xenbackend/block")
        assert "NAME" in path or any((place / path).exists() for place in places), path


def test_the_map_of_harnesses_is_true() -> None:
    """Each class that CONTRIBUTING.md's map of harnesses names is defined in the file beside it."""
    _, _, after = (ROOT / "CONTRIBUTING.md").read_text().partition("\n| harness |")
    rows = re.findall(r"^\| (.+?) \| `(\S+\.py)` \|", after, re.MULTILINE)

    assert len(rows) > 10
    for names, file in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert f"\nclass {name}" in (ROOT / file).read_text(), name
