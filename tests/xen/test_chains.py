"""Chains as a guest's disk on a real Xen, whose workers are killed while the guest writes and verifies.

At the end what the guest reads is compared with the server's image, device mapper, or a template.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.tools.command import run, until, xenbackend
from tests.xen.tools.disks import blank
from tests.xen.tools.guest import Guest
from tests.xen.tools.kills import complaints, deaths
from tests.xen.tools.load import SIZE_MIB, Load
from tests.xen.tools.servers import KINDS, nbd_server
from tests.xen.tools.service import Service, attached

DISK_MIB = 16
KILLS = 10


@contextmanager
def survived(guest: Guest, service: Service, chain: str, *, sector_size: int = 512) -> Iterator[None]:
    """Attach a chain as xvdb and kill its workers while fio verifies; neither guest nor fio may see an error."""
    since = len(guest.log)
    with attached(guest.domid, "xvdb", chain, "--wait"):
        load = Load(guest, "xvdb", sector_size=sector_size)
        for _ in deaths(load, service, KILLS):
            pass
        load.wait_until_it_writes(service)
        load.stop()
        disk = service.disk(guest.domid, "xvdb")

        assert [] == complaints(guest, since)
        assert (KILLS, 0) == (disk["restarts"], disk["counters"]["errors"])
        yield


def figures(guest: Guest, service: Service) -> dict[str, int]:
    """Return the figures of xvdb's layers since the last worker opened them."""
    layers = service.disk(guest.domid, "xvdb")["layers"]
    return {name: number for layer in layers for name, number in layer["figures"].items()}


def seen(guest: Guest, *, without_mib: int = 0) -> str:
    """Return the digest of what the guest reads of xvdb from an offset on, past its page cache."""
    return guest.run(f"dd if=/dev/xvdb bs=1M skip={without_mib} iflag=direct 2>/dev/null | sha256sum").split()[0]


def digest(file: Path, *, without_mib: int = 0) -> str:
    """Return the digest of a file or device here, from the same offset on."""
    return hashlib.sha256(file.read_bytes()[without_mib << 20 :]).hexdigest()


@contextmanager
def opened_by_cryptsetup(image: Path, key: Path) -> Iterator[Path]:
    """Let device mapper decrypt an image as a read-only device, while the block lasts."""
    run("cryptsetup", "open", "--readonly", f"--key-file={key}", image, "theirs")
    try:
        yield Path("/dev/mapper/theirs")
    finally:
        run("cryptsetup", "close", "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_nbd(linux: Guest, on_ext4: Path, the_service: Service, kind: str) -> None:
    """The image of an NBD server is what the guest reads: no write of a dead worker came late."""
    image = blank(on_ext4 / "disk.raw", DISK_MIB)
    with nbd_server(kind, image) as layer:
        with survived(linux, the_service, f"log:|{layer}"):
            read = seen(linux)

        assert read == digest(image)


def test_throttle_cow_qcow2(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """A throw-away disk with a limit: where the guest has not written it reads the template, which is unchanged."""
    raw, template = on_ext4 / "template.raw", on_ext4 / "template.qcow2"
    raw.write_bytes(os.urandom(DISK_MIB << 20))
    xenbackend("image", "convert", "--quiet", f"aio:{raw}", f"qcow2:{template}")
    before = digest(template)
    with survived(linux, the_service, f"throttle:iops=100,bps=2M|cow:|qcow2:{template}"):
        until("requests were held back", lambda: figures(linux, the_service)["held"])
        written, rest = seen(linux), seen(linux, without_mib=SIZE_MIB)

    assert (before, digest(raw, without_mib=SIZE_MIB)) == (digest(template), rest)
    assert written != digest(raw)


def test_luks(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """In a volume that cryptsetup has made, device mapper reads what the guest wrote."""
    key, image = on_ext4 / "key", blank(on_ext4 / "disk.luks", 16 + DISK_MIB)  # the header takes 16 MiB
    key.touch(0o600)
    key.write_text("a secret")
    cheap = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
    run("cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--sector-size=4096", *cheap, image, key)
    with survived(linux, the_service, f"luks:key={key}|aio:{image}", sector_size=4096):
        read = seen(linux)
    with opened_by_cryptsetup(image, key) as theirs:
        assert read == digest(theirs)


def test_cache_that_writes_back(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """Writes are answered once a faster file has them; image and file together are what the guest reads."""
    image, copy = blank(on_ext4 / "disk.raw", DISK_MIB), on_ext4 / "copy.raw"
    chain = f"cache:{on_ext4 / 'cache'},size=8M,mode=writeback|aio:{image}"
    with survived(linux, the_service, chain):
        until("blocks have gone below", lambda: figures(linux, the_service)["destaged"])
        read = seen(linux)
    xenbackend("image", "convert", "--quiet", chain, f"aio:{copy}")

    assert read == digest(copy)
