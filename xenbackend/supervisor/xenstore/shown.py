"""What `xenstore-ls` shows of one vbd besides its backend directory: our status, and why it does not work.

Must not decide what is shown. Each node is written only when its value changes, since every write wakes watchers.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path
from xenbackend.supervisor.xenstore.store import Store


class Shown:
    """The nodes of one vbd, and what stands in them. Every method raises StoreError."""

    def __init__(self, store: Store, path: VbdPath) -> None:
        self._store = store
        self._home = domain_path(path.backend_domid)
        self._status_path = f"{self._home}/xenbackend/{path}"
        self._error_path = f"{self._home}/error/backend/{path}"
        self._status: dict[str, str] = {}
        self._error: str | None = None  # None: nobody knows what stands there

    def doubt(self) -> None:
        """Write everything anew with the next calls: xenstore was away."""
        self._status, self._error = {}, None

    def error(self, sentence: str) -> None:
        """Show ``error/backend/…/error``, as Linux `xenbus_dev_error` does: errno and a sentence; empty removes it."""
        sentence = sentence[:SENTENCE_MAX]
        if sentence == self._error:
            return
        if sentence:
            self._store.write(f"{self._error_path}/error", f"{errno.EINVAL} {sentence}")
        elif self._error is not None or self._store.directory(self._error_path):
            self._store.prune(self._error_path, self._home)
        self._error = sentence

    def status(self, values: Mapping[str, str]) -> None:
        """Show these values below ``xenbackend/…``."""
        for key, value in values.items():
            if self._status.get(key) != value:
                self._store.write(f"{self._status_path}/{key}", value)
        self._status = dict(values)

    def remove(self) -> None:
        """Remove all of it, with the directories that were made for it."""
        self._store.prune(self._status_path, self._home)
        self._store.prune(self._error_path, self._home)
