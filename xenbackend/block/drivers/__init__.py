"""Finds drivers by the words that a chain uses: a table of built-in drivers, and third parties' packages.

Must not import a driver before it is asked for: a worker loads only the drivers that its chain names.

A third party's package names its drivers in its entry points; chains can then use these words::

    [project.entry-points."xenbackend.drivers"]
    xor = "xenbackend_xor:Xor"
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from xenbackend.block.driver import API, NEEDS, Driver
from xenbackend.block.grammar import parse
from xenbackend.block.options import OptionHelp, describe_options, nearest
from xenbackend.errors import ChainError, DriverError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from importlib.metadata import EntryPoint

GROUP = "xenbackend.drivers"
BUILT_IN = {
    "aio": "xenbackend.block.drivers.aio:Aio",
    "cache": "xenbackend.block.drivers.cache:Cache",
    "checksum": "xenbackend.block.drivers.checksum:Checksum",
    "cow": "xenbackend.block.drivers.cow:Cow",
    "delay": "xenbackend.block.drivers.delay:Delay",
    "fault": "xenbackend.block.drivers.fault:Fault",
    "log": "xenbackend.block.drivers.log:Log",
    "luks": "xenbackend.block.drivers.luks:Luks",
    "nbd": "xenbackend.block.drivers.nbd:Nbd",
    "null": "xenbackend.block.drivers.null:Null",
    "offset": "xenbackend.block.drivers.offset:Offset",
    "partition": "xenbackend.block.drivers.partition:Partition",
    "qcow": "xenbackend.block.drivers.qcow:Qcow",
    "qcow2": "xenbackend.block.drivers.qcow2:Qcow2",
    "ram": "xenbackend.block.drivers.ram:Ram",
    "rbd": "xenbackend.block.drivers.rbd:Rbd",
    "readahead": "xenbackend.block.drivers.readahead:Readahead",
    "sync": "xenbackend.block.drivers.sync:Sync",
    "throttle": "xenbackend.block.drivers.throttle:Throttle",
    "vdi": "xenbackend.block.drivers.vdi:Vdi",
    "vhd": "xenbackend.block.drivers.vhd:Vhd",
    "vhdx": "xenbackend.block.drivers.vhdx:Vhdx",
    "vmdk": "xenbackend.block.drivers.vmdk:Vmdk",
}
ALIASES = {  # blktap's names for drivers of ours
    "valve": "throttle",
    "vhdsync": "vhd",
}
UNBUILT = {  # words of blktap2 and libxl for which there is no driver: what they mean, and what to use instead
    "bc": (
        "blktap2's cache in front of a shared parent",
        "cache: keeps blocks in a file; the option cache=on keeps them in memory",
    ),
    "ioemu": ("a disk of the QEMU device model", "name the image itself, as in qcow2:/img/a.qcow2"),
    "lc": ("blktap's local read cache", "cache:FILE,size=SIZE keeps what is read in a file on a faster device"),
    "llp": ("blktap2's two writable leaves", "make a leaf for each guest by xenbackend image snapshot"),
    "qed": ("the QED image", "qemu-img convert -O qcow2 makes a qcow2: of it"),
    "remus": ("blktap2's replication to a standby host", "DRBD makes a device that aio: can serve"),
    "vhdi": ("blktap2's index over VHD images", "xenbackend image convert makes one image of them"),
}


LOADED_AHEAD = {"rbd"}  # our drivers with `needs`, which a worker has to know before its walls go up
WITHOUT_IMAGES = {  # our drivers that open no image by `env.files`
    "delay", "fault", "log", "luks", "nbd", "null", "offset", "partition", "ram", "rbd", "readahead", "throttle",
}  # fmt: skip

_ahead: dict[str, type[Driver] | LookupError] | None = None  # what `load_ahead` found; None: it was not called


def load_ahead(names: Iterable[str]) -> list[type[Driver]]:
    """Load those drivers that must be loaded ahead, third parties' and some of ours, and return their classes.

    All that they need is loaded, too. For a process that will not be able to import anything later. From then on
    `find_driver` finds no other drivers of third parties or of LOADED_AHEAD. A name that cannot be used is an error
    only when it is asked for.
    """
    global _ahead  # noqa: PLW0603 - it is about the whole process, which cannot import afterwards
    found: dict[str, type[Driver] | LookupError] = {}
    for name in names:
        if (name in BUILT_IN or name in ALIASES) and name not in LOADED_AHEAD:
            continue
        try:
            driver = found[name] = find_driver(name)
            with suppress(DriverError):  # opening the layer will report the same
                driver.prepare()
        except LookupError as problem:
            found[name] = problem
    _ahead = found
    return [each for each in found.values() if isinstance(each, type)]


def words_of(chain: str) -> list[str]:
    """Return the words by which a chain's text names its drivers; a text that is not a chain has none."""
    try:
        return sorted({layer.name for layer in parse(chain)})
    except ChainError:
        return []


