"""What may stand in a guest's configuration for a disk of ours, and what xl and our own front step make of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.xen.tools.command import xenbackend, xl
from tests.xen.tools.disks import blank
from tests.xen.tools.guest import Guest
from tests.xen.tools.service import Service

FORMS = {
    "xvda": "script=block-xenbackend,vdev=xvda,access=rw,target=log:|aio:{}",
    "xvdb": "script=block-xenbackend,vdev=xvdb,access=rw,target=tap2:log:|aio:{}",
    "xvdc": "script=tap2,vdev=xvdc,access=rw,target=tap2:log:|aio:{}",
    "xvdd": "script=block-xenbackend,vdev=xvdd,access=ro,target=log:|aio:{}",
}
LITERAL = "tap2:log:|aio:{},xvda,w"
CONVERTED = "vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:{}"


def test_every_form_is_a_disk(new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service) -> None:
    """Each form is a disk for xl: the guest has the right image behind it, and cannot write where it may not."""
    images = {vdev: blank(on_ext4 / f"{vdev}.raw", 16) for vdev in FORMS}
    guest = new_guest(disks=[form.format(images[vdev]) for vdev, form in FORMS.items()]).create().wait_until_ready()
    chains = {disk["device"]: disk["chain"] for disk in the_service.disks()}
    said = guest.run(
        """
        for disk in xvda xvdb xvdc xvdd; do
            until [ -b /dev/$disk ]; do sleep 0.1; done
            echo "this is $disk" | dd of=/dev/$disk bs=512 conv=sync,fsync 2>&1 | grep -i 'read-only\\|permitted'
        done
        blockdev --getro /dev/xvdc
        blockdev --getro /dev/xvdd
        """
    )

    assert {vdev: form.format(images[vdev]).partition("target=")[2] for vdev, form in FORMS.items()} == chains
    words = {vdev: image.read_bytes()[:12].decode() for vdev, image in images.items()}
    assert {**{vdev: f"this is {vdev}" for vdev in FORMS}, "xvdd": "\0" * 12} == words
    assert ["0", "1"] == said.split("\n")[-3:-1]


def test_plain_xl_refuses_the_literal_line(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """Without our front step the line as blktap2 had it is refused by xl, in its own words, and no guest is made."""
    image = blank(on_ext4 / "disk.raw", 16)
    refused = new_guest(disks=[LITERAL.format(image)]).try_to_create()

    assert (1, True) == (refused.status, "unknown deprecated disk prefix: near `log:'" in refused.err), refused


def test_convert_makes_it_a_line_for_plain_xl(
    new_guest: Callable[..., Guest], on_ext4: Path, the_service: Service
) -> None:
    """`xenbackend convert` changes nothing but the line, and plain xl creates the guest from that."""
    image = blank(on_ext4 / "disk.raw", 16)
    file = on_ext4 / "guest.cfg"
    guest = new_guest(disks=[LITERAL.format(image)])
    file.write_text(guest.configuration)
    converted = xenbackend("convert", file).out
    file.write_text(converted)
    guest.create(paused=True, by=lambda *words, check: xl(*words[:-1], file, check=check))

    assert guest.configuration.replace(LITERAL.format(image), CONVERTED.format(image)) == converted
    assert f"log:|aio:{image}" == the_service.disk(guest.domid, "xvda")["chain"]


def test_a_wrong_literal_line_is_refused_before_xl_runs(new_guest: Callable[..., Guest], on_ext4: Path) -> None:
    """A chain that cannot be is refused by our front step: with the file and the line, before a guest is made."""
    refused = new_guest(disks=["tap2:lgo:|aio:/img,xvda,w"]).try_to_create(by=partial(xenbackend, "xl"))

    assert (2, True) == (refused.status, "lgo" in refused.err and ".cfg:" in refused.err), refused
    assert "libxl" not in refused.err
