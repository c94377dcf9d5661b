"""A new image over an open one, its parent: the content of its file, and the text of the layer that opens it.

Must not open or write a file, nor guess a parent's format: the driver that has the parent open says it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xenbackend.block import grammar
from xenbackend.block.driver import Lookup
from xenbackend.block.formats.blank import Blank, Parent, Wishes, blank
from xenbackend.block.formats.table import BY_DRIVER, FORMATS, Format, format_of
from xenbackend.block.mapped.parents import places_of
from xenbackend.block.opening import MAX_PARENTS, OpenLayer
from xenbackend.block.options import files_of
from xenbackend.errors import ConfigError

_OVER_RAW = "qcow2"  # it records its parent's format, and every tool supports it


@dataclass(frozen=True, slots=True)
class Leaf:
    """A new image.

    text      the layer that opens it, with all options that it needs after it was marked with its parent
    unmarked  the same for an image that cannot be marked
    size      the disk's size in bytes
    """

    text: str
    unmarked: str
    size: int
    blank: Blank


def leaf_over(
    layers: Sequence[OpenLayer],
    path: str,
    image_format: str = "",
    size: int | None = None,
    wishes: Wishes | None = None,
) -> Leaf:
    """Return a child of an open image. It depends on nothing of the image that changes while that is written to.

    Args:
        layers: the image's layer, then those of its parents.
        path: where the child will be.
        image_format: the child's format, one of WRITTEN; by default the image's own, or QCOW2 over a raw one.
        size: the size of the child's disk in bytes; by default that of the image's.
        wishes: the other choices.

    Raises: ConfigError if such a child is not possible.
    """
    if not image_format:
        image_format = format_of(layers[0].driver.name)
        if image_format == "raw":
            image_format = _OVER_RAW
    parent, text, unmarked = child_of(layers, path, image_format)
    size = layers[0].geometry.size if size is None else size
    return Leaf(text, unmarked, size, blank(image_format, size, wishes or Wishes(), parent))


def child_of(layers: Sequence[OpenLayer], path: str, image_format: str) -> tuple[Parent, str, str]:
    """Return how an image at `path` names an open image as its parent, and the `text` and `unmarked` of its `Leaf`.

    Raises: ConfigError if an image of that format cannot have that parent.
    """
    layer = layers[0]
    child_format, parent_format = FORMATS.get(image_format), BY_DRIVER.get(layer.driver.name)
    if parent_format is None:
        raise ConfigError(f"{layer.text} is not an image that another one can have as its parent")
    if child_format is None or not child_format.parents:
        raise ConfigError(f"an image of the format {image_format!r} can have no parent; choose another format")
    if parent_format.name not in child_format.parents:
        words = " or ".join(child_format.parents)
        raise ConfigError(f"the parent of a {image_format} image can be {words}, not {parent_format.name}")
    uuid = layer.driver.identify()
    if len(layers) > MAX_PARENTS:
        raise ConfigError(f"there are {MAX_PARENTS} images in a row already; commit or convert some first")
    parent_path = next(iter(files_of(layer.driver.options).values()))
    files = layer.driver.env.files
    parent = Parent(
        _name(files, path, parent_path),
        parent_format.name,
        parent_format.qemu_name,
        uuid,
        files.look(parent_path).mtime_ns / 1e9,
    )
    texts = []
    for places in ([], _places_for(files, layer.driver.options, parent_path)):
        options = _options(child_format, places, parent_format, layer.driver.options)
        texts.append(grammar.format_file(child_format.driver, path, *options))
    return parent, texts[0], texts[1]


def _places_for(files: Lookup, options: Any, parent: str) -> list[str]:
    """Return the places for `parents=` of a child that cannot be marked.

    They are the directory of the parent, so that one place will do for a whole family, or the parent itself if it is a
    device; and the file that has the parent's data, if there is one.
    """
    facts, data_file = files.look(parent), getattr(options, "data_file", "")
    path = os.path.abspath(parent)  # noqa: PTH100 - as `opening`: pathlib would alter the name
    places = [path if facts.is_device else os.path.dirname(facts.real)]  # noqa: PTH120 - the same
    return [*places, os.path.abspath(data_file)] if data_file else places  # noqa: PTH100 - the same


def _options(child: Format, places: list[str], parent_format: Format, options: Any) -> list[str]:
    """Return the options for the child's layer: the places of its parents, and what the image itself cannot record.

    Options of the parent's own layer about its file and its parents are kept, since the child's layer opens them now.
    """
    given = map(os.path.abspath, places_of(getattr(options, "parents", "")))
    named = ":".join(dict.fromkeys([*given, *places]))
    words = ["cache=on"] if getattr(options, "cache", False) else []
    words += [f"parents={named}"] if named else []
    if "changed" in child.passes_on and getattr(options, "changed", "") == "accept":
        words.append("changed=accept")
    kept = getattr(options, "parent_format", "")
    if not child.says_parents_format:
        words.append(f"parent_format={parent_format.qemu_name}")
    elif kept and "parent_format" in child.passes_on:
        words.append(f"parent_format={kept}")
    return words


def _name(files: Lookup, path: str, parent: str) -> str:
    """Return a parent's name: relative to the child, or absolute if they have only the root in common."""
    facts = files.look(parent)
    if facts.is_device:  # keep the link's name, since the device behind it may have another one tomorrow
        return os.path.abspath(parent)  # noqa: PTH100 - as `opening`: pathlib would alter the name
    beside, real = files.resolve(path), facts.real
    if os.path.commonpath([beside, real]) == "/":
        return real
    return os.path.relpath(real, beside)
