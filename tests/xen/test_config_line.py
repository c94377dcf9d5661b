"""What a guest's configuration may say for a disk of ours, and what xl and our own front step make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, xenbackend, xl
from tests.xen.tools.disks import KIND, XEN, backend, blank
from tests.xen.tools.guest import Guest
from tests.xen.tools.service import Service

TARGETS = {
    "xvda": "vdev=xvda,access=rw,target=log:|aio:{}",
    "xvdb": "vdev=xvdb,access=rw,target=tap2:log:|aio:{}",
    "xvdc": "vdev=xvdc,access=ro,target=log:|aio:{}",
}
FORMS = {  # form -> the words before the target, and the kind of the disks
    "script": ("script=block-xenbackend", "vbd"),
    "alias": ("script=tap2", "vbd"),
    "tap": ("backendtype=tap,script=block-xenbackend", "vbd3"),
}
NUMBERS = {"xvda": 51712, "xvdb": 51728, "xvdc": 51744}
LITERAL = "tap2:log:|aio:{},xvda,w"
CONVERTED = {
    "vbd": "vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:{}",
    "vbd3": "vdev=xvda,access=rw,backendtype=tap,script=block-xenbackend,target=log:|aio:{}",
}[KIND]
SHIM = Path("/usr/local/sbin/xl")
AUTO = Path("/etc/xen/auto")
XENDOMAINS = Path("/etc/init.d/xendomains")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_disk(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service, form: str) -> None:
    """In every form of the line the guest gets the right image, and cannot write to a read-only disk."""
    words, kind = FORMS[form]
    if kind == "vbd3" != KIND:
        pytest.skip(f"xl of Xen {XEN[0]}.{XEN[1]} knows no such disks")
    images = {vdev: blank(on_ext4 / f"{vdev}.raw", 16) for vdev in TARGETS}
    disks = [f"{words},{target.format(images[vdev])}" for vdev, target in TARGETS.items()]
    guest = new_guest(disks=disks).create().wait_until_ready()
    chains = {disk["device"]: disk["chain"] for disk in the_service.disks()}
    said = guest.run(
        """
        for disk in xvda xvdb xvdc; do
            until [ -b /dev/$disk ]; do sleep 0.1; done
            echo "this is $disk" | dd of=/dev/$disk bs=512 conv=sync,fsync 2>&1 | grep -i 'read-only\\|permitted'
        done
        blockdev --getro /dev/xvdb
        blockdev --getro /dev/xvdc
        """
    )

    assert {vdev: each.format(images[vdev]).partition("target=")[2] for vdev, each in TARGETS.items()} == chains
    written = {vdev: image.read_bytes()[:12].decode() for vdev, image in images.items()}
    assert {"xvda": "this is xvda", "xvdb": "this is xvdb", "xvdc": "\0" * 12} == written
    assert ["0", "1"] == said.split("\n")[-3:-1]
    states = {vdev: xenstore.read(f"{backend(guest.domid, NUMBERS[vdev], kind=kind)}/state") for vdev in TARGETS}
    assert dict.fromkeys(TARGETS, "4") == states


def test_xl_before_4_19_refuses_the_kind(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """An xl before 4.19 refuses `backendtype=tap` with a reason, and creates no guest."""
    if KIND == "vbd3":
        pytest.skip("this xl knows it")
    words, _ = FORMS["tap"]
    refused = new_guest(disks=[f"{words},{TARGETS['xvda'].format(blank(on_ext4 / 'a.raw', 16))}"]).try_to_create()

    assert (True, True) == (refused.status != 0, "no suitable backend for disk xvda" in refused.err), refused


def test_plain_xl_refuses_the_literal_line(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """Without our front step xl refuses blktap2's line in its own words, and creates no guest."""
    image = blank(on_ext4 / "disk.raw", 16)
    refused = new_guest(disks=[LITERAL.format(image)]).try_to_create()

    assert (1, True) == (refused.status, "unknown deprecated disk prefix: near `log:'" in refused.err), refused


def test_convert_makes_it_a_line_for_plain_xl(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service
) -> None:
    """`xenbackend convert` changes only the line, and plain xl creates the guest from the result."""
    image = blank(on_ext4 / "disk.raw", 16)
    file = on_ext4 / "guest.cfg"
    guest = new_guest(disks=[LITERAL.format(image)])
    file.write_text(guest.configuration)
    converted = xenbackend("convert", file).out
    file.write_text(converted)
    guest.create(paused=True, by=lambda *words, check: xl(*words[:-1], file, check=check))

    assert guest.configuration.replace(LITERAL.format(image), CONVERTED.format(image)) == converted
    assert f"log:|aio:{image}" == the_service.disk(guest.domid, "xvda")["chain"]


@pytest.fixture
def shim() -> Iterator[None]:
    """Install the shim for the test, so that plain xl accepts blktap2's line."""
    xenbackend("install", "--shim")
    yield
    xenbackend("install", "--no-shim")
    assert not SHIM.exists()


def test_the_shim_understands_the_literal_line(
    shim: None, new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service
) -> None:
    """With the shim `xl create`, `xl block-attach` and xendomains, which starts guests at boot, accept that line."""
    image, other = blank(on_ext4 / "disk.raw", 16), blank(on_ext4 / "other.raw", 16)
    guest = new_guest(disks=[LITERAL.format(image)])
    for start in (guest.create, lambda: by_xendomains(guest)):
        start()
        guest.wait_until_ready()
        xl("block-attach", guest.domid, f"tap2:log:|aio:{other},xvdb,w")
        guest.run("for disk in xvda xvdb; do until [ -b /dev/$disk ]; do sleep 0.1; done; done")
        chains = {disk["device"]: disk["chain"] for disk in the_service.disks()}
        guest.destroy()
        guest.wait_until_gone()

        assert {"xvda": f"log:|aio:{image}", "xvdb": f"log:|aio:{other}"} == chains


def by_xendomains(guest: Guest) -> None:
    """Start a guest as xendomains starts those of /etc/xen/auto.

    A copy of the script is used: the bed masks its unit, so under its own name it would do nothing.
    """
    file, script = AUTO / "guest.cfg", Path("/run/start-domains")
    AUTO.mkdir(exist_ok=True)
    file.write_text(guest.configuration)
    script.write_bytes(XENDOMAINS.read_bytes())
    try:
        run("bash", script, "start")
    finally:
        script.unlink()
        file.unlink()
        Path("/var/lock/subsys/xendomains").unlink(missing_ok=True)
    guest.look_up()


def test_a_wrong_literal_line_is_refused_before_xl_runs(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """Our front step refuses an invalid chain with file and line, before a guest is created."""
    refused = new_guest(disks=["tap2:lgo:|aio:/img,xvda,w"]).try_to_create(by=partial(xenbackend, "xl"))

    assert (2, True) == (refused.status, "lgo" in refused.err and ".cfg:" in refused.err), refused
    assert "libxl" not in refused.err
