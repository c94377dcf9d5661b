"""Trusts an image: an administrator says that it and its parents may be followed to the files that they name now.

The headers that a disk in service would read are read, up to the last parent, even of images in use. Then each image
that names other files is marked with them. Nothing is marked if one of them cannot be.

Must not change the content of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.block.mapped.parents import PARENT
from xenbackend.errors import DriverError, printable
from xenbackend.image.names import Image
from xenbackend.image.session import Session
from xenbackend.opener import marks
from xenbackend.opener.local import Followed


@dataclass(frozen=True, slots=True)
class Trusted:
    """A mark that was made.

    image, file  paths of the image and of the file that it names
    what         the role of the file: "parent", "data file" or "extent"
    before       the act that allowed it until now; `opener.parents.TRUSTED` if there was none
    """

    image: str
    what: str
    file: str
    before: str


def trust(image: Image) -> list[Trusted]:
    """Mark an image and its parents with the files that they name, and return the marks, those of the image first.

    Raises: DriverError if a parent cannot be opened, or an image cannot be marked.
    """
    with Session(use_queues=False, direct=False, trusts=True) as session:
        session.open(image.chain, read_only=True, locked=False)
        opener = session.opener
        followed = opener.followed[:]
        for path in dict.fromkeys(each.image for each in followed):
            obstacle = marks.obstacle(opener.descriptor(path))
            if obstacle:
                problem = f"{printable(path)}: {obstacle}, so its layer must say where its parents are"
                raise DriverError(f"{problem}: parents=DIRECTORY", path=path)
        found = {each: opener.describe(each.path) for each in followed}
        for path in dict.fromkeys(each.image for each in followed):
            _mark(opener.descriptor(path), path, {each: found[each] for each in followed if each.image == path})
    return [Trusted(each.image, each.what, each.path, each.by) for each in followed]


def _mark(fd: int, path: str, named: dict[Followed, marks.Marked]) -> None:
    """Mark one image, durably. Raises: DriverError."""
    parents = [each for followed, each in named.items() if followed.what == PARENT]
    files = [each for followed, each in named.items() if followed.what != PARENT]
    try:
        is_marked = (not parents or marks.mark_parents(fd, parents)) and (not files or marks.mark_files(fd, files))
        marks.sync(fd)
    except OSError as error:
        problem = f"{printable(path)} cannot be marked: {error.strerror}; write parents=DIRECTORY in its layer instead"
        raise DriverError(problem, path=path, errno=error.errno or 0) from error
    if not is_marked:
        raise DriverError(
            f"{printable(path)} cannot be marked; write parents=DIRECTORY in its layer instead", path=path
        )