def may_open_images(words: Collection[str]) -> bool:
    """Return whether one of these drivers may open an image; so it is if no words are known, or one is not ours."""
    return not words or not {ALIASES.get(each, each) for each in words} <= WITHOUT_IMAGES


def driver_names() -> list[str]:
    """Return the names of all drivers, including third parties', sorted."""
    return sorted({*BUILT_IN, *(each.name for each in _entry_points())})


def find_driver(name: str) -> type[Driver]:
    """Return the class of a driver.

    Raises: LookupError with a sentence for the operator: the name is unknown, or known but not built (UNBUILT), or that
        of a third party's driver that cannot be used.
    """
    name = ALIASES.get(name, name)
    if name in BUILT_IN and not (_ahead is not None and name in LOADED_AHEAD):
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Driver] = getattr(importlib.import_module(module), attribute)
        return found
    if _ahead is not None:
        return _find_ahead(name, _ahead)
    candidates = [each for each in _entry_points() if each.name == name]
    if len(candidates) > 1:
        raise LookupError(
            f"driver {name!r} is offered by {' and '.join(map(_source, candidates))}; uninstall all but one"
        )
    if candidates:
        return _load(candidates[0])
    if name in UNBUILT:
        meaning, instead = UNBUILT[name]
        raise LookupError(f"driver {name!r} ({meaning}) is known but not built in this version; {instead}")
    hint = nearest(name, driver_names()) or "; `xenbackend drivers` lists the known ones"
    raise LookupError(f"unknown driver {name!r}{hint}")


def _find_ahead(name: str, ahead: Mapping[str, type[Driver] | LookupError]) -> type[Driver]:
    found = ahead.get(name)
    if found is None:
        whose = "needs more than other drivers" if name in BUILT_IN else "is a third party's"
        raise LookupError(
            f"driver {name!r} {whose}, and this disk's worker was started without it; a worker behind its walls can "
            "load nothing, so detach the disk and attach it again with this chain"
        )
    if isinstance(found, LookupError):
        raise LookupError(str(found))
    return found


def summary(driver: type[Driver]) -> str:
    """Return the first line of a driver's manual."""
    return _document(driver).partition("\n")[0]


def manual(driver: type[Driver]) -> str:
    """Return a driver's manual: its module's docstring, with the table of its options after the description."""
    before, heading, after = _document(driver).partition("\nBehaviour:")
    return f"{before}\nOptions:\n{_options_text(describe_options(driver.Options))}\n{heading}{after}"


def _document(driver: type[Driver]) -> str:
    import inspect

    return inspect.getdoc(inspect.getmodule(driver)) or inspect.getdoc(driver) or ""


def _options_text(options: list[OptionHelp]) -> str:
    if not options:
        return "    None."
    lines = []
    for each in options:
        given = f"default {each.default}" if each.default else "must be given"
        place = ", the first item" if each.is_target else ""
        lines.append(f"    {each.name}: {each.kind}{place}, {given}\n        {each.text}")
    return "\n".join(lines)


def _entry_points() -> list[EntryPoint]:
    """Return third parties' drivers. Imports late, as a worker with our own drivers does not need it (2 MiB, 25 ms)."""
    from importlib import metadata

    return list(metadata.entry_points(group=GROUP))


def _load(entry: EntryPoint) -> type[Driver]:
    try:
        found: Any = entry.load()
    except Exception as error:
        sentence = f"driver {entry.name!r} of {_source(entry)} cannot be loaded: {type(error).__name__}: {error}"
        raise LookupError(sentence) from error
    if not (isinstance(found, type) and issubclass(found, Driver)):
        raise LookupError(f"driver {entry.name!r} of {_source(entry)} is not a subclass of Driver")
    if unknown := sorted(set(found.needs) - NEEDS):
        raise LookupError(
            f"driver {entry.name!r} of {_source(entry)} needs {unknown[0]!r}; there are {', '.join(NEEDS)}"
        )
    if found.api != API:
        sentence = f"was written for version {found.api} of the driver contract and this is version {API}; update it"
        raise LookupError(f"driver {entry.name!r} of {_source(entry)} {sentence}")
    return found


def _source(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
