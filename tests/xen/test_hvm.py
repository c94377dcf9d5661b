"""An HVM guest whose firmware and boot sector use the disk only as a device model emulates it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.xen.tools import xenstore
from tests.xen.tools.command import until, xl
from tests.xen.tools.disks import KIND, backend, line
from tests.xen.tools.guest import Guest
from tests.xen.tools.service import Service

SECTOR = 512
FIRST, SECOND = 100, 200  # sectors
MARKER = b"This is sector 100.\n"
SOCKETS = Path("/run/xenbackend/nbd")
EXPORT = {"vbd": "nbd+unix:///?socket={}", "vbd3": "{}"}[KIND]  # from 4.19 on libxl makes QEMU's URL from it
BOOT_SECTOR = bytes.fromhex(
    "31c0 8ed8 8ed0 bc007c"  # ds = ss = 0, sp = 0x7c00
    "be3e7c c606467c64 b442 cd13 7224"  # again: read sector 100 as the packet says (int 0x13, ah = 0x42), or stop
    "c606467cc8 b80043 cd13 7218"  # write it to sector 200 (ah = 0x43), or stop
    "52 be0080"  # print what was read, to its end of line:
    "bafd03 ec a820 74fb"  # until the serial port is free
    "baf803 ac ee 3c0a 75ef"  # one character more
    "5a ebce"  # again
    "f4 ebfd"  # stop
    "1000 0100 0080 0000 6400000000000000"  # the packet: its size, one sector, to 0:0x8000, from this sector
).ljust(510, b"\0") + bytes.fromhex("55aa")


def bootable(file: Path) -> Path:
    """Make an image that copies its sector 100 to sector 200 and prints it on the serial port, again and again."""
    image = bytearray(1 << 20)
    image[:SECTOR] = BOOT_SECTOR
    image[FIRST * SECTOR : FIRST * SECTOR + len(MARKER)] = MARKER
    file.write_bytes(image)
    return file


def test_boot(new_guest: Callable[..., Guest], on_ext4: Path, on_tmpfs: Path, the_service: Service) -> None:
    """SeaBIOS boots from our disk, reads and writes sectors, and goes on after `xl save` and `xl restore`; xl lists the
    disk and removes it at once.

    Until the guest has a driver of its own, its device model uses a socket, which is removed with the guest.
    """
    image, serial, file = bootable(on_ext4 / "boot.raw"), on_ext4 / "serial.txt", on_tmpfs / "saved"
    guest = new_guest(
        kind="hvm",
        kernel=None,
        ramdisk=None,
        memory_mib=64,
        disks=[line(f"log:|aio:{image}", "hda")],
        extra=f'serial = "file:{serial}"\nvnc = 0',
    )
    guest.create()
    wait_for_marker(serial)
    assert export_of(guest) == [EXPORT.format(each) for each in SOCKETS.iterdir()]
    listed = xl("block-list", guest.domid).out.splitlines()[1:]
    assert [["768", "0", str(guest.domid), "1"]] == [each.split()[:4] for each in listed]

    xl("save", guest.domid, file)
    until("the service has let go", lambda: not the_service.disks())
    assert ([], MARKER) == (list(SOCKETS.iterdir()), image.read_bytes()[SECOND * SECTOR :][: len(MARKER)])
    serial.unlink()
    xl("restore", file)
    guest.look_up()
    wait_for_marker(serial)
    assert export_of(guest) == [EXPORT.format(each) for each in SOCKETS.iterdir()]

    destroyed = xl("destroy", guest.domid)
    until("the service has let go", lambda: not the_service.disks())
    assert [] == list(SOCKETS.iterdir())
    assert (destroyed.has_waited, "") == (False, destroyed.err), destroyed


def wait_for_marker(serial: Path) -> None:
    """Return when the guest has read from its disk and written to it."""
    until("the marker is on the serial port", lambda: serial.exists() and MARKER in serial.read_bytes())


def export_of(guest: Guest) -> list[str | None]:
    """Return the address that a toolstack gives to the device model."""
    return [xenstore.read(f"{backend(guest.domid, 768)}/physical-device-path")]
