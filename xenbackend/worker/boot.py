"""The disk as a device model has it, from which a guest boots before its own driver runs: begun, and ended.

Must not speak NBD: `export` does, and is loaded only for guests that boot this way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbackend.block.chain import Chain
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.channel import Channel
from xenbackend.worker.files import HostFiles

if TYPE_CHECKING:
    from xenbackend.worker.export import Export

Call = Callable[[], None]


class Boot:
    """The export of one worker's chain; `path` is its socket while it is open.

    Args:
        reactor: the worker's loop.
        channel: hears of a guest's mistakes, and of what goes wrong.
        flush: makes everything durable that was acknowledged, then calls its argument.
        on_bug: gets what layers let out (D8).
    """

    def __init__(
        self, reactor: Reactor, channel: Channel, flush: Callable[[Call], None], on_bug: Callable[[Exception], None]
    ) -> None:
        self.path = ""
        self.had_bugs = False
        self._reactor = reactor
        self._speech = channel
        self._flush = flush
        self._on_bug = on_bug
        self._export: Export | None = None
        self._when_over: list[Call] = []

    def begin(self, path: str, chain: Chain, files: HostFiles) -> None:
        """Offer the disk at `path`; without it the guest can still use the disk by its own driver."""
        from xenbackend.worker.export import Export  # late: most workers never need it

        try:
            self._export = Export(
                path,
                chain,
                self._reactor,
                kick=files.kick,
                complain=self._speech.complain,
                alarm=self._speech.alarm,
                on_bug=self._on_bug,
            )
            self.path = path
        except OSError as error:
            self._speech.alarm(f"{path}: no device model can boot from this disk: {error.strerror or error}")

    def end(self, then: Call) -> None:
        """Call `then` once nobody but the worker is above the chain (D10); the order of calls is kept."""
        if self._export is None:
            then()
            return
        self._when_over.append(then)
        if len(self._when_over) == 1:  # else it is on its way already
            # The device model's own last flush finds nobody any more, so it is ours to do.
            self._export.close(lambda: self._flush(self._over))

    def _over(self) -> None:
        assert self._export is not None  # noqa: S101 - it was asked to end
        self.had_bugs |= self._export.had_bugs
        self._export, self.path = None, ""
        calls, self._when_over = self._when_over, []
        for call in calls:
            call()
