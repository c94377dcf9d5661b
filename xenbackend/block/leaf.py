"""A new image over one that is open: what its file holds, and the layer that opens it.

Must not open or write a file, nor guess of which format a parent is: the driver that has it open says that.
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

_OVER_RAW = "qcow2"  # it says itself of which format its parent is, and any tool knows it


@dataclass(frozen=True, slots=True)
class Leaf:
    """A new image.

    text      the layer that opens it, with every option that it needs once it is marked with its parent
    unmarked  the same for an image that cannot be marked
    size      its disk's, bytes
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
    """Return a child of an open image. The image is not asked for anything that changes while it is written.

    Args:
        layers: the image's, and its parents' behind it.
        path: where the child will be.
        image_format: the child's, one of WRITTEN; by default the image's own, and over a raw one QCOW2.
        size: bytes of the child's disk; by default as many as the image has.
        wishes: what else may be chosen.

    Raises: ConfigError, where that child cannot be.
    """
    if not image_format:
        image_format = format_of(layers[0].driver.name)
        if image_format == "raw":
            image_format = _OVER_RAW
    parent, text, unmarked = child_of(layers, path, image_format)
    size = layers[0].geometry.size if size is None else size
    return Leaf(text, unmarked, size, blank(image_format, size, wishes or Wishes(), parent))


def child_of(layers: Sequence[OpenLayer], path: str, image_format: str) -> tuple[Parent, str, str]:
    """Return how an image at `path` names an open image as its parent, and `text` and `unmarked` as of a `Leaf`.

    Raises: ConfigError, where an image of that format cannot have that parent.
    """
    layer = layers[0]
    child_format, parent_format = FORMATS.get(image_format), BY_DRIVER.get(layer.driver.name)
    if parent_format is None:
        raise ConfigError(f"{layer.text} is no image that another one can have as its parent")
    if child_format is None or not child_format.parents:
        raise ConfigError(f"an image of the format {image_format!r} can have no parent; choose another format")
    if parent_format.name not in child_format.parents:
        words = " or ".join(child_format.parents)
        raise ConfigError(f"the parent of a {image_format} image can be {words}, and not {parent_format.name}")
    uuid = layer.driver.identify()
    if len(layers) > MAX_PARENTS:
        raise ConfigError(f"there are {MAX_PARENTS} images behind one another already; commit or convert some first")
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
        texts.append(grammar.format_layer(child_format.driver, path, *options))
    return parent, texts[0], texts[1]


def _places_for(files: Lookup, options: Any, parent: str) -> list[str]:
    """Return what `parents=` has to name for the child of an open image that cannot be marked.

    That is the directory of the parent, so that one place will do for a whole family; of a device, that device; and the
    file that has the parent's data.
    """
    facts, data_file = files.look(parent), getattr(options, "data_file", "")
    path = os.path.abspath(parent)  # noqa: PTH100 - as `opening`: pathlib would alter the name
    places = [path if facts.is_device else os.path.dirname(facts.real)]  # noqa: PTH120 - the same
    return [*places, os.path.abspath(data_file)] if data_file else places  # noqa: PTH100 - the same


def _options(child: Format, places: list[str], parent_format: Format, options: Any) -> list[str]:
    """Return what the child's layer has to say: where its parents may be, and what the image itself cannot say.

    What the parent's own layer says of its file and its parents goes on: they are opened by the child from now on.
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
    """Return a parent's name: relative to the child, unless they have no more than the root in common."""
    facts = files.look(parent)
    if facts.is_device:  # what its link leads to may be another one tomorrow
        return os.path.abspath(parent)  # noqa: PTH100 - as `opening`: pathlib would alter the name
    beside, real = files.resolve(path), facts.real
    if os.path.commonpath([beside, real]) == "/":
        return real
    return os.path.relpath(real, beside)
