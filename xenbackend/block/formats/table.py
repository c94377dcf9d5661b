"""The image formats, one row each: everything about a format that is not in its own modules.

Must not import the modules that a row names as text: they are loaded when needed, as drivers are. Must not open a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

from xenbackend.block.options import choice

_BLANK = "xenbackend.block.formats.blank"
_TOOLS = "xenbackend.image.formats"


@dataclass(frozen=True, slots=True)
class Format:
    """A format. One without `blank` is only read, and the fields after that do not apply."""

    name: str  # our word for it
    driver: str  # the driver that serves it
    qemu_name: str  # QEMU's name for it, also in a QCOW2 image that names its parent
    title: str  # its name for people
    look: str  # what a file of it is called, as in "a VHD image"
    magic: tuple[int, bytes] = (0, b"")  # place and bytes; if several formats match, the longest magic decides
    passes_on: tuple[str, ...] = ()  # options that a layer passes on between child and parent
    blank: str = ""  # function that makes an empty image, such as `blank.blank_vhd`
    tools: str = ""  # class for the commands on its images, an `image.tools.Tools`
    parents: tuple[str, ...] = ()  # names of the formats that the parent of a new image may have
    says_parents_format: bool = True  # an image names its parent's format; if not, its layer must
    step: int = 0  # bytes: the size of a file that is written is a multiple of it
    cluster_size: int = 0  # default in bytes, as QEMU's; for VHD of a block; 0 if there are no tables to check
    can_be_fixed: bool = False  # an image may have the whole disk from the beginning
    can_rebase: bool = False  # an image may get another parent


_ROWS = (
    Format(
        "raw", "aio", "raw", "raw", "a raw disk",
        blank=f"{_BLANK}:blank_raw", tools=f"{_TOOLS}.raw:Raw", step=512,
    ),
    Format(
        "vhd", "vhd", "vpc", "VHD", "a VHD image", (0, b"conectix"), ("parents", "changed"),
        blank=f"{_BLANK}:blank_vhd", tools=f"{_TOOLS}.vhd:Vhd", parents=("vhd", "raw"), step=512,
        cluster_size=2 << 20, can_be_fixed=True, can_rebase=True,
    ),
    Format(
        "qcow2", "qcow2", "qcow2", "QCOW2", "a QCOW2 image", (0, b"QFI\xfb"), ("parents", "parent_format"),
        blank=f"{_BLANK}:blank_qcow2", tools=f"{_TOOLS}.qcow2:Qcow2", parents=("raw", "vhd", "qcow2", "qcow"),
        step=64 << 10, cluster_size=64 << 10, can_rebase=True,
    ),
    Format(
        "qcow", "qcow", "qcow", "QCOW", "a QCOW image of version 1", (0, b"QFI\xfb\0\0\0\1"),
        ("parents", "parent_format"), blank=f"{_BLANK}:blank_qcow", tools=f"{_TOOLS}.qcow:Qcow",
        parents=("raw", "vhd", "qcow2", "qcow"), step=64 << 10, cluster_size=4 << 10, says_parents_format=False,
    ),
    Format("vmdk", "vmdk", "vmdk", "VMDK", "a VMDK image", (0, b"KDMV"), ("parents", "changed")),
    Format("vhdx", "vhdx", "vhdx", "VHDX", "a VHDX image", (0, b"vhdxfile")),
    Format("vdi", "vdi", "vdi", "VDI", "a VDI image", (64, b"\x7f\x10\xda\xbe")),
)  # fmt: skip

FORMATS = {each.name: each for each in _ROWS}
WRITTEN = {each.name: each for each in _ROWS if each.blank}  # the others are only read
BY_DRIVER = {each.driver: each for each in _ROWS} | {"sync": FORMATS["raw"]}
BY_QEMU_NAME = {each.qemu_name: each for each in _ROWS}

QemuName = Annotated[str, choice(tuple(BY_QEMU_NAME))]  # a format by QEMU's name, as an option


def format_of(driver: str) -> str:
    """Return our name for the format that a driver serves; empty if it serves none."""
    return BY_DRIVER[driver].name if driver in BY_DRIVER else ""


def load(name: str) -> Any:
    """Import and return an object that a row names as ``module:attribute``."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def layers(formats: tuple[str, ...] | dict[str, Format]) -> list[str]:
    """Return the layer's text for an image of each format, such as ``vhd:FILE``."""
    return [f"{FORMATS[each].driver}:FILE" for each in formats]
