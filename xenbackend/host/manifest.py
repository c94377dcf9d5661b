"""The list of installed files, so that exactly these are removed again.

Must not decide what happens to a file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from xenbackend.errors import ConfigError
from xenbackend.host.files import Item
from xenbackend.host.tree import Tree

PATH = "/var/lib/xenbackend/installed.json"


@dataclass(slots=True)
class Manifest:
    """Fingerprints by path, and the directories that were created for the files."""

    files: dict[str, str] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)


def load(tree: Tree) -> Manifest:
    """Return the manifest below a root; an empty one if there is none. Raises: ConfigError if it is damaged."""
    place = tree.at(PATH)
    try:
        manifest = Manifest(**json.loads(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Manifest()
    except (ValueError, TypeError):
        raise ConfigError(f"{place}: is damaged; remove it and install again") from None
    return manifest


def save(tree: Tree, manifest: Manifest) -> None:
    """Write the manifest, if it has changed."""
    item = Item(PATH, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    if not tree.has(item):
        tree.put(item)


def remove(tree: Tree) -> None:
    """Remove the manifest."""
    tree.remove(PATH)
