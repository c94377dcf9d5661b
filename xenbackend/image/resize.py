"""Makes the disk of an image larger. The new part reads as zeros, whatever the image had behind the end of its disk.

Must not make a disk smaller, nor overwrite data. Each step leaves a valid image: writing one sector makes the new part
belong to the disk, and if the process is killed before, at most room in the file is lost. A file is extended if
necessary; on a block device, new tables and data go behind the part that the image uses.
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
    """Resize a disk to `size` bytes, and return its former size.

    Raises: ConfigError if it would become smaller, or if the parent would be visible in the new part; DriverError if it
        is in use, damaged, of a kind that cannot grow, or has its data in a file that only the image itself names;
        OSError.
    """
    if size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes is not possible; choose a multiple of 512")
    before = _check_growth(image, size)
    if size == before:
        return before
    if check(image).status == ERRORS:
        raise DriverError("it is damaged; look at it with image check first", layer=image.text)
    tools = tools_of(image.format)
    with Session() as session:
        file = session.open_file(image.path, read_only=False, step=image.row.step)
        with blame(image):
            if tools.size(file) != before:  # only from here on nobody else writes to it
                raise DriverError("another program has changed its size meanwhile; look at it, and try again")
            if image.data_file:
                data = session.open_file(image.data_file, read_only=False, step=SECTOR)
                tools.grow_data(data, file, image.data_file, size)
            tools.grow(file, size, on_device=is_device(image.path))
            file.sync()
    return before


def _check_growth(image: Image, size: int) -> int:
    """Check that a disk can grow to `size` bytes, and return its present size. Raises: as `resize`."""
    with Session() as session:
        layers = session.open(image.chain, read_only=True).chain.layers
        before = layers[0].geometry.size
        if size < before:
            problem = f"it has {format_size(before)} and cannot shrink; the data after {format_size(size)}"
            raise ConfigError(f"{problem} would be lost")
        if size > before and len(layers) > 1 and layers[1].geometry.size > before:
            raise ConfigError("its parent is larger than it is, and would show in the new part; convert it instead")
        if size > before:
            file, tools = session.open_file(image.path, read_only=True, step=SECTOR), tools_of(image.format)
            with blame(image):
                tools.refuse_unchosen_data(image, file)
                tools.check_growth(file)
        return before
