"""Converting a chain into a new image."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import loops, qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write, ignore, leak
from xenbackend.block.formats.blank import Blank, Wishes
from xenbackend.block.formats.table import FORMATS, WRITTEN
from xenbackend.block.spec import ChainSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image import convert as module
from xenbackend.image.convert import Progress, State, convert, overwrite
from xenbackend.image.create import create
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.session import Disk, RequestFailed, Session

Make = Callable[[str], Image]
NONE = Wishes()
MIB = 1 << 20


def stop_after(steps: int) -> Progress:
    """Return a progress callback that interrupts after so many steps."""
    left = steps

    def progress(_done: int, _total: int) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1

    return progress


@pytest.fixture
def target(tmp_path: Path) -> Image:
    """Return an image that does not exist yet."""
    return find_image(f"qcow2:{tmp_path}/new")


@pytest.fixture
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each turn one request, and save the state after each of them."""
    monkeypatch.setattr("xenbackend.image.transfer.DEPTH", 1)
    monkeypatch.setattr("xenbackend.image.transfer.SYNC_EVERY", 1)


@pytest.mark.parametrize(
    ("source", "to", "wishes"),
    [
        *((source, to, NONE) for source in WRITTEN for to in WRITTEN),
        ("raw", "qcow2", Wishes(cluster_size=4096)),
        ("raw", "qcow", Wishes(cluster_size=512)),
        ("raw", "vhd", Wishes(cluster_size=4096)),
        ("raw", "vhd", Wishes(is_fixed=True)),
    ],
)
def test_every_format_becomes_every_other(
    made: Make, raw: Path, tmp_path: Path, source: str, to: str, wishes: Wishes
) -> None:
    """The new image has the old content, for QEMU too, takes no more space than the data, and is the only new file."""
    image = image_of_file("raw", str(raw)) if source == "raw" else made(source)
    new = image_of_file(to, f"{tmp_path}/new")
    done = convert(image.chain, new, wishes, ignore)

    assert_same_for_qemu(tmp_path / "new", to, raw)
    assert done.written < MIB
    assert Path(new.path).stat().st_blocks * 512 < 2 * MIB
    assert [] == list(tmp_path.glob("new.*"))
    if to == "qcow2":
        assert (0, 0) == qemu.check(tmp_path / "new")


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("vmdk", ""),
        ("vdi", ""),
        ("vdi", "static=on"),
        ("vhdx", ""),
        ("vhdx", "subformat=fixed"),
        ("qcow2", "preallocation=metadata"),
        ("qcow", ""),
        ("vhd", ""),
        ("vhd", "subformat=fixed"),
        ("raw", ""),
    ],
)
def test_what_a_format_does_not_have_is_not_read(tmp_path: Path, image_format: str, options: str) -> None:
    """Of a large disk with little data, only data are read: tables or holes show that the rest is zeros."""
    source, name = tmp_path / "source", FORMATS[image_format].qemu_name
    qemu.qemu_img("create", "-q", "-f", name, *(["-o", options] if options else []), source, "1G")
    qemu.qemu_io(source, name, "write -P 7 20M 1M")
    layer = f"{'aio' if image_format == 'raw' else image_format}:{source}"
    spared = f"fault:op=read,range=64K-19M|fault:op=read,range=23M-1023M|{layer}"
    done = convert(parse_chain(spared), find_image(f"aio:{tmp_path}/new"), NONE, ignore)

    assert MIB <= done.written <= 3 * MIB
    with (tmp_path / "new").open("rb") as file:
        file.seek(19 * MIB)
        assert (b"\7" * MIB).center(3 * MIB, b"\0") == file.read(3 * MIB)


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vhd", "qcow"])
def test_a_file_that_ends_inside_a_sector(tmp_path: Path, image_format: str) -> None:
    """If a file ends inside a sector, the rest of that sector becomes zeros in any format."""
    path = tmp_path / "odd"
    path.write_bytes(data := Random(3).randbytes((3 << 20) + 1))
    copy = image_of_file(image_format, f"{tmp_path}/copy")
    convert(parse_chain(f"aio:{path}"), copy, NONE, ignore)

    found = disk_content(copy.text)
    assert data.ljust((3 << 20) + 512, b"\0") == found[: (3 << 20) + 512]
    assert not any(found[(3 << 20) + 512 :])


