"""Says where the completions of each layer go: to the next layer above that wants to see them.

Must not know a chain: a part of one that is still being opened is wired in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from xenbackend.block.driver import Complete, Driver


def wire_up(drivers: Iterable[Driver], complete: Complete, guard: Callable[[Complete], Complete] | None = None) -> None:
    """Give the completions of the first driver, which is the top, to `complete`, and those of the others upward.

    Args:
        drivers: from the top down.
        complete: gets what the top gives back.
        guard: wraps the `on_complete` of each layer that has one.
    """
    for driver in drivers:
        driver.complete = complete
        if (seen := driver.on_complete) is not None:
            complete = guard(seen) if guard else seen
