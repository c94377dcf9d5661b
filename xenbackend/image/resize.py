"""Making the disk of an image larger; what is new reads as zeros, whatever the image had behind its disk's end.

Must not make one smaller, nor write where data are. Each step leaves an image that is whole: what is new becomes part
of it by the write of one sector, and whoever is killed before has lost room in the file at most. A file becomes longer
where it has to; on a block device everything goes behind what the image uses there.
"""

from __future__ import annotations

from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.check import ERRORS, check
from xenbackend.image.names import Image, blame
from xenbackend.image.session import Session
from xenbackend.image.tools import tools_of
from xenbackend.opener.local import is_device
from xenbackend.units import SECTOR, format_size


def resize(image: Image, size: int) -> int:
    """Make a disk `size` bytes large, and return how large it was.

    Raises: ConfigError, where it would become smaller, or where the parent would show in what is new; DriverError,
        where it is in use, damaged, of a kind that cannot grow, or has its data in a file that only it names; OSError.
    """
    if size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes cannot be; its size is a multiple of 512")
    before = _check_growth(image, size)
    if size == before:
        return before
    if check(image).status == ERRORS:
        raise DriverError("it is damaged; look at it with image check first", layer=image.text)
    tools = tools_of(image.format)
    with Session() as session:
        file = session.open_file(image.path, read_only=False, step=image.row.step)
        with blame(image):
            if tools.size(file) != before:  # nobody else writes to it from here on
                raise DriverError("somebody else has changed its size meanwhile; look at it, and do it again")
            if image.data_file:
                data = session.open_file(image.data_file, read_only=False, step=SECTOR)
                tools.grow_data(data, file, image.data_file, size)
            tools.grow(file, size, on_device=is_device(image.path))
            file.sync()
    return before


def _check_growth(image: Image, size: int) -> int:
    """Return how large a disk is. Raises: as `resize`."""
    with Session() as session:
        layers = session.open(image.chain, read_only=True).chain.layers
        before = layers[0].geometry.size
        if size < before:
            problem = f"it has {format_size(before)} and cannot become smaller; what is behind {format_size(size)}"
            raise ConfigError(f"{problem} would be lost")
        if size > before and len(layers) > 1 and layers[1].geometry.size > before:
            raise ConfigError("its parent is larger than it is, and would show in what is new; convert it instead")
        if size > before:
            file, tools = session.open_file(image.path, read_only=True, step=SECTOR), tools_of(image.format)
            with blame(image):
                tools.refuse_unchosen_data(image, file)
                tools.check_growth(file)
        return before