def test_a_chain_with_parents_is_flattened(made: Make, raw: Path, tmp_path: Path, target: Image) -> None:
    """A conversion copies what a guest reads, including all parents, also through filters."""
    child = create("vhd", f"{tmp_path}/child", None, parent=made("vhd"))
    disk_write(child.text, {MIB: b"c" * 4096})
    convert(parse_chain(f"delay:|{child.text}"), target, NONE, ignore)

    expected = bytearray(raw.read_bytes())
    expected[MIB : MIB + 4096] = b"c" * 4096
    assert expected == disk_content(target.text)


@pytest.mark.usefixtures("small_turns")
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_what_was_stopped_can_be_gone_on_with(made: Make, raw: Path, tmp_path: Path, target: Image, steps: int) -> None:
    """If a conversion is stopped anywhere, the source is unchanged and there is no target. It can be resumed."""
    source = made("vhd")
    before = Path(source.path).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        convert(source.chain, target, NONE, stop_after(steps))
    assert not Path(target.path).exists()
    assert before == Path(source.path).read_bytes()
    state = json.loads((tmp_path / "new.partial.json").read_bytes())

    done = convert(source.chain, target, NONE, ignore, resume=True)
    assert state["done"] == done.resumed_at
    assert (steps > 0) == (done.resumed_at > 0)
    assert_same_for_qemu(tmp_path / "new", "qcow2", raw)
    assert (0, 0) == qemu.check(tmp_path / "new")
    assert [] == list(tmp_path.glob("new.*"))


@pytest.mark.usefixtures("small_turns")
def test_what_a_killed_one_leaked_is_given_back(raw: Path, tmp_path: Path, target: Image) -> None:
    """Leaks in a partial image are repaired before the conversion is resumed."""
    with pytest.raises(KeyboardInterrupt):
        convert(parse_chain(f"aio:{raw}"), target, NONE, stop_after(2))
    leak(tmp_path / "new.partial")
    convert(parse_chain(f"aio:{raw}"), target, NONE, ignore, resume=True)

    assert (0, 0) == qemu.check(tmp_path / "new")
    assert_same_for_qemu(tmp_path / "new", "qcow2", raw)


@pytest.mark.usefixtures("small_turns")
def test_a_failure_can_be_gone_on_from_too(raw: Path, target: Image, tmp_path: Path) -> None:
    """If the source fails, the conversion ends, and can be resumed from where it was."""
    broken = parse_chain(f"fault:errno=EIO,op=read,range=3M-4M|aio:{raw}")
    with pytest.raises(RequestFailed, match="Input/output error"):
        convert(broken, target, NONE, ignore)

    assert json.loads((tmp_path / "new.partial.json").read_bytes())["done"] > 0


@pytest.mark.usefixtures("small_turns")
def test_what_has_changed_is_not_gone_on_with(made: Make, raw: Path, tmp_path: Path, target: Image) -> None:
    """A conversion is not resumed if the source or options differ, the source was written, or the state is damaged."""
    source = made("vhd")
    with pytest.raises(KeyboardInterrupt):
        convert(source.chain, target, NONE, stop_after(2))
    state = tmp_path / "new.partial.json"

    with pytest.raises(ConfigError, match="continue that with --resume"):
        convert(source.chain, target, NONE, ignore)
    with pytest.raises(ConfigError, match="began with another wishes"):
        convert(source.chain, target, Wishes(4096), ignore, resume=True)
    with pytest.raises(ConfigError, match="began with another source"):
        convert(parse_chain(f"aio:{raw}"), target, NONE, ignore, resume=True)
    disk_write(source.text, {0: b"new" * 512})
    with pytest.raises(ConfigError, match="source has changed"):
        convert(source.chain, target, NONE, ignore, resume=True)
    state.write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        convert(source.chain, target, NONE, ignore, resume=True)


def test_with_nothing_to_go_on_with_it_begins(raw: Path, target: Image) -> None:
    """With nothing to resume, --resume begins a conversion, so that a script can always use it."""
    assert 0 == convert(parse_chain(f"aio:{raw}"), target, NONE, ignore, resume=True).resumed_at
    assert_same_for_qemu(Path(target.path), "qcow2", raw)


