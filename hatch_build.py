"""Metadata that a registry shows: README.md, whose links lead to the repository as it was released.

Must not hold an address; `[project.urls]` has it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def long_description(readme: str, source: str, version: str) -> str:
    """Return the text with whole links, to the tag of a version."""
    return _RELATIVE.sub(rf"]({source}/blob/v{version}/\1)", readme)


class LongDescription(MetadataHookInterface):
    """Found by hatchling, as this file has its name."""

    def get_known_classifiers(self) -> list[str]:
        """Return what the hatchling of Debian 12 is too old to know."""
        return ["Programming Language :: Python :: 3.13"]

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the long description."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = long_description(readme, metadata["urls"]["Source"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
