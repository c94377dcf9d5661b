"""The rule by which an image is followed to its parent, or to another file that it names.

An image is not to be trusted: its maker may have named any file of the host, to read it as a disk. So a file that it
names may be used only if an administrator has allowed that, by one of these acts:

    a mark        at the image itself, which says which file is its parent (`marks`)
    parents=      in the chain: directories beneath which parents may be, or a file or device that may be one
    the settings  the same for all disks of the host
    in service    the disk has been served from it, by one of these acts or by the last release, which had no such rule

The name that the image gives serves only to look. The decision is about a descriptor: what it is, where it was found
(from the directory down, step by step, following no link), or which file it is. The caller opens that descriptor, and
not a name, so that nobody can exchange the file meanwhile.

Beneath /dev, only a device that the administrator's own text names can be a parent. /dev/shm is a place for files.

The caller tells a worker, which a guest may have taken over, why a name was refused. So names in /proc, which lead to
whatever a process has open, are refused without a look, and links there are not followed.

Must not open anything for reading or writing, nor look at what is in an image.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from xenbackend.block.mapped.parents import DATA_FILE, PARENT, places_of
from xenbackend.errors import DriverError, KernelError, printable
from xenbackend.kernel import openat
from xenbackend.opener import marks

_PROC = "/proc"
_MOST_LINKS = 40  # in one path, as the kernel follows: path_resolution(7)
MARK, IN_SERVICE, TRUSTED = "its mark", "the disk in service", "image trust"  # acts, besides places
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_ELSE = {  # what else can be done if it is not there
    PARENT: ", or record its new name with xenbackend image rebase --unsafe",
    DATA_FILE: ", or add data_file=FILE",
}


@dataclass(frozen=True, slots=True)
class Named:
    """What an image says about another file: the arguments of `block.driver.Lookup.find`."""

    what: str
    image: str
    names: Sequence[str]
    within: str = ""


@dataclass(frozen=True, slots=True)
class Allowed:
    """A file that an image may be followed to.

    fd      of O_PATH, the caller's from now on
    path    its name: as the image says, or, if that leads through a link, the path without links
    by      the act by which it is allowed
    """

    fd: int
    path: str
    by: str


Allows = Callable[[int], bool]  # tells whether a descriptor is of a file that a disk in service has open


def find(
    child: int, named: Named, settings: Sequence[str] = (), is_in_service: Allows | None = None, *, trusts: bool = False
) -> Allowed:
    """Return the first of the files named by an image to which it may be followed.

    Args:
        child: a descriptor of the image.
        named: what it says, and what its layer says about that.
        settings: the places that the settings name, as `parents=` does.
        is_in_service: tells which files are allowed because the disk is served from them already.
        trusts: an administrator wants this image to be followed wherever it leads.

    Raises: DriverError, whose sentence names paths of the host: it is not for a guest.
    """
    acts = _Acts(child, named, settings, is_in_service, trusts=trusts)
    refused: DriverError | None = None
    try:
        for real, shown in paths_of(named):
            try:
                return acts.follow(real, shown)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    refused = refused or acts.refusal(shown, real, f"cannot be looked at: {error.strerror}")
            except DriverError as error:
                refused = refused or error
    except KernelError as error:
        raise DriverError(str(error), path=named.image, errno=error.errno) from error
    finally:
        acts.close()
    if refused is not None:
        raise refused
    said = ", ".join(printable(repr(name)) for name in named.names) or "nothing that can be a name"
    problem = (
        f"its {named.what} is not there: the image names {said}; put the {named.what} there{_ELSE.get(named.what, '')}"
    )
    raise DriverError(problem, path=named.image, errno=errno.ENOENT)


class _Acts:
    """The acts that allow files that one image names."""

    def __init__(
        self, child: int, named: Named, settings: Sequence[str], is_in_service: Allows | None, *, trusts: bool
    ) -> None:
        self._named = named
        self._is_in_service, self._trusts = is_in_service, trusts
        self._stack = ExitStack()
        self._root = self._place("/")
        self._places = [(f"parents={place}", place) for place in places_of(named.within)]
        self._places += [(f"the settings' parents, {place}", place) for place in settings]
        mark = marks.read(child)
        self._marked = mark.parents if named.what == PARENT else mark.files
        self._obstacle = mark.problem or marks.obstacle(child)

    def close(self) -> None:
        """Close the descriptors that were opened to look."""
        self._stack.close()

    def follow(self, real: str, shown: str) -> Allowed:
        """Return the file at a path, if it is allowed.

        Args:
            real: the path, which had no links when it was looked for.
            shown: the path as a person knows it.

        Raises: DriverError, OSError, KernelError.
        """
        if real.startswith(f"{_PROC}/"):
            raise self.refusal(shown, real, f"is in {_PROC}, where no image can be")
        fd = openat.open_beneath(self._root, real.lstrip("/") or ".")
        try:
            mode = os.fstat(fd).st_mode
            self._check_kind(mode, shown, real)
            for by, place in self._places:
                if self._is_at(place, fd, real):
                    return Allowed(fd, place if stat.S_ISBLK(mode) else shown, by)
            if any(each.is_of(fd) for each in self._marked):
                return Allowed(fd, shown, MARK)
            if self._is_in_service is not None and self._is_in_service(fd):
                return Allowed(fd, shown, IN_SERVICE)
            is_plain = stat.S_ISREG(mode) and not is_in_dev(real)
            if self._trusts and is_plain:
                return Allowed(fd, shown, TRUSTED)
            raise self.refusal(shown, real, self._advice(real) if is_plain else _advice_in_dev(real, mode))
        except BaseException:
            os.close(fd)
            raise

    def refusal(self, path: str, real: str, problem: str) -> DriverError:
        """Return the error for a file that is there but not allowed."""
        what = f"its {self._named.what} {printable(path)}" + (f" is {printable(real)}, and" if real != path else "")
        return DriverError(f"{what} {problem}", path=path, errno=errno.EACCES)

    def _place(self, path: str) -> int:
        """Return a descriptor of a place that an administrator names. Raises: OSError."""
        fd = openat.open_place(path)
        self._stack.callback(os.close, fd)
        return fd

    def _check_kind(self, mode: int, path: str, real: str) -> None:
        if stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and self._named.what == PARENT):
            return
        kind = "file or block device" if self._named.what == PARENT else "file"
        also = "; if that is right, add data_file=FILE" if self._named.what == DATA_FILE else ""
        raise self.refusal(path, real, "is a directory" if stat.S_ISDIR(mode) else f"is not a {kind}{also}")

    def _is_at(self, place: str, fd: int, real: str) -> bool:
        """Return whether a file is `place`, which an administrator names, or lies beneath that directory.

        Raises: OSError, KernelError.
        """
        try:
            named = self._place(place)
        except OSError:
            return False
        status, found = os.fstat(named), os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            return stat.S_ISBLK(found.st_mode) and status.st_rdev == found.st_rdev
        if not stat.S_ISDIR(status.st_mode):
            return stat.S_ISREG(found.st_mode) and os.path.samestat(status, found)
        top = openat.path_of(named)
        if is_in_dev(f"{top}/") or is_in_dev(real) or not stat.S_ISREG(found.st_mode):
            return False
        rest = os.path.relpath(real, top)
        if rest == ".." or rest.startswith("../"):
            return False
        beneath = openat.open_beneath(named, rest)
        try:
            return os.path.samestat(os.fstat(beneath), found)  # both are open: no other file has these numbers
        finally:
            os.close(beneath)

    def _advice(self, real: str) -> str:
        named = self._named
        text = f"parents={printable(os.path.dirname(real))}"  # noqa: PTH120 - pathlib would alter the name
        text += " or data_file=FILE" if named.what == DATA_FILE else ""
        if self._obstacle:
            return (
                f"is named only by the image, and {self._obstacle}; if it is the right one, its layer must say {text}"
            )
        problem = "is not the one that the image was marked for" if self._marked else "is named only by the image"
        return (
            f"{problem}; if it is the right one, allow it with xenbackend image trust LAYER, or with {text} in its "
            "layer"
        )


def is_in_dev(path: str) -> bool:
    """Return whether a path without links lies in /dev, but not in /dev/shm, which is a place for files."""
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")  # noqa: S108 - nothing is made there


def _advice_in_dev(real: str, mode: int) -> str:
    problem = f"is {'a device' if stat.S_ISBLK(mode) else 'in /dev'}, and is not opened just because an image names it"
    return f"{problem}; if it is the right one, its layer must say parents={printable(real)}"


def paths_of(named: Named) -> Iterator[tuple[str, str]]:
    """Yield the paths that an image may mean, the likeliest first, each without links and as a person knows it.

    First ``..`` is taken as the kernel does, after following links; then as older releases did, as the path has it.
    """
    beside = os.path.dirname(os.path.abspath(named.image))  # noqa: PTH100, PTH120 - pathlib would alter names
    done = set()
    for name in named.names:
        if not name or "\0" in name:
            continue
        joined = os.path.join(beside, name)  # noqa: PTH118 - the same
        said = os.path.normpath(joined)
        there = _without_links(said)
        for real in dict.fromkeys([there if joined == said else _without_links(joined), there]):
            if real not in done:
                done.add(real)
                yield real, said if there == real else real


def _without_links(path: str) -> str:
    """Return where an absolute path leads at this moment; what is missing, or in a proc file system, stands as it is.

    This is only a guess: the result is opened without following a link.
    """
    proc = os.lstat(_PROC).st_dev
    done, rest, links = "/", path.split("/")[::-1], 0
    while rest:
        step = rest.pop()
        if step in ("", "."):
            continue
        if step == "..":
            done = os.path.dirname(done)  # noqa: PTH120 - as above
            continue
        here = os.path.join(done, step)  # noqa: PTH118 - as above
        target = _target_of(here, proc)
        if not target:
            done = here
            continue
        links += 1
        if links > _MOST_LINKS:
            return path
        done = "/" if target.startswith("/") else done
        rest += target.split("/")[::-1]
    return done


def _target_of(path: str, proc: int) -> str:
    """Return what a link says; empty if there is none, or if it is in the file system with the number `proc`."""
    try:
        return "" if os.lstat(path).st_dev == proc else os.readlink(path)  # noqa: PTH115 - as above
    except (OSError, ValueError):
        return ""
