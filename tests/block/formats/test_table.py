"""Each format is one row of the table."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest

from tests.sources import FILES, PACKAGE, in_one_process, nodes_of
from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.formats import table
from xenbackend.block.formats.blank import Blank, Wishes, blank
from xenbackend.block.formats.table import BY_DRIVER, BY_QEMU_NAME, FORMATS, WRITTEN, Format, load
from xenbackend.image.headers import Headers, read_headers
from xenbackend.image.looks import look_at, name_of, reader
from xenbackend.image.tools import Tools, tools_of

# files in which names of formats may stand together, and what they are there
ELSEWHERE = {
    "block/drivers/__init__.py": "drivers",
    "block/grammar.py": "prefixes that libxl writes",
    "image/headers.py": "what is read of those, too, that no driver serves",
}
rows = pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)


@rows
def test_a_row_has_a_driver_that_knows_what_it_passes_on(row: Format) -> None:
    """The driver of each format is built in and has the options that the row passes on to parents and children."""
    options = {each.name for each in fields(find_driver(row.driver).Options)}

    assert row.driver in BUILT_IN
    assert set(row.passes_on) <= options


@rows
def test_what_a_row_names_is_there(row: Format) -> None:
    """A format that can be written has a blank image, its own tools and a step. A read-only one has none of these."""
    if row.name not in WRITTEN:
        assert row == Format(row.name, row.driver, row.qemu_name, row.title, row.look, row.magic, row.passes_on)
        return
    made = blank(row.name, 1 << 20, Wishes(), None)

    assert isinstance(made, Blank)
    assert type(tools_of(row.name)) is not Tools
    assert row.step >= 512
    assert set(row.parents) <= WRITTEN.keys()
    assert not row.can_rebase or row.parents


@rows
def test_only_what_a_row_says_is_left_to_the_tools(row: Format) -> None:
    """A format's tools implement what its row promises: growing, parents, and checks and measures if it has tables."""
    if not row.tools:
        return
    own = vars(load(row.tools))
    tables, rebase = {"size", "facts", "check", "measure"}, {"check_parent", "name_parent"}

    assert "grow" in own
    assert (tables <= own.keys()) is bool(row.cluster_size)
    assert (rebase <= own.keys()) is row.can_rebase


@rows
def test_a_file_of_it_looks_like_it(row: Format, tmp_path: Path) -> None:
    """A file that begins with a row's magic is recognized as that format, with its driver."""
    place, magic = row.magic
    path = tmp_path / "image"
    path.write_bytes((bytes(place) + magic).ljust(4096, b"\0"))
    look = look_at(str(path))

    assert (row.name, row.look, row.driver) == (look.name, look.title, look.driver)


@rows
def test_headers_are_read_of_each(row: Format, tmp_path: Path) -> None:
    """`image info` recognizes the format of a damaged image from its magic alone."""
    path = tmp_path / "image"
    path.write_bytes(bytes(row.magic[0]) + row.magic[1])
    with path.open("rb") as file:
        read = reader(file.fileno(), path.stat().st_size)
        found: Headers = read_headers(row.name, read, path.stat().st_size)
        name = name_of(read, path.stat().st_size)

    assert row.name == name
    assert row.title == found.format.partition(",")[0]


def test_names_are_unique() -> None:
    """No two formats share a name, a driver or a QEMU name. Only raw has two drivers: `aio:` and `sync:`."""
    assert len(FORMATS) == len(BY_QEMU_NAME) == len(BY_DRIVER) - 1
    assert FORMATS["raw"] is BY_DRIVER["sync"]


def names_in(node: ast.AST) -> set[str]:
    """Return the names of formats, ours and QEMU's, in a tuple, list or set, or in the keys of a dict."""
    words: list[ast.expr | None] = []
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        words = list(node.elts)
    elif isinstance(node, ast.Dict):
        words = list(node.keys)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        words = list(node.slice.elts)
    said = {each.value for each in words if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return said & (FORMATS.keys() | BY_QEMU_NAME.keys())


def lists_formats(nodes: Iterable[ast.AST]) -> bool:
    """Return whether a file with these nodes lists formats."""
    return any(len(names_in(node)) > 1 for node in nodes)


@in_one_process
def test_there_is_one_table() -> None:
    """No other file lists formats, so none can forget a new one."""
    found = {file.relative_to(PACKAGE).as_posix() for file in FILES if lists_formats(nodes_of(file))}

    assert {Path(table.__file__).relative_to(PACKAGE).as_posix(), *ELSEWHERE} == found


@pytest.mark.parametrize("text", ['x in ("vhd", "qcow2")', 'T = {"vhd": 1, "qcow2": 2}', 'Literal["raw", "vpc"]'])
def test_a_second_table_is_seen(text: str) -> None:
    """The test above finds lists of formats: a tuple, a dict and a type."""
    assert lists_formats(ast.walk(ast.parse(text)))
