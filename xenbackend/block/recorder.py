"""Writes a record file in service: a buffer, a thread that empties it, and a limit on the file's size.

Must not know what a record means, nor delay a request: records that cannot be written in time are dropped and counted.

The file and the one for its older part, `<path>.1`, are both opened at the beginning, since a worker cannot open files
in service. So it can begin the file anew later: it copies its content to `<path>.1`, and truncates it. Each of them has
at most `limit` bytes.

    add     -> buffer, up to BUFFER_LIMIT bytes; beyond that records are dropped
    write   -> a thread writes the whole buffer: at WRITE_AT bytes, after IDLE_S seconds, and on `close`
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from xenbackend.block import record
from xenbackend.block.driver import Env
from xenbackend.errors import DriverError
from xenbackend.units import format_size

WRITE_AT = 64 * 1024  # bytes
BUFFER_LIMIT = 512 * 1024  # bytes; there are more only if the disk cannot keep up
IDLE_S = 1.0  # the oldest record waits at most so long, which limits what is lost if the worker dies
MIN_LIMIT = 2 * BUFFER_LIMIT  # bytes; so that a full buffer fits into a file that was begun anew
_COPY = 1 << 20  # bytes


class Recorder:
    """An open record file, to which records are appended."""

    def __init__(self, env: Env, path: str, limit: int, session: bytes, wall_ns: Callable[[], int]) -> None:
        """Open the file, or create it with access for its owner only.

        `limit` is in bytes, at least MIN_LIMIT. `session` is the record at the beginning of a file and of this worker's
        part. Raises: DriverError if `path` is not a record file; OSError.
        """
        self.problem = ""  # the last error of the file, for people
        self.recorded = 0  # records written since this worker opened the file
        self._dropped = 0  # records that did not fit into the buffer; counted by the loop
        self._failed = 0  # records that could not be written; protected by the lock
        self._said = 0  # lost records that the file reports; protected by the lock
        self._env = env
        self._limit = limit
        self._session = session
        self._wall_ns = wall_ns
        self._needs_session = True
        self._buffer = bytearray()
        self._pending: list[bytes] = []  # what a thread has been asked to write; `close` may write it first
        self._has_timer = False
        self._lock = threading.Lock()  # held while the file is written to
        self._file, self._size = _open(env, path)
        try:
            self._older, _ = _open(env, f"{path}.1")
        except BaseException:
            os.close(self._file)
            raise

    @property
    def lost(self) -> int:
        """The number of records that are not in the file, and never will be."""
        return self._dropped + self._failed

    def add(self, records: bytes) -> None:
        """Take packed records; they reach the file later, or are counted as lost."""
        buffer = self._buffer
        if len(buffer) + len(records) > BUFFER_LIMIT:
            self._dropped += len(records) // record.SIZE
            return
        buffer += records
        if len(buffer) >= WRITE_AT:
            self._write_soon()
        elif not self._has_timer:
            self._has_timer = True
            self._env.call_later(IDLE_S, self._after_idling)

    def close(self) -> None:
        """Write the buffered records, and close the files. Waits for the thread if it is writing."""
        self._pending.append(bytes(self._buffer))
        self._buffer.clear()
        self._write_pending()
        os.close(self._file)
        os.close(self._older)

    def _after_idling(self) -> None:
        self._has_timer = False
        self._write_soon()

    def _write_soon(self) -> None:
        if self._buffer and not self._pending:
            self._pending.append(bytes(self._buffer))
            self._buffer.clear()
            self._env.run_in_thread(self._write_pending, self._after_writing)

    def _after_writing(self) -> None:
        if len(self._buffer) >= WRITE_AT:
            self._write_soon()

    def _write_pending(self) -> None:
        with self._lock:
            while self._pending:
                if self._pending[0]:
                    self._write(self._pending[0])
                self._pending.pop(0)

    def _write(self, data: bytes) -> None:
        """Append `data` as a whole or not at all. An error of the file is recorded, and does not affect the guest."""
        count = len(data) // record.SIZE
        lost = self.lost
        if lost > self._said:
            data += record.pack_lost(record.Lost(self._wall_ns(), lost - self._said))
        try:
            size = os.fstat(self._file).st_size
            if size < self._size:  # another program has truncated it, such as logrotate: leave no hole
                self._size = size - size % record.SIZE
                self._needs_session = True
            if self._size + record.SIZE + len(data) > self._limit:
                self._begin_anew()
            if self._needs_session:
                data = self._session + data
            _append(self._file, data, self._size)
        except OSError as error:
            self._failed += count
            self.problem = error.strerror or str(error)
        else:
            self._size += len(data)
            self._needs_session = False
            self._said = lost
            self.recorded += count

    def _begin_anew(self) -> None:
        """Move the file's content to the older file; if that fails, drop it, to free its space."""
        os.ftruncate(self._older, 0)
        try:
            at = 0
            while chunk := os.pread(self._file, _COPY, at):
                _append(self._older, chunk, at)
                at += len(chunk)
        except OSError as error:
            self.problem = error.strerror or str(error)
            os.ftruncate(self._older, 0)
        os.ftruncate(self._file, 0)
        self._size = 0
        self._needs_session = True


def _open(env: Env, path: str) -> tuple[int, int]:
    """Return the descriptor of a record file, and its size in bytes without a last record that was cut short."""
    try:
        fd = env.files.open_record(path)
    except DriverError as error:
        error.layer, error.option = "log", "record"
        raise
    try:
        status = os.fstat(fd)
        size = status.st_size - status.st_size % record.SIZE
        if status.st_size and os.pread(fd, len(record.MAGIC), 0) != record.MAGIC:
            problem = f"{path} holds {format_size(status.st_size)} of something other than records; name another file"
            raise DriverError(problem, layer="log", option="record", path=path)
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def _append(fd: int, data: bytes, at: int) -> None:
    """Write all of `data` at `at`, the end of the file; on an error, truncate the file to that. Raises: OSError."""
    view = memoryview(data)
    written = 0
    try:
        while written < len(view):
            written += os.pwrite(fd, view[written:], at + written)
    except OSError:
        os.ftruncate(fd, at)
        raise
