"""Facts about an image: format, sizes, clusters, parents, and what prevents it from being served.

Must not read data, nor decide as what an image is served. The facts come from the driver if the image can be opened,
and otherwise from the headers.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from typing import Any

from xenbackend.block.formats.table import WRITTEN, format_of
from xenbackend.block.mapped.parents import PARENT, act_key
from xenbackend.block.opening import OpenLayer
from xenbackend.block.options import files_of
from xenbackend.block.spec import ChainSpec, LayerSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image import looks
from xenbackend.image.session import Session
from xenbackend.image.tools import tools_of
from xenbackend.kernel.inuse import InUse


@dataclass(frozen=True, slots=True)
class Facts:
    """One layer. Sizes are in bytes; 0 if there is no such value, or it is not known."""

    layer: str  # empty for a file that no driver serves
    format: str  # such as "VHD, dynamic"; empty if not even that is known
    virtual_size: int
    file: str = ""
    file_size: int = 0  # also 0 for a block device
    allocated: int = 0  # the room that the file takes on its file system
    cluster_size: int = 0
    parent: str = ""  # the layer of a parent that was found
    parent_by: str = ""  # the act of an administrator that allows the image to be followed to it
    parent_names: tuple[str, ...] = ()  # the names that the image has for a parent that could not be opened
    is_dirty: bool = False
    is_corrupt: bool = False
    more: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """All layers of a chain, the top one first, with the parents of its source."""

    chain: str
    in_use: bool  # somebody writes to it: the values may be out of date
    layers: list[Facts]  # if there is a problem, up to the layer that cannot be opened
    problem: str = ""  # why it cannot be opened
    used_by: str = ""  # who writes to it, if that is known


def chain_facts(spec: ChainSpec) -> ChainFacts:
    """Return the facts of a chain. If it is in use, it is read without a lock.

    Raises: DriverError if there is nothing to examine.
    """
    with Session(use_queues=False) as session:
        try:
            layers, in_use, user = _open(session, spec)
        except DriverError as error:
            return _in_the_way(session, spec, error)
        children = {each.parent_of: each.text for each in layers if each.parent_of}
        facts = [_facts(each, children.get(each.text, "")) for each in layers]
        return ChainFacts(spec.text, in_use, facts, used_by=user)


def file_facts(path: str, look: looks.Look) -> ChainFacts:
    """Return the facts of a file that no driver serves. Raises: DriverError if it cannot be read."""
    problem = f"{printable(path)} looks like {look.title}, which no driver serves; {look.advice}"
    return ChainFacts("", False, [_headers("", path)], problem)


def _open(session: Session, spec: ChainSpec) -> tuple[tuple[OpenLayer, ...], bool, str]:
    try:
        return session.open(spec, read_only=True).chain.layers, False, ""
    except InUse as error:
        user = error.user
    return session.open(spec, read_only=True, locked=False).chain.layers, True, user


def _in_the_way(session: Session, spec: ChainSpec, error: DriverError) -> ChainFacts:
    """Return what is known of a chain that cannot be opened because of `error`. Raises: `error` if nothing is known."""
    found = [Facts(each.text, each.driver.name, 0) for each in spec.layers[:-1]]
    opened = session.open_as_far(spec.layers[-1], locked=False)
    failed = spec.layers[-1]
    for number, layer in enumerate(opened):
        parent = layer.driver.parent
        text = opened[number + 1].text if number + 1 < len(opened) else parent.text if parent else ""
        found.append(_facts(layer, text))
    if opened:
        if not found[-1].parent:
            return ChainFacts(spec.text, False, found, str(error))
        try:
            (failed,) = parse_chain(found[-1].parent).layers
        except (ConfigError, ValueError):  # `error` is about that
            return ChainFacts(spec.text, False, found, str(error))
    try:
        found.append(_of_spec(failed))
    except DriverError:
        if not opened:
            raise error from None
    return ChainFacts(spec.text, False, found, str(error))


def _of_spec(spec: LayerSpec) -> Facts:
    """Return the facts in the headers of a layer that could not be opened. Raises: DriverError if it has no file."""
    path = next(iter(files_of(spec.options).values()), "")
    if not path:
        raise DriverError("it has no file", layer=spec.text)
    return _headers(spec.text, path)


def _headers(layer: str, path: str) -> Facts:
    from xenbackend.image.headers import read_headers  # late: most images open

    fd = looks.open_to_look(path)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        read = looks.reader(fd, size)
        name = looks.name_of(read, size)
        found = read_headers(name, read, size)
    except OSError as error:
        raise DriverError(f"{path}: {error.strerror}", path=path, errno=error.errno or errno.EIO) from error
    finally:
        os.close(fd)
    base = _base(layer, path, found.size)
    title = "" if name == "raw" else found.format  # a file that looks like raw may be a damaged image of any format
    return replace(base, format=title, cluster_size=found.cluster_size, parent_names=found.parents, more=found.more)


def _base(layer: str, path: str, virtual_size: int) -> Facts:
    found = os.stat(path) if path else None  # noqa: PTH116 - as `opening`: pathlib would alter the name
    file_size, allocated = (found.st_size, found.st_blocks * 512) if found else (0, 0)
    return Facts(layer, "raw", virtual_size, path, file_size, allocated)


def _facts(layer: OpenLayer, parent: str) -> Facts:
    driver = layer.driver
    base = _base(layer.text, next(iter(files_of(driver.options).values()), ""), layer.geometry.size)
    base = replace(base, parent=parent, parent_by=driver.env.facts.get(act_key(PARENT), ""))
    name = format_of(layer.driver.name)
    return tools_of(name).facts(driver, base) if name in WRITTEN else _reported(driver, base)


def _reported(driver: Any, base: Facts) -> Facts:
    """Return the facts that a driver itself reports."""
    facts = dict(driver.env.facts)
    facts.pop("mode", None)
    facts.pop(act_key(PARENT), None)
    return replace(base, format=facts.pop("format", driver.name), more=facts)
