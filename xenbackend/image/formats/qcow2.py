"""QCOW2 images, versions 2 and 3, also with their data in an external file.

Must not read the data in clusters, except the last ones of a disk that grows.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xenbackend.block.driver import File
from xenbackend.block.formats import qcow2, qcow2_check
from xenbackend.block.formats.blank import REFCOUNT_ORDER, Blank, Parent, qcow_name
from xenbackend.block.formats.common import Plan, Write
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.block.formats.qcow2_tables import refcount_clusters
from xenbackend.block.qcow.datafile import check_length, find_data, refuse_unchosen
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image import behind, writing
from xenbackend.image.faults import Faults
from xenbackend.image.tools import Tools
from xenbackend.units import SECTOR, format_size, round_up

if TYPE_CHECKING:
    from xenbackend.image.facts import Facts
    from xenbackend.image.names import Image
    from xenbackend.image.session import Session

_SIZE_AT, _SIZE_TO_L1 = 24, struct.Struct(">QIIQ")  # size, encryption, L1 entries, L1 offset


class Qcow2(Tools):
    """See `Tools`."""

    def size(self, file: File) -> int:
        """See `Tools`."""
        return _header(file).size

    def facts(self, driver: Any, base: Facts) -> Facts:
        """See `Tools`."""
        header = _header(driver.file)
        return replace(
            base,
            format=f"QCOW2, version {header.version}",
            cluster_size=header.cluster_size,
            is_dirty=bool(header.incompatible & qcow2.DIRTY),
            is_corrupt=bool(header.incompatible & qcow2.CORRUPT),
            more={"snapshots": str(header.snapshot_count)} if header.snapshot_count else {},
        )

    def refuse_unchosen_data(self, image: Image, file: File) -> None:
        """See `Tools`."""
        header = None if image.data_file else _header(file)
        if header and header.has_data_file:
            refuse_unchosen(image.path, header.data_name)

    def check(self, session: Session, image: Image, file: File) -> Faults:
        """See `Tools`."""
        report = qcow2_check.check(file.read_at, file.size)
        faults = Faults(report.errors + report.is_corrupt, report.leaks, is_dirty=report.is_dirty)
        faults.sentences = report.sentences[:]
        _look_for_data(session, image, file, faults)
        return faults

    def plan_repair(self, image: Image, file: File) -> Plan:  # noqa: ARG002 - for formats that need it
        """See `Tools`."""
        return plan_repair(_checked(file))

    def check_growth(self, file: File) -> None:
        """See `Tools`."""
        if _header(file).has_subclusters:
            raise DriverError(
                "it has subclusters (extended L2 entries), and can only be opened read-only; convert it instead"
            )

    def grow_data(self, data: File, file: File, path: str, size: int) -> None:
        """See `Tools`. What the file has behind the present end of the disk becomes zeros.

        In a raw data file that is everything; otherwise only the rest of the disk's last cluster, since the image does
        not refer to any other cluster there.
        """
        header = _header(file)
        try:
            data.grow(size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            problem = (
                f"its data file {printable(path)} has {format_size(data.size)}, and the device has no room for more"
            )
            raise DriverError(f"{problem}; make it larger first", path=path, errno=errno.ENOSPC) from error
        end = size if header.autoclear & qcow2.RAW_DATA else min(size, round_up(header.size, header.cluster_size))
        for place, cleared in behind.zeros(data.read_at, header.size, end):
            data.write_at(place, cleared)
        data.sync()

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """See `Tools`."""
        header = _header(file)
        if header.snapshot_count and header.version == 2:
            raise DriverError("an image of version 2 that has snapshots cannot grow; convert it instead")
        entries = max(1, -(-size >> header.cluster_bits + header.l2_bits))
        if entries * 8 > qcow2.MAX_L1_BYTES:
            raise ConfigError(f"{format_size(size)} is too much for its clusters; convert it to larger clusters")
        if header.autoclear != header.kept_autoclear:
            writing.write_plan(
                file, [[qcow2.autoclear_bytes(header.kept_autoclear)]]
            )  # bitmaps do not cover the new part
        hidden = behind.behind_qcow2(file, header, size, on_device=on_device)
        writing.write_within(file, hidden, on_device=on_device)
        if entries * 8 <= header.l1.length:
            writing.write_plan(file, [[(_SIZE_AT, struct.pack(">Q", size))]])
        else:
            found = _checked(file)
            place = behind.room_in_qcow2(found, on_device=on_device)
            table = file.read_at(header.l1.offset, header.l1.length).ljust(entries * 8, b"\0")
            moved = _SIZE_TO_L1.pack(size, 0, entries, place)
            writing.write_within(
                file, [*behind.take_room(found, place, table), [(_SIZE_AT, moved)]], on_device=on_device
            )
        if any(hidden) or entries * 8 > header.l1.length:
            writing.write_plan(
                file, plan_repair(_checked(file))
            )  # frees the clusters that were copied, and the former L1 table

    def measure(self, empty: Blank, cluster: int, used: int, most: int) -> tuple[int, int]:  # noqa: ARG002 - as above
        """See `Tools`; clusters are counted as in QEMU's `qcow2_calc_prealloc_size`."""
        per_table = cluster // 8
        l2_tables = -(-most // per_table)
        l1_clusters = -(-l2_tables // per_table)
        clusters = 1 + most + l2_tables + l1_clusters
        full = (clusters + sum(refcount_clusters(clusters, cluster, REFCOUNT_ORDER))) * cluster
        return full - (most - used) * cluster, full

    def check_parent(self, image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:
        """See `Tools`."""
        _parent_writes(file, parent)
        header = _header(file)
        if parent and header.autoclear & qcow2.RAW_DATA:
            problem = "its external data file is a raw disk by itself, which has no parent"
            raise ConfigError(f"{image.text}: {problem}; convert it to an image without one, or make a child of it")
        if header.snapshot_count and not is_unsafe:
            problem = "it has internal snapshots, which have the former parent and would read as the new one does"
            raise ConfigError(f"{image.text}: {problem}; delete them with qemu-img snapshot -d, or use --unsafe")
        self.refuse_unchosen_data(image, file)

    def name_parent(self, file: File, parent: Parent | None) -> None:
        """See `Tools`."""
        header = _header(file)
        if header.autoclear != header.kept_autoclear:
            writing.write_plan(
                file, [[qcow2.autoclear_bytes(header.kept_autoclear)]]
            )  # bitmaps do not cover a change of the parent
        writing.write_plan(file, [[write] for write in _parent_writes(file, parent)])


def _header(file: File) -> qcow2.Header:
    return qcow2.parse_header(file.read_at, file.size)


def _options(image: Image) -> Any:
    return image.chain.layers[0].options


def _checked(file: File) -> qcow2_check.Check:
    found = qcow2_check.Check(file.read_at, file.size)
    found.run()
    return found


def _parent_writes(file: File, parent: Parent | None) -> list[Write]:
    header = _header(file)
    return qcow2.with_parent(file.read_at, header, qcow_name(parent), parent.qemu_format if parent else "")


def _look_for_data(session: Session, image: Image, file: File, faults: Faults) -> None:
    """Check that an external data file exists, may be opened, and is as long as the disk; add errors to `faults`."""
    header, options = _header(file), _options(image)
    if not header.has_data_file:
        return
    try:
        files, chosen = session.opener, options.data_file
        path, _ = find_data(files, image.path, header.data_name, chosen, options.parents, read_only=True)
        data = session.open_file(path, read_only=True, step=SECTOR)
        check_length(path, data.size, header.size)
        session.close(data)
    except OSError as error:
        faults.add_error(str(error))
    except DriverError as error:
        faults.add_error(error.problem)
