"""Writes the tables of states and phases into ARCHITECTURE.md; run `python -m tests.tools.diagrams` when they changed.

Must not write anything but what stands between the markers.
"""

from __future__ import annotations

import re
from pathlib import Path

from xenbackend.blkif import handshake
from xenbackend.supervisor.vbd import phase

PAGE = Path(__file__).parent.parent.parent / "ARCHITECTURE.md"
DIAGRAMS = {"states": handshake.diagram, "phases": phase.diagram}


def with_diagrams(text: str) -> str:
    """Return a page with each table between its markers, as the code has it."""
    for name, diagram in DIAGRAMS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        text = re.sub(f"{begin}.*?{end}", f"{begin}\n```\n{diagram()}\n```\n\n{end}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_diagrams(PAGE.read_text()))
