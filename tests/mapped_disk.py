"""A mapped disk whose tables are in the test, for the tests of `xenbackend.block.mapped`.

Must not be a format: it does not allocate clusters.
"""

from __future__ import annotations

from array import array
from random import Random

from tests.helpers_block import StepEnv
from tests.recorded import RecordedFile
from xenbackend.block.mapped.disk import MappedDisk
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import Table, Tables
from xenbackend.block.request import Request

CLUSTER = 4096
TABLE = 4  # entries


class Plain(MappedDisk):
    """A disk whose tables take steps to load; special clusters read as `s`, and writes that need clusters are kept."""

    def __init__(self, entries: list[int], *, limit: int = 8, data: RecordedFile | None = None) -> None:
        super().__init__(None)
        self.env = StepEnv()
        self.entries = entries
        self.image = RecordedFile(bytearray(Random(2).randbytes(64 * CLUSTER)))
        self.loading: list[tuple[int, Then]] = []
        self.elsewhere: list[Request] = []
        self.back: list[list[Request]] = []
        self.complete = self.back.append
        size, tables = len(entries) * CLUSTER, Tables[Table](limit)
        self.start(self.image, size, cluster_bits=12, table_bits=2, tables=tables, data=data)

    def load_table(self, number: int, then: Then) -> None:
        """Remember `then`, and read something, so that loading takes a step."""
        self.loading.append((number, then))
        self.io.read_meta(0, 512, lambda status, _: self.loaded(status))

    def loaded(self, status: int) -> None:
        """Fill the table, and go on."""
        number, then = self.loading.pop(0)
        if not status:
            self.tables.put(number, array("Q", self.entries[number * TABLE :][:TABLE]))
        then(status)

    def read_special(self, request: Request) -> None:
        """Give letters."""
        assert request.offset // CLUSTER == (request.offset + request.length - 1) // CLUSTER
        for view in request.iov:
            view[:] = b"s" * len(view)
        self.io.finish(request, 0)

    def write_elsewhere(self, request: Request) -> None:
        """Keep the request."""
        assert request.offset // (CLUSTER * TABLE) == (request.offset + request.length - 1) // (CLUSTER * TABLE)
        self.elsewhere.append(request)

    def step(self) -> bool:
        """Let the files do a step; False if nothing waits."""
        return self.image.step() or (self.io.is_apart and self.io.data.step())

    def do(self, *batch: Request) -> list[int]:
        """Submit a batch and let everything happen."""
        self.submit(list(batch))
        while self.step():
            pass
        assert set(batch) == {request for back in self.back for request in back}
        assert not self.io.pool.lent
        self.back.clear()
        return [request.status for request in batch]


def at(cluster: int) -> int:
    """Return a place in the file, far from where the cluster would be."""
    return (3 + 2 * cluster) * CLUSTER
