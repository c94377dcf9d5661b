"""One run: a world, so many orders, and the result."""

from __future__ import annotations

import random
import traceback
from contextlib import nullcontext
from pathlib import Path

from tests.model import wrong
from tests.model.world import World, Wrong


def do_one(directory: Path, seed: int, run: int, orders: int, change: str = "") -> tuple[dict[str, int], list[str]]:
    """Return how often each thing happened, and what was wrong."""
    random.seed(seed * 1_000_003 + run)  # for the product's own choices
    world = World(directory, seed * 1_000_003 + run)
    try:
        with wrong.made(change) if change else nullcontext():
            world.run(orders)
    except Wrong:
        pass
    except Exception:
        world.faults.append(f"step {world.steps}: {traceback.format_exc()}")
    world.notes["orders"] = world.orders
    world.notes["steps"] = world.steps
    world.notes["answers to guests"] = world.answered
    return dict(world.notes), [fault.replace(str(directory), "") for fault in world.faults]
