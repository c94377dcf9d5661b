"""The rule for following images: what an administrator can allow, what is never allowed, and names that change."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests import places
from tests.loops import loop
from xenbackend.block.mapped.parents import DATA_FILE, EXTENT, PARENT
from xenbackend.errors import DriverError
from xenbackend.kernel import openat
from xenbackend.opener import marks, parents
from xenbackend.opener.parents import IN_SERVICE, MARK, TRUSTED, Allowed, Named

RENAME_EXCHANGE = 2  # linux/fs.h


class Place:
    """A directory of images: `images/child` names others, as `images/base`, `elsewhere/base`, `images/deep/base`."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.images, self.elsewhere = top / "images", top / "elsewhere"
        for name in ("images/child", "images/deep/base", "images/base", "elsewhere/base"):
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(name)
        self.stack = ExitStack()

    def find(self, *names: str, what: str = PARENT, within: str = "", settings: tuple[str, ...] = (),
             is_in_service: Callable[[int], bool] | None = None, trusts: bool = False) -> Allowed:  # fmt: skip
        """Follow the child to the first allowed one of these names."""
        named = Named(what, str(self.images / "child"), names, within)
        with closing(self.held("images/child")) as child:
            found = parents.find(child.fd, named, settings, is_in_service, trusts=trusts)
        self.stack.callback(os.close, found.fd)
        return found

    def held(self, name: str) -> Held:
        """Return a file, opened with O_PATH."""
        return Held(self.top / name)

    def mark(self, name: str, what: str = PARENT) -> None:
        """Mark the child with a file."""
        with closing(self.held("images/child")) as child, closing(self.held(name)) as file:
            mark = marks.mark_parents if what == PARENT else marks.mark_files
            assert mark(child.fd, [marks.describe(file.fd, str(self.top / name))])

    def refuse(self, *names: str, match: str, **more: object) -> DriverError:
        """Check that none of these names is followed, and that nothing stays open."""
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(DriverError, match=match) as caught:
            self.find(*names, **more)
        assert before == sorted(os.listdir("/proc/self/fd"))
        return caught.value


class Held:
    """A descriptor opened with O_PATH."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_PATH)

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


def content(found: Allowed) -> str:
    """Return the content of an allowed file, opened as a worker gets it."""
    fd = openat.reopen(found.fd, os.O_RDONLY)
    try:
        return os.read(fd, 100).decode()
    finally:
        os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return a directory of images."""
    place = Place(tmp_path)
    yield place
    place.stack.close()


def test_a_name_is_not_enough(place: Place) -> None:
    """R18: a parent is not opened only because an image names it, not even from the same directory; the error says how
    to allow it.
    """
    sentence = (
        rf"its parent {place.images}/base is named only by the image; if it is the right one, "
        rf"allow it with xenbackend image trust LAYER, or with parents={place.images} in its layer"
    )
    for name in ("base", "./base", "deep/../base", str(place.images / "base"), f"//{place.images}/base"):
        assert errno.EACCES == place.refuse(name, match=sentence).errno
    place.refuse("../elsewhere/base", match="named only by the image")
    place.refuse("/etc/passwd", match="/etc/passwd is named only by the image")
    place.refuse("base", match="its data file .* or data_file=FILE", what=DATA_FILE)
    place.refuse("base", match="its extent .* is named only by the image", what=EXTENT)


def test_a_marked_parent_is_followed(place: Place) -> None:
    """A mark on the child allows the parent that it names, under any name, and no other file."""
    place.mark("elsewhere/base")
    (place.images / "link").symlink_to("../elsewhere/base")
    for name in ("../elsewhere/base", "link", str(place.elsewhere / "base")):
        found = place.find("gone", "base", name)
        assert ("elsewhere/base", MARK) == (content(found), found.by)

    place.refuse(
        "base", match="base is not the one that the image was marked for; if it is the right one, allow it with"
    )
    place.refuse("../elsewhere/base", match="its data file", what=DATA_FILE)


def test_other_files_have_a_mark_of_their_own(place: Place) -> None:
    """A mark for a parent does not allow a data file, nor the other way round."""
    place.mark("images/base", DATA_FILE)

    assert "images/base" == content(place.find("base", what=DATA_FILE))
    assert "images/base" == content(place.find("base", what=EXTENT))
    place.refuse("base", match="is named only by the image")


