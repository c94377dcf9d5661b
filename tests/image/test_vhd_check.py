"""The check of VHD images, and their repair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.image_content import disk_content, disk_write
from tests.vhd_images import fixed, image
from xenbackend import settings_file
from xenbackend.block.formats import vhd
from xenbackend.block.formats.vhd import Footer, Header, Locator
from xenbackend.errors import DriverError
from xenbackend.image import vhd_check
from xenbackend.image.check import CLEAN, ERRORS, check, repair
from xenbackend.image.create import create, snapshot
from xenbackend.image.faults import Faults
from xenbackend.image.names import find_image
from xenbackend.image.session import Session
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.opening import Facts
from xenbackend.units import SECTOR

pytestmark = pytest.mark.usefixtures("parents_anywhere")

MIB = 1 << 20
BLOCKS = {0: {0: b"a" * 512}, 1: {5: b"b" * 512}}
STRIDE = 2 * MIB + 512


def look(data: bytes) -> Faults:
    """Check the bytes of an image."""
    return vhd_check.check(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.parametrize("data", [image(8 * MIB, BLOCKS), image(8 * MIB), fixed(bytes(MIB)), image(8 * MIB, full=[0])])
def test_a_sound_image_has_no_fault(data: bytes) -> None:
    """Images as blktap lays them out, with and without a map of full blocks, have no fault."""
    assert (0, 0) == (look(data).errors, look(data).leaks)


def test_room_between_blocks_is_lost(tmp_path: Path) -> None:
    """A block that no entry of the table refers to any more is a leak."""
    data = bytearray(image(8 * MIB, BLOCKS))
    data[1536:1540] = b"\xff" * 4

    assert (0, 1) == (look(bytes(data)).errors, look(bytes(data)).leaks)


def test_a_device_is_larger_than_its_image() -> None:
    """On a block device, the space behind the image belongs to future blocks and is not a leak."""
    data = image(8 * MIB, BLOCKS) + b"?" * 8 * MIB
    found = vhd_check.check(lambda offset, length: data[offset : offset + length], len(data), on_device=True)

    assert (0, 0) == (found.errors, found.leaks)


@pytest.mark.parametrize("sectors", [1, 2 * STRIDE // SECTOR + 3])
def test_blocks_that_cannot_be_are_errors(sectors: int) -> None:
    """A block that overlaps the header, or is beyond the end of the file, is an error."""
    data = bytearray(image(8 * MIB, BLOCKS))
    data[1540:1544] = (sectors * 4).to_bytes(4, "big")

    assert 1 == look(bytes(data)).errors


@pytest.mark.parametrize("where", ["end", "beginning"])
def test_a_footer_that_is_gone_is_written_again(tmp_path: Path, where: str) -> None:
    """A missing footer is made from the other one, and the disk keeps its content."""
    path = tmp_path / "img.vhd"
    data = image(8 * MIB, BLOCKS)
    path.write_bytes(data)
    text = f"vhd:{path}"
    before = disk_content(text)
    path.write_bytes(bytes(512) + data[512:] if where == "beginning" else data[:-SECTOR])

    assert ERRORS == check(find_image(text)).status
    assert CLEAN == repair(find_image(text)).status
    assert path.read_bytes()[:512] == path.read_bytes()[-512:] == data[:512]
    assert before == disk_content(text)


def test_a_file_that_was_cut_gets_the_end_of_its_block(tmp_path: Path) -> None:
    """If the file was cut inside its last block, a repair adds zeros and a footer."""
    path = tmp_path / "img.vhd"
    path.write_bytes(image(8 * MIB, BLOCKS)[: -MIB - 100])
    text = f"vhd:{path}"

    assert ERRORS == check(find_image(text)).status
    assert CLEAN == repair(find_image(text)).status
    assert b"b" * 512 == disk_content(text)[2 * MIB + 5 * 512 :][:512]


def test_a_fixed_image_that_is_too_short_is_not_repaired(tmp_path: Path) -> None:
    """A fixed image that is too short is not repaired, because its data are lost."""
    path = tmp_path / "img.vhd"
    path.write_bytes(fixed(bytes(MIB))[4096:])

    assert ERRORS == check(find_image(f"vhd:{path}")).status
    with pytest.raises(DriverError, match="too short cannot be repaired"):
        repair(find_image(f"vhd:{path}"))


# What an image says of its parent. `vhd-util check` of blktap finds each of these invalid.

PARENT = b"p" * 16
NAMES = [(b"MacX", b"file://./base.vhd"), (b"W2ru", ".\\base.vhd".encode("utf-16-le"))]
Change = Callable[[Footer, Header], tuple[Footer, Header]]


def child(directory: Path, change: Change | None = None, *, uuid: bytes = PARENT) -> str:
    """Make a parent and a child with changed headers, and return the child's layer."""
    (directory / "base.vhd").write_bytes(image(8 * MIB, BLOCKS, uuid=uuid))
    data = image(8 * MIB, {2: {0: b"c" * 512}}, parent_uuid=PARENT, names=NAMES)
    if change:
        data = changed(data, change)
    (directory / "child.vhd").write_bytes(data)
    return f"vhd:{directory}/child.vhd"