def test_nothing_is_written_over_or_left(raw: Path, tmp_path: Path) -> None:
    """If the target exists or cannot be made, or the source cannot be opened, it is refused and no file is made."""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    cases: list[tuple[str, str, Any]] = [
        (f"aio:{raw}", f"qcow2:{raw}", ConfigError),
        (f"aio:{raw}", f"qcow2:{tmp_path}/none/new", ConfigError),
        ("aio:/none", f"qcow2:{tmp_path}/new", DriverError),
    ]
    for source, to, error in cases:
        with pytest.raises(error):
            convert(parse_chain(source), find_image(to), NONE, ignore)
    with pytest.raises(ConfigError, match="power of two"):
        convert(parse_chain(f"aio:{raw}"), find_image(f"qcow2:{tmp_path}/new"), Wishes(1000), ignore)

    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_raw_disk_can_be_written_over(made: Make, raw: Path, tmp_path: Path) -> None:
    """A raw disk that is overwritten reads as the source, zeros included. What lies beyond the source's end is kept."""
    path = tmp_path / "device"
    path.write_bytes(b"old!" * (6 * MIB // 4))
    done = overwrite(made("qcow2").chain, image_of_file("raw", str(path)).chain, ignore)

    assert raw.read_bytes() + b"old!" * (MIB // 4) == path.read_bytes()
    assert 5 * MIB == done.size


def test_what_cannot_be_written_over_is_refused(made: Make, raw: Path, tmp_path: Path) -> None:
    """A disk that is too small, and an image of a format, are not overwritten."""
    source, small = made("qcow2"), tmp_path / "small"
    small.write_bytes(b"old!" * 1024)
    with pytest.raises(ConfigError, match="has 4 KiB, but the source has 5 MiB"):
        overwrite(source.chain, image_of_file("raw", str(small)).chain, ignore)
    with pytest.raises(ConfigError, match="only a raw image"):
        overwrite(source.chain, made("vhd").chain, ignore)

    assert b"old!" * 1024 == small.read_bytes()


@pytest.mark.slow
def test_a_device_in_use_is_not_written_over(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is mounted, or whose file is in use, is not overwritten, except with share=on."""
    monkeypatch.setattr("xenbackend.image.session.LOCK_TIMEOUT_S", 0)
    with loops.loop(tmp_path / "disk", 8 * MIB, sector_size=512) as (device, file):
        target = image_of_file("raw", device)
        with loops.mounted(device, tmp_path / "place"):
            with pytest.raises(DriverError, match=f"{device} is in use by a file system mounted at {tmp_path}/place"):
                overwrite(parse_chain(f"aio:{raw}"), target.chain, ignore)
            assert raw.read_bytes()[: 64 << 10] != file.read_bytes()[: 64 << 10]
        with qemu.held_open("raw", file), pytest.raises(DriverError, match=f"{device} is in use by qemu-io"):
            overwrite(parse_chain(f"aio:{raw}"), target.chain, ignore)
        with loops.mounted(device, tmp_path / "place", "-o", "ro"):
            overwrite(parse_chain(f"aio:{raw}"), find_image(f"aio:{device},share=on").chain, ignore)
        piece = slice(3 * MIB, 3 * MIB + 4096)  # the file system that was mounted does not write here
        assert raw.read_bytes()[piece] == file.read_bytes()[piece]


def test_a_state_is_forgotten_once(tmp_path: Path) -> None:
    """Removing a state that does not exist is no error."""
    state = State(f"{tmp_path}/state")
    state.save({"size": 1}, 5)

    assert 5 == state.load({"size": 1})
    state.remove()
    state.remove()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["shorter", "written"])
def test_a_source_that_changes_meanwhile_is_not_published(
    raw: Path, tmp_path: Path, target: Image, change: str
) -> None:
    """If a program without a lock changes the source during a conversion, the target is not published, and a truncated
    part is not taken for a hole.
    """

    def progress(done: int, _total: int) -> None:
        if not done:
            with raw.open("r+b") as file:
                file.truncate(1 * MIB if change == "shorter" else 6 * MIB)

    with pytest.raises((ConfigError, OSError, RequestFailed)):
        convert(parse_chain(f"aio:{raw}"), target, NONE, progress)
    assert not Path(target.path).exists()
    with pytest.raises(ConfigError, match=r"remove the \.partial file"):
        convert(parse_chain(f"aio:{raw}"), target, NONE, ignore, resume=True)


@pytest.mark.usefixtures("small_turns")
def test_of_two_that_begin_at_once_one_does(
    raw: Path, tmp_path: Path, target: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another conversion to the same target begins at the same time, one is refused, and the other is unharmed."""
    look, source = module._identity, parse_chain(f"aio:{raw}")

    def look_while_the_other_begins(*arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(module, "_identity", look)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, NONE, stop_after(2))
        return look(*arguments)

    monkeypatch.setattr(module, "_identity", look_while_the_other_begins)
    with pytest.raises(ConfigError, match="exists already"):
        convert(parse_chain(f"delay:|aio:{raw}"), target, NONE, ignore)
    assert convert(source, target, NONE, ignore, resume=True).resumed_at > 0
    assert_same_for_qemu(tmp_path / "new", "qcow2", raw)


@pytest.mark.usefixtures("no_wait_for_locks")
@pytest.mark.parametrize("to", WRITTEN)
def test_what_is_under_way_is_not_gone_on_with(
    raw: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a conversion has given its image its name, a second one is refused, and not advised to remove a file."""
    source, target = parse_chain(f"aio:{raw}"), image_of_file(to, f"{tmp_path}/new")
    refused = []

    def resume_as_well(done: int, _total: int) -> None:
        with pytest.raises(DriverError, match=r"locked by another process; one writer at a time, or readers only$"):
            convert(source, target, NONE, ignore, resume=True)
        refused.append(done)

    def publish_in_use(partial: str, path: str) -> None:
        resume_as_well(-1, 0)
        publish(partial, path)

    publish = module.publish
    monkeypatch.setattr(module, "publish", publish_in_use)
    convert(source, target, NONE, resume_as_well)
    assert [0, 5 * MIB, -1] == [refused[0], *refused[-2:]]
    assert_same_for_qemu(tmp_path / "new", to, raw)


@pytest.mark.parametrize("to", WRITTEN)
def test_what_is_completed_is_not_written_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """A process that waited for the lock while another one completed the image does not write to it."""
    source, target = parse_chain(f"aio:{raw}"), image_of_file(to, f"{tmp_path}/new")
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, NONE, stop_after(1))
    open_disk = Session.open

    def open_when_the_other_is_done(session: Session, spec: ChainSpec, **options: Any) -> Disk:
        disk = open_disk(session, spec, **options)
        if options.get("is_draft"):
            Path(f"{target.path}.partial").rename(target.path)
            Path(f"{target.path}.partial.json").unlink()
        return disk

    monkeypatch.setattr(Session, "open", open_when_the_other_is_done)
    with pytest.raises(ConfigError, match="completed meanwhile by another process"):
        convert(source, target, NONE, ignore, resume=True)
    assert ["disk.raw", "new"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_state_without_its_image_says_nothing(
    raw: Path, tmp_path: Path, target: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a completed image has been removed, but its state was left, the next conversion begins at the beginning.

    The old state is removed before the new image is made.
    """
    source, state = parse_chain(f"aio:{raw}"), tmp_path / "new.partial.json"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, NONE, stop_after(2))
    kept = state.read_bytes()
    convert(source, target, NONE, ignore, resume=True)
    Path(target.path).unlink()
    state.write_bytes(kept)
    write_new, found = module.write_new, []

    def watched(path: str, new: Blank) -> None:
        found.append(state.exists())
        write_new(path, new)

    monkeypatch.setattr(module, "write_new", watched)
    assert 0 == convert(source, target, NONE, ignore, resume=True).resumed_at
    assert_same_for_qemu(tmp_path / "new", "qcow2", raw)
    assert [False] == found


def test_without_a_state_there_is_no_partial_image(
    raw: Path, tmp_path: Path, target: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the state cannot be saved because the disk is full, no partial image is left."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(State, "save", fail)
    with pytest.raises(OSError, match="no room"):
        convert(parse_chain(f"aio:{raw}"), target, NONE, ignore)
    assert [raw] == list(tmp_path.iterdir())