def test_a_mark_at_the_parent_is_none(place: Place) -> None:
    """That a file has a mark of its own, as each child has, does not allow other images to name it."""
    with closing(place.held("images/base")) as base, closing(place.held("elsewhere/base")) as other:
        marks.mark_parents(base.fd, [marks.describe(other.fd, "")])
        marks.mark_files(base.fd, [marks.describe(base.fd, "")])

    place.refuse("base", match="is named only by the image")


def test_a_neighbour_who_takes_the_parents_name(place: Place) -> None:
    """If another file takes a marked parent's name, it is refused, whoever did that, and however."""
    place.mark("images/base")
    (place.images / "base").rename(place.images / "former")
    place.refuse("base", match="its parent is not there")
    (place.images / "base").symlink_to(place.elsewhere / "base")
    place.refuse("base", match=r"base is /.*/elsewhere/base, and is not the one that the image was marked for")
    (place.images / "base").unlink()
    (place.images / "base").write_text("another")
    place.refuse("base", match="is not the one that the image was marked for")
    (place.images / "base").unlink()
    (place.images / "base").hardlink_to(place.images / "former")

    assert "images/base" == content(place.find("base"))


def test_a_copied_child_is_marked_anew(place: Place) -> None:
    """A copy of a marked child has no mark, and the error says how to make one."""
    place.mark("images/base")
    subprocess.run(["cp", place.images / "child", place.images / "copy"], check=True)
    (place.images / "copy").rename(place.images / "child")

    place.refuse("base", match="is named only by the image; .* xenbackend image trust LAYER")


@pytest.mark.parametrize("by", ["the layer", "the settings"])
def test_an_administrator_may_name_a_directory(place: Place, by: str) -> None:
    """If a directory is allowed, names and links may lead to any file below it, and nowhere else."""
    (place.images / "link").symlink_to("../elsewhere/base")
    (place.elsewhere / "out").symlink_to(place.images / "base")
    (place.top / "named").symlink_to("elsewhere")

    def find(*names: str, where: Path = place.elsewhere) -> Allowed:
        more = {"within": str(where)} if by == "the layer" else {"settings": (f"{place.top}/none", str(where))}
        return place.find(*names, **more)

    act = f"parents={place.elsewhere}" if by == "the layer" else f"the settings' parents, {place.elsewhere}"
    for name in ("link", "../elsewhere/base", str(place.elsewhere / "base"), str(place.top / "named" / "base")):
        assert ("elsewhere/base", act) == (content(found := find(name)), found.by)
    assert "elsewhere/base" == content(find("link", where=place.top / "named"))
    assert "images/deep/base" == content(find("deep/base", where=place.images))
    assert "images/base" == content(find("base", where=Path("/")))
    for name in ("base", "../elsewhere/out", str(place.images / "base"), "../elsewhere/../images/base"):
        with pytest.raises(DriverError, match="is named only by the image"):
            find(name)
    (place.top / "elsewhere2").mkdir()
    (place.top / "elsewhere2" / "base").write_text("a name that begins alike")
    with pytest.raises(DriverError, match="named only by the image"):
        find("../elsewhere2/base")


def test_an_administrator_may_name_several_places(place: Place) -> None:
    """`parents=` accepts several directories and files; a file allows only itself."""
    within = f"{place.images}/deep:{place.elsewhere}/base"

    assert "images/deep/base" == content(place.find("deep/base", within=within))
    assert f"parents={place.elsewhere}/base" == place.find("../elsewhere/base", within=within).by
    place.refuse("base", match="named only by the image", within=within)


def test_the_first_that_may_be_had(place: Place) -> None:
    """Of several names the first that is allowed is taken; if none is, the error has the first that exists."""
    deep, outside = str(place.images / "deep/base"), str(place.elsewhere / "base")

    assert "images/deep/base" == content(place.find("gone", outside, deep, "base", within=str(place.images)))
    place.refuse("gone", outside, deep, match=f"its parent {outside} is named")


def test_links_on_the_way_to_the_image(place: Place) -> None:
    """`..` is followed as the kernel does, or else as the path reads; the path shown is the one that a person wrote."""
    (place.top / "short").symlink_to("images/deep")
    child = Named(PARENT, f"{place.top}/short/x", ["../base"], str(place.images))
    (place.images / "deep" / "x").touch()
    with closing(place.held("images/deep/x")) as fd:
        found = parents.find(fd.fd, child)
    place.stack.callback(os.close, found.fd)
    assert ("images/base", f"{place.images}/base") == (content(found), found.path)

    (place.top / "base").write_text("above the link")
    (place.images / "base").unlink()
    with closing(place.held("images/deep/x")) as fd:
        found = parents.find(fd.fd, Named(PARENT, child.image, ["../base"], str(place.top)))
    place.stack.callback(os.close, found.fd)
    assert ("above the link", f"{place.top}/base") == (content(found), found.path)


