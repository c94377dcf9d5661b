"""What an image is: format, sizes, clusters, and the bits that say that something is wrong.

Must not read data, nor decide what an image is served as.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from uuid import UUID

from xenbackend.block.chain import OpenLayer
from xenbackend.block.drivers.aio import Aio
from xenbackend.block.drivers.qcow import Qcow
from xenbackend.block.drivers.qcow2 import Qcow2
from xenbackend.block.drivers.vhd import Vhd
from xenbackend.block.formats import qcow, qcow2, vhd
from xenbackend.block.options import files_of
from xenbackend.block.spec import ChainSpec
from xenbackend.errors import DriverError
from xenbackend.image.session import Disk, Session

_VHD_TYPES = {vhd.FIXED: "fixed", vhd.DYNAMIC: "dynamic", vhd.DIFFERENCING: "differencing"}


@dataclass(frozen=True, slots=True)
class Facts:
    """One layer. Sizes are bytes; 0 where there is no such thing."""

    layer: str
    format: str  # "VHD, dynamic"
    virtual_size: int
    file: str = ""
    file_size: int = 0  # also 0 for a block device
    allocated: int = 0  # what the file takes on its file system
    cluster_size: int = 0
    parent: str = ""  # the layer
    is_dirty: bool = False
    is_corrupt: bool = False
    more: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """All layers of a chain, the top one first, with the parents of its source."""

    chain: str
    in_use: bool  # somebody writes to it: numbers may be old already
    layers: list[Facts]


def chain_facts(spec: ChainSpec) -> ChainFacts:
    """Return what a chain is made of; also of one that is in use, which is then read without a lock.

    Raises: DriverError.
    """
    with Session() as session:
        disk, in_use = _open(session, spec)
        layers = disk.chain.layers
        children = {each.parent_of: each.text for each in layers if each.parent_of}
        return ChainFacts(spec.text, in_use, [_facts(each, children.get(each.text, "")) for each in layers])


def _open(session: Session, spec: ChainSpec) -> tuple[Disk, bool]:
    try:
        return session.open(spec, read_only=True), False
    except DriverError as error:
        if error.errno != errno.EBUSY:
            raise
    return session.open(spec, read_only=True, locked=False), True


def _facts(layer: OpenLayer, parent: str) -> Facts:
    driver = layer.driver
    path = next(iter(files_of(driver.options).values()), "")
    found = os.stat(path) if path else None  # noqa: PTH116 - as `opening`: pathlib would alter the name
    file_size, allocated = (found.st_size, found.st_blocks * 512) if found else (0, 0)
    base = Facts(layer.text, "raw", layer.geometry.size, path, file_size, allocated, parent=parent)
    if isinstance(driver, Vhd):
        return _vhd(driver, base)
    if isinstance(driver, Qcow2):
        return _qcow2(driver, base)
    if isinstance(driver, Qcow):
        header = qcow.parse_header(driver.file.read_at, driver.file.size)
        return replace(base, format="QCOW, version 1", cluster_size=header.cluster_size)
    return base if isinstance(driver, Aio) else replace(base, format=driver.name)


def _vhd(driver: Vhd, base: Facts) -> Facts:
    footer = driver.footer
    cluster_size = 0 if footer.type == vhd.FIXED else driver.header.block_size
    more = {"uuid": str(UUID(bytes=footer.uuid)), "creator": footer.creator.rstrip(b"\0").decode("latin-1")}
    return replace(base, format=f"VHD, {_VHD_TYPES[footer.type]}", cluster_size=cluster_size, more=more)


def _qcow2(driver: Qcow2, base: Facts) -> Facts:
    header = qcow2.parse_header(driver.file.read_at, driver.file.size)
    return replace(
        base,
        format=f"QCOW2, version {header.version}",
        cluster_size=header.cluster_size,
        is_dirty=bool(header.incompatible & qcow2.DIRTY),
        is_corrupt=bool(header.incompatible & qcow2.CORRUPT),
        more={"snapshots": str(header.snapshot_count)} if header.snapshot_count else {},
    )
