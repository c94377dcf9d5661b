"""What a mapped disk sends: gathered in lists until the outermost call ends, so that batches form by themselves.

Must not decide where a request goes. Nothing is submitted in the middle of a decision, and no callback runs inside
another one's loop.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from xenbackend.block.driver import Driver, File
from xenbackend.block.mapped.shared import Then
from xenbackend.block.request import Request


class Sending(Driver):
    """The base of `files.FileIO`: `_to_file`, `_to_tables`, `_to_parent` and `_finished` are what `_send` sends."""

    file: File  # the image
    data: File  # what has the clusters: the image, or a file beside it

    def _begin_sending(self) -> None:
        self._to_file: list[Request] = []
        self._to_tables: list[Request] = []  # of an image whose clusters are in another file
        self._to_parent: list[Request] = []
        self._finished: list[Request] = []
        self._soon: list[Callable[[], None]] = []
        self._is_sending = False

    def soon(self, call: Callable[[], None]) -> None:
        """Call when everything that is there to be sent has been sent, before the outermost call ends."""
        self._soon.append(call)

    def in_thread(self, function: Callable[[], None], then: Then) -> None:
        """Do something that blocks, in a thread; an OSError is its status."""
        result = [0]

        def run() -> None:
            try:
                function()
            except OSError as error:
                result[0] = error.errno or errno.EIO

        def finish() -> None:
            then(result[0])
            self._send()

        self.env.run_in_thread(run, finish)

    def _send(self) -> None:
        """Send what has gathered, until nothing is left; whoever is inside this already does it."""
        if self._is_sending:
            return
        self._is_sending = True
        try:
            while self._send_one():
                pass
        finally:
            self._is_sending = False

    def _send_one(self) -> bool:
        if self._to_file:
            batch, self._to_file = self._to_file, []
            self.data.submit(batch)
        elif self._to_tables:
            batch, self._to_tables = self._to_tables, []
            self.file.submit(batch)
        elif self._to_parent:
            batch, self._to_parent = self._to_parent, []
            self.next.submit(batch)  # type: ignore[union-attr]  # whoever knows its size has been given it
        elif self._finished:
            batch, self._finished = self._finished, []
            self.complete(batch)
        elif self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                call()
        else:
            return False
        return True