def changed(data: bytes, change: Change) -> bytes:
    """Return an image with other headers, whose checksums are correct."""
    footer, _ = vhd.read_footer(lambda offset, length: data[offset : offset + length], len(data))
    header = vhd.read_header(lambda offset, length: data[offset : offset + length], footer, len(data))
    footer, header = change(footer, header)
    front = vhd.pack_footer(footer) + vhd.pack_header(header)
    return front + data[len(front) : -SECTOR] + vhd.pack_footer(footer)


def located(**fields: object) -> Change:
    """Return a change of fields of the first locator, whose code is MacX."""

    def change(footer: Footer, header: Header) -> tuple[Footer, Header]:
        first, *others = header.locators
        return footer, replace(header, locators=(replace(first, **fields), *others))

    return change


def test_a_sound_child_has_no_fault(tmp_path: Path) -> None:
    """Children as blktap lays them out, those that we make, and those over a raw parent (UUID zero) have no fault."""
    assert CLEAN == check(find_image(child(tmp_path))).status
    assert CLEAN == check(find_image(snapshot(find_image(f"vhd:{tmp_path}/base.vhd"), f"{tmp_path}/new").text)).status
    (tmp_path / "raw").write_bytes(bytes(MIB))
    made = create("vhd", f"{tmp_path}/over_raw", None, parent=find_image(f"aio:{tmp_path}/raw"))
    assert CLEAN == check(find_image(made.text)).status


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda footer, header: (footer, replace(header, locators=())), "no locator names it"),
        (
            lambda footer, header: (footer, replace(header, locators=(), parent_name=b"", parent_uuid=bytes(16))),
            "no locator names it",
        ),
        (
            lambda footer, header: (replace(footer, type=vhd.DYNAMIC), header),
            "it is marked as having no parent, but names one",
        ),
        (
            lambda footer, header: (replace(footer, type=vhd.DYNAMIC), replace(header, locators=())),
            "it is marked as having no parent, but names one",
        ),
        (located(offset=1 << 40), "the parent's name (MacX) at 1099511627776 is not inside the file"),
        (located(offset=(1 << 64) - 1), "is not inside the file"),
        (located(offset=0), "the footer's copy at 0 and the parent's name (MacX) at 0 overlap"),
        (located(offset=1024), "the header at 512 and the parent's name (MacX) at 1024 overlap"),
        (located(offset=1536 + 511), "the table at 1536 and the parent's name (MacX) at 2047 overlap"),
        (located(offset=2 * 1536 + MIB), "a block overlaps what the image keeps at 1051648"),
        (located(offset=3072 + STRIDE - 511), "is not inside the file"),
        (located(length=600), "its parent's name (MacX) at 2048 cannot be read"),
        (located(length=0), "its parent's name (MacX) at 2048 cannot be read"),
        (located(space=0), "its parent's name (MacX) at 2048 cannot be read"),
        (located(length=6), "its parent's name (MacX) at 2048 cannot be read"),
        (located(code=b"abcd"), "a locator has the code abcd, which the format does not know"),
        (located(code=b"W2ru"), "2 locators have the code W2ru"),
    ],
)
def test_what_cannot_be_of_a_parent(tmp_path: Path, change: Change, sentence: str) -> None:
    """Missing locators, a type that contradicts them, and names that are misplaced or unreadable are errors."""
    found = check(find_image(child(tmp_path, change)))

    assert ERRORS == found.status
    assert any(sentence in each for each in found.sentences), found.sentences
    assert 0 == found.leaks


def test_names_that_are_no_text_are_errors(tmp_path: Path) -> None:
    """A name that cannot be decoded, or is not a file's, is an error."""
    for name in (b"\0\xd8", b"file://\xff", b"http://base.vhd"):
        data = image(8 * MIB, parent_uuid=PARENT, names=[(b"MacX" if b"/" in name else b"W2ru", name)])
        found = look(data)
        assert 1 == found.errors
        assert "cannot be read" in found.sentences[0]


