"""What the supervisor is told about an open layer.

Must not have a layer do anything: its geometry, the facts that it reported and the names of its figures are all.
"""

from __future__ import annotations

from itertools import islice
from typing import cast

from xenbackend.block.chain import OpenLayer
from xenbackend.counters import MOST_FIGURES
from xenbackend.protocol import messages
from xenbackend.worker.env import WorkerEnv


def facts_of(layer: OpenLayer) -> messages.LayerFacts:
    """Return what is known of an open layer, as far as a message has room for it."""
    geometry = layer.geometry
    return messages.LayerFacts(
        text=layer.text,
        size=geometry.size,
        sector_size=geometry.sector_size,
        read_only=geometry.read_only,
        can_flush=geometry.can_flush,
        can_discard=geometry.can_discard,
        discard_granularity=geometry.discard_granularity,
        discard_alignment=geometry.discard_alignment,
        physical_sector_size=geometry.physical_sector_size,
        parent_of=layer.parent_of,
        facts=dict(islice(cast("WorkerEnv", layer.driver.env).facts.items(), messages.MAX_FACTS)),
        figures=list(islice(layer.driver.figures(), MOST_FIGURES)),  # others have no room in the counters' page
    )
