"""The path of completions through the layers."""

from __future__ import annotations

from tests.helpers_block import Bottom, flush
from xenbackend.block.driver import Filter
from xenbackend.block.request import Request
from xenbackend.block.wiring import wire_up


class Sees(Filter):
    """A filter that handles completions."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[Request] = []

    def on_complete(self, batch: list[Request]) -> None:
        """Pass completions on."""
        self.seen += batch
        self.complete(batch)


def test_a_completion_goes_to_the_next_layer_that_sees_it() -> None:
    """A completion goes to the next layer that handles completions, and finally to the caller. Steps can be wrapped."""
    top, between, lower, bottom = Sees(), Filter(None), Sees(), Bottom()
    back: list[Request] = []
    guarded: list[object] = []
    wire_up([top, between, lower, bottom], back.extend)
    bottom.complete([request := flush()])
    assert [request] == top.seen == lower.seen == back

    def guard(seen):
        guarded.append(seen)
        return seen

    wire_up([top, between, lower, bottom], back.extend, guard)
    assert [top.on_complete, lower.on_complete] == guarded
    assert (between.complete, bottom.complete) == (top.on_complete, lower.on_complete)