def test_a_child_that_cannot_be_opened_is_not_sound(tmp_path: Path) -> None:
    """A child whose parent has another UUID, is missing, or is the child itself has the error that opening it gives."""
    text = child(tmp_path, uuid=b"q" * 16)
    assert ["it cannot be opened: its parent"] == [each[:31] for each in check(find_image(text)).sentences]
    assert "has another UUID" in check(find_image(text)).sentences[0]
    assert CLEAN == check(find_image(f"{text},changed=accept")).status
    (tmp_path / "base.vhd").unlink()
    assert "its parent is not there: the image names" in check(find_image(text)).sentences[0]
    (tmp_path / "base.vhd").write_bytes(image(8 * MIB, uuid=PARENT, parent_uuid=b"r" * 16, names=NAMES))
    found = check(find_image(text))

    assert ERRORS == found.status
    base = f"its parent vhd:{tmp_path}/base.vhd"
    assert (
        f"it cannot be opened: {base}: {base} is the same file as the image or one of its children"
        in found.sentences[0]
    )


def test_a_parent_that_may_not_be_looked_at_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent is opened only if that is allowed. If it is not, the check says how to allow it."""
    monkeypatch.setattr(settings_file, "PATH", tmp_path / "none")
    (tmp_path / "in").mkdir()
    child(tmp_path)
    (tmp_path / "base.vhd").rename(tmp_path / "outside.vhd")
    (tmp_path / "child.vhd").rename(tmp_path / "in" / "child.vhd")
    (tmp_path / "in" / "base.vhd").symlink_to(tmp_path / "outside.vhd")
    text = f"vhd:{tmp_path}/in/child.vhd"
    found = check(find_image(text))

    assert ERRORS == found.status
    assert f"allow it with xenbackend image trust LAYER, or with parents={tmp_path} in" in found.sentences[0]
    assert CLEAN == check(find_image(f"{text},parents={tmp_path}")).status


def test_a_check_does_not_wait_for_the_parents_readers(tmp_path: Path) -> None:
    """A check reads the parents even while others read them, and a repair of the child does too."""
    text = child(tmp_path)
    with Session() as session:
        session.open(find_image(f"vhd:{tmp_path}/base.vhd").chain, read_only=True)
        assert CLEAN == check(find_image(text)).status
        assert CLEAN == repair(find_image(text)).status


def test_names_outside_of_the_file_are_taken_out(tmp_path: Path) -> None:
    """A repair removes only names that cannot be read. The disk keeps its content, and blocks can be added again."""
    text = child(tmp_path, located(offset=1 << 40))
    before = bytearray(disk_content(text))

    assert ERRORS == check(find_image(text)).status
    mended = repair(find_image(text))
    assert (CLEAN, 2) == (mended.status, mended.repaired)
    assert before == disk_content(text)
    disk_write(text, {0: b"n" * 512})
    before[:512] = b"n" * 512
    assert before == disk_content(text)


def test_the_only_name_is_not_taken_out(tmp_path: Path) -> None:
    """If no name would be left, a repair changes nothing, and the error remains."""
    only = Locator(b"MacX", 512, 17, 1 << 40)
    text = child(tmp_path, lambda footer, header: (footer, replace(header, locators=(only,))))
    before = (tmp_path / "child.vhd").read_bytes()

    assert ERRORS == repair(find_image(text)).status
    assert before == (tmp_path / "child.vhd").read_bytes()


def test_a_killed_repair_leaves_an_image_that_opens(tmp_path: Path) -> None:
    """After any write of a repair, both footers lead to a sound header, and the next repair completes the work."""
    text = child(tmp_path, located(offset=1 << 40))
    before, path = disk_content(text), tmp_path / "child.vhd"
    start = path.read_bytes()
    with Session() as session:
        plan = vhd_check.plan_repair(session.open_file(str(path), read_only=False, step=512))
    assert 3 == len(plan)
    for count in range(4):
        data = bytearray(start)
        for offset, piece in (write for writes in plan[:count] for write in writes):
            data.extend(bytes(max(0, offset + len(piece) - len(data))))
            data[offset : offset + len(piece)] = piece
        path.write_bytes(data)
        assert before == disk_content(text), count
        assert CLEAN == repair(find_image(text)).status, count
        assert before == disk_content(text), count


def test_a_repair_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a block device the new header is put behind what the image uses, and the footer at the device's end."""
    look = LocalOpener.look

    def taken(self: LocalOpener, path: str) -> Facts:
        return replace(look(self, path), is_device=path.endswith("child.vhd"))

    monkeypatch.setattr(LocalOpener, "look", taken)
    text = child(tmp_path, located(offset=1 << 40))
    before, path = disk_content(text), tmp_path / "child.vhd"
    for end in (b"", path.read_bytes()[-SECTOR:]):
        path.write_bytes(path.read_bytes() + b"?" * MIB + end)
        size = path.stat().st_size
        assert ERRORS == check(find_image(text)).status
        assert CLEAN == repair(find_image(text)).status
        assert before == disk_content(text)
        assert size == path.stat().st_size
        assert path.read_bytes()[:SECTOR] == path.read_bytes()[-SECTOR:]
        child(tmp_path, located(offset=1 << 40))
    with pytest.raises(DriverError, match="the device has no room for the repair"):
        repair(find_image(text))