def test_a_relative_image(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of an image that is named relative to the working directory is found too."""
    monkeypatch.chdir(place.images)
    with closing(place.held("images/child")) as child:
        found = parents.find(child.fd, Named(PARENT, "child", ["base"], "."))
    place.stack.callback(os.close, found.fd)

    assert (str(place.images / "base"), "images/base") == (found.path, content(found))


def test_what_is_in_service_stays_allowed(place: Place) -> None:
    """What a disk of the last release has open is allowed, and nothing else."""
    with closing(place.held("images/base")) as base:
        known = os.fstat(base.fd)

        def is_in_service(fd: int) -> bool:
            return os.path.samestat(known, os.fstat(fd))

        assert IN_SERVICE == place.find("base", is_in_service=is_in_service).by
        place.refuse("deep/base", match="named only by the image", is_in_service=is_in_service)


def test_an_administrator_may_trust_an_image(place: Place) -> None:
    """If an administrator trusts an image, it is followed anywhere, but to no device."""
    found = place.find("../elsewhere/base", trusts=True)
    assert ("elsewhere/base", TRUSTED) == (content(found), found.by)

    place.refuse("/dev/null", match="is not a file or block device", trusts=True)
    assert "parents=x" == place.find("base", trusts=True, within="x:/").by.replace("/", "x")


def test_a_parent_that_is_gone(place: Place) -> None:
    """If none of the names exists, the error lists them all, with control characters escaped."""
    sentence = r"the image names 'gone', '\\x1b\[2Jx'; put the parent there, or record its new name"
    assert errno.ENOENT == place.refuse("gone", "\x1b[2Jx", match=sentence).errno
    place.refuse(match="nothing that can be a name")
    place.refuse("", "\0", "a" * 5000, "base/x", match="its parent is not there")
    place.refuse("gone", match="put the extent there$", what=EXTENT)


def test_only_files_are_followed(place: Place) -> None:
    """Directories, pipes, sockets and character devices are never followed, whatever is allowed."""
    os.mkfifo(place.images / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(place.images / "socket"))
        for name, sentence in (
            ("pipe", "is not a file or block device"),
            ("socket", "is not a file or block device"),
            (".", "is a directory"),
            ("/", "is a directory"),
            ("/dev/null", "is not a file or block device"),
        ):
            place.refuse(name, match=sentence, within="/", trusts=True)
    place.refuse("/dev/null", match="is not a file$", within="/dev/null", what=EXTENT)


def test_nothing_in_dev_but_what_is_named(place: Place) -> None:
    """A device is opened only if the administrator's own text names it; allowing its directory is not enough."""
    with loop(place.top / "disk", 1 << 20, sector_size=512) as (device, _):
        (place.images / "device").symlink_to(device)
        for name in (device, "device", f"/dev/../dev/{Path(device).name}"):
            for within in ("", "/", "/dev", "/dev/", str(place.images)):
                sentence = (
                    f"is a device, and is not opened just because an image names it; .* must say parents={device}"
                )
                place.refuse(name, match=sentence, within=within, settings=("/dev", "/"), trusts=True)
            found = place.find(name, within=f"/img:{device}")
            assert (device, f"parents={device}") == (found.path, found.by)
        place.refuse(device, match="is not a file; .* add data_file=FILE", what=DATA_FILE, within=device)
        (place.top / "name").symlink_to(device)
        place.mark("name")
        assert MARK == place.find(device).by


def test_a_place_for_files_below_dev(place: Place) -> None:
    """/dev/shm is treated like any directory; no file elsewhere in /dev is followed."""
    with places.directory(places.MEMORY) as memory:
        (memory / "base").write_text("in memory")
        assert "in memory" == content(place.find(f"{memory}/base", within=str(memory)))
        assert "in memory" == content(place.find(f"{memory}/base", within="/"))
    file = Path("/dev/xenbackend-test-file")
    try:
        file.touch()
    except OSError:
        pytest.skip("no file can be made in /dev")
    try:
        place.refuse(
            str(file),
            match="is in /dev, and is not opened just because",
            within="/:/dev",
            settings=("/dev",),
            trusts=True,
        )
    finally:
        file.unlink()


def test_nothing_in_proc_is_looked_at(place: Place) -> None:
    """What a process has open cannot be reached through names in /proc, whatever is allowed. The refusal is the same
    for whatever is there or is not there, and does not say where it leads to.
    """
    (place.images / "link").symlink_to(f"/proc/{os.getpid()}/root")
    (place.images / "loop").symlink_to("loop")
    with (place.elsewhere / "base").open("rb") as secret:
        opened = f"fd/{secret.fileno()}"
        for name in (
            f"/proc/self/{opened}", f"/proc/{os.getpid()}/{opened}", f"/dev/{opened}",
            f"/dev/fd/../../{os.getpid()}/cwd", "/proc/self/root", "/proc/nothing", "link",
            f"/proc/self/root{place.elsewhere}/base", "/proc/self/status",
        ):  # fmt: skip
            error = place.refuse(name, match="is in /proc, where no image can be$", within="/:/proc", trusts=True)
            assert "elsewhere/base" not in str(error).replace(name, "")
    place.refuse("loop", match="cannot be looked at: Too many levels of symbolic links")


def test_proc_under_another_name(place: Place) -> None:
    """Links in a proc file system are not followed, wherever it is mounted."""
    mount = place.top / "mount"
    mount.mkdir()
    subprocess.run(["mount", "--bind", "/proc", mount], check=True)
    try:
        with (place.elsewhere / "base").open("rb") as secret:
            error = place.refuse(f"{mount}/self/fd/{secret.fileno()}", match="Too many levels", within="/")
        assert "elsewhere" not in str(error)
    finally:
        subprocess.run(["umount", mount], check=True)


def test_where_no_mark_can_be_the_sentence_says_what_to_do(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no mark is possible (because of the file system, a device, or missing rights), the error names only
    `parents=`.
    """
    monkeypatch.setattr(marks, "obstacle", lambda _fd: "its file system cannot keep marks (trusted.* attributes)")
    sentence = (
        r"is named only by the image, and its file system cannot keep marks \(trusted\.\* attributes\); "
        rf"if it is the right one, its layer must say parents={place.images}$"
    )

    place.refuse("base", match=sentence)


def flip(one: str, other: str) -> None:
    """Exchange two names again and again, until this process is killed."""
    libc = ctypes.CDLL(None)
    first, second = os.fsencode(one), os.fsencode(other)
    while True:
        libc.renameat2(-100, first, -100, second, RENAME_EXCHANGE)


@pytest.fixture
def flipping() -> Iterator[Callable[[Path, Path], None]]:
    """Return a function that has a process exchange two names until the test ends."""
    with ExitStack() as stack:

        def start(one: Path, other: Path) -> None:
            program = f"from tests.opener.test_parents import flip; flip({str(one)!r}, {str(other)!r})"
            process = subprocess.Popen([sys.executable, "-c", program])
            stack.callback(process.wait)
            stack.callback(process.kill)
            there = other.lstat().st_ino
            while other.lstat().st_ino == there:  # until the process runs
                pass

        yield start


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the file", "its directory"])
@pytest.mark.parametrize("act", ["parents=", "mark"])
def test_an_exchange_between_check_and_open_reads_nothing(
    place: Place, flipping: Callable[[Path, Path], None], how: str, act: str
) -> None:
    """R18: if what a name leads to is exchanged all the time, the allowed file is opened or the name is refused."""
    (place.top / "secret").mkdir()
    (place.top / "secret" / "base").write_text("secret")
    if act == "mark":
        place.mark("images/deep/base")
    if how == "the file":
        (place.images / "deep" / "link").symlink_to(place.top / "secret" / "base")
        flipping(place.images / "deep" / "base", place.images / "deep" / "link")
    else:
        (place.images / "link").symlink_to(place.top / "secret")
        flipping(place.images / "deep", place.images / "link")
    seen = {"images/deep/base": 0, "refused": 0}
    end = time.monotonic() + 1.0
    while time.monotonic() < end or not all(seen.values()):
        try:
            found = place.find("deep/base", within=str(place.images) if act == "parents=" else "")
        except DriverError:
            seen["refused"] += 1
        else:
            seen[content(found)] += 1
            place.stack.close()
        assert time.monotonic() < end + 60
