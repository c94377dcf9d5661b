"""QCOW images of version 1, which have no other metadata than their tables.

Must not read the data in clusters, except the last ones of a disk that grows.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xenbackend.block.driver import File
from xenbackend.block.formats import qcow, qcow2
from xenbackend.block.formats.blank import Blank, qcow_l2_bits
from xenbackend.block.formats.common import Plan
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import ConfigError
from xenbackend.image import behind, qcow_check, writing
from xenbackend.image.faults import Faults
from xenbackend.image.tools import Tools
from xenbackend.units import PAGE, SECTOR, format_size, round_up

if TYPE_CHECKING:
    from xenbackend.image.facts import Facts
    from xenbackend.image.names import Image
    from xenbackend.image.session import Session

_SIZE_AT, _L1_AT = 24, 40


class Qcow(Tools):
    """See `Tools`."""

    def size(self, file: File) -> int:
        """See `Tools`."""
        return _header(file).size

    def facts(self, driver: Any, base: Facts) -> Facts:
        """See `Tools`."""
        return replace(base, format="QCOW, version 1", cluster_size=_header(driver.file).cluster_size)

    def check(self, session: Session, image: Image, file: File) -> Faults:  # noqa: ARG002 - only the file is needed
        """See `Tools`."""
        return qcow_check.check(file.read_at, file.size)

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """See `Tools`."""
        header = _header(file)
        length = -(-size >> header.cluster_bits + header.l2_bits) * 8
        if length > qcow2.MAX_L1_BYTES:
            raise ConfigError(f"{format_size(size)} is too much for its clusters; convert it to qcow2")
        step = max(header.cluster_size, PAGE)
        end = qcow_check.used_end(file.read_at, file.size) if on_device else file.size
        hidden = behind.behind_qcow(file, header, size, room := round_up(end, step))
        writing.write_within(file, hidden, on_device=on_device)
        if any(offset == room for writes in hidden for offset, _ in writes):
            room += step
        start = bytearray(file.read_at(0, SECTOR).ljust(SECTOR, b"\0"))
        struct.pack_into(">Q", start, _SIZE_AT, size)
        plan: Plan = []
        if length > header.l1.length:
            plan.append([(room, file.read_at(header.l1.offset, header.l1.length).ljust(length, b"\0"))])
            struct.pack_into(">Q", start, _L1_AT, room)
        writing.write_within(file, [*plan, [(0, bytes(start))]], on_device=on_device)

    def measure(self, empty: Blank, cluster: int, used: int, most: int) -> tuple[int, int]:
        """See `Tools`."""
        step = FORMATS["qcow"].step
        table = 8 << qcow_l2_bits(cluster)  # bytes
        tables = -(-most // (table // 8))
        front = round_up(empty.size, step) + tables * round_up(table, cluster)
        return round_up(front + used * cluster, step), round_up(front + most * cluster, step)


def _header(file: File) -> qcow.Header:
    return qcow.parse_header(file.read_at, file.size)
