"""Puts another chain in the place of the one that is open, while the guest waits.

Must not know a message of the supervisor: it is told what to do, and calls back.

    hold -> nothing in flight -> nobody else is heard -> flush -> close -> open -> listen again -> let go

A chain that cannot be opened, or that the guest could not go on with, leaves the former one in service. A flush that
fails ends the exchange before anything is closed: the disk is paused as after any failed flush.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from xenbackend.errors import DriverError, XenbackendError
from xenbackend.worker.connection import Connection
from xenbackend.worker.disk import Disk, describe_flush
from xenbackend.worker.holds import Hold


class Exchange:
    """The exchanges of one worker's chain.

    Args:
        disk: whose chain it is.
        listen: lets the worker hear its supervisor, or not: who connects or leaves has to wait for the end.
        go_on: serves through the chain that is open now; called before the hold ends.
        ruin: is called with a sentence where no chain is open any more, and does not return.
    """

    def __init__(
        self, disk: Disk, listen: Callable[[bool], None], go_on: Callable[[], None], ruin: Callable[[str], None]
    ) -> None:
        self._disk = disk
        self._listen = listen
        self._go_on = go_on
        self._ruin = ruin

    def swap(self, text: str, connection: Connection | None, then: Callable[[str], None]) -> None:
        """Serve through another chain; `then` gets nothing, or a sentence where the former one goes on."""
        try:
            if connection is not None and Hold.SWAP in connection.engine.holds:
                raise DriverError("the chain is being exchanged already", errno=errno.EBUSY)
            self._disk.check_successor(text)
        except XenbackendError as problem:
            then(str(problem))
            return

        def begin() -> None:
            self._listen(False)
            self._disk.flush(lambda code: self._put(text, code, connection, then))

        if connection is None:
            begin()
        else:
            connection.engine.hold(Hold.SWAP, begin)

    def _put(self, text: str, code: int, connection: Connection | None, then: Callable[[str], None]) -> None:
        """Close and open; `code` is the errno of the last flush."""
        sentence = ""
        if code:
            sentence = describe_flush(code)
            if connection is not None:
                connection.engine.flush_failed(code)
        else:
            try:
                self._disk.exchange(text)
            except XenbackendError as problem:
                sentence = str(problem)
            except Exception as problem:  # the former chain could not be opened again, or a layer's bug (D8)
                self._ruin(str(problem))
        self._listen(True)
        self._go_on()
        then(sentence)
