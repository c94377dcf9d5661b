"""How people name a disk, and names and numbers of virtual devices in both directions."""

from __future__ import annotations

import pytest

from xenbackend.disks import DEVID_END, devid_to_vdev, disk_of, parse_disk, vdev_to_devid
from xenbackend.errors import ConfigError

NUMBERS = {  # the first four lines: xen-vbd-interface(7)
    "xvda": 51712,
    "xvdb2": 202 << 8 | 1 << 4 | 2,
    "xvdtq37": 1 << 28 | 536 << 8 | 37,
    "hdc2": 22 << 8 | 2,
    "sdb3": 8 << 8 | 1 << 4 | 3,
    "xvdp15": 202 << 8 | 15 << 4 | 15,
    "xvdp16": 1 << 28 | 15 << 8 | 16,
    "xvdq": 1 << 28 | 16 << 8,
    "xvdz": 1 << 28 | 25 << 8,
    "xvdaa": 1 << 28 | 26 << 8,
    "hda": 3 << 8,
    "hdb63": 3 << 8 | 1 << 6 | 63,
    "hdd": 22 << 8 | 1 << 6,
}


@pytest.mark.parametrize(("vdev", "devid"), NUMBERS.items())
def test_device_names_and_numbers_are_those_of_the_interface(vdev: str, devid: int) -> None:
    """A virtual device's name and number are converted as xen-vbd-interface(7) says."""
    assert devid == vdev_to_devid(vdev)
    assert vdev == devid_to_vdev(devid)


@pytest.mark.parametrize(
    ("other", "vdev"), [("d0", "xvda"), ("d0p0", "xvda"), ("d1p2", "xvdb2"), ("d536p37", "xvdtq37"), ("51712", "xvda"),
                        ("/dev/xvda", "xvda")],
)  # fmt: skip
def test_other_spellings_name_the_same_device(other: str, vdev: str) -> None:
    """The d…p… form, a plain number and a path under /dev are other spellings of a name."""
    assert vdev_to_devid(vdev) == vdev_to_devid(other)


def test_every_number_has_a_name_that_leads_back() -> None:
    """Every number that xenstore may contain has a name that is accepted and means the same number."""
    numbers = [*range(0, 60000, 7), *range(202 << 8, 203 << 8), *range(1 << 28, (1 << 28) + 9000), DEVID_END - 1]

    assert numbers == [vdev_to_devid(devid_to_vdev(devid)) for devid in numbers]


@pytest.mark.parametrize(
    "vdev", ["", "xvd", "xvda256", "sdq", "sda16", "hde", "hda64", "xvdA", "xvda01", "vda", "d", "d1p", "-1", "٣",
             "xvda\n", str(DEVID_END), "99999999999", "zz"],
)  # fmt: skip
def test_what_is_no_device_is_refused(vdev: str) -> None:
    """A name outside the interface is refused with a sentence that quotes it."""
    with pytest.raises(ConfigError) as caught:
        vdev_to_devid(vdev)

    assert repr(vdev) in str(caught.value)


def test_a_number_of_any_length_is_a_sentence() -> None:
    """A device number with too many digits for Python's parser is refused with a short sentence."""
    with pytest.raises(ConfigError, match="device numbers end before") as caught:
        vdev_to_devid("1" * 5000)

    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("text", "kind", "domain"),
    [
        ("5/xvda", "", "5"), ("5/51712", "", "5"), ("5/d0", "", "5"), ("5//dev/xvda", "", "5"),
        ("vbd3/5/51712", "vbd3", "5"), ("backend/vbd/5/51712", "vbd", "5"),
        ("/local/domain/0/backend/vbd/5/51712", "vbd", "5"), ("my-guest.1/xvda", "", "my-guest.1"),
        ("vbd/xvda", "", "vbd"), ("7up/xvda", "", "7up"),
    ],
)  # fmt: skip
def test_a_disk_has_one_name_and_several_spellings(text: str, kind: str, domain: str) -> None:
    """In whatever spelling a disk is given, it is shown as domain and device."""
    name = parse_disk(text)

    assert (kind, domain, 51712, f"{domain}/xvda") == (name.kind, name.domain, name.devid, str(name))


@pytest.mark.parametrize("text", ["", "foo", "/xvda", "5/", "5/frob", "5/xvda/", "a/b/c/xvda", "99999999/xvda"])
def test_what_is_no_disk_is_refused(text: str) -> None:
    """A name that cannot be a disk's is refused as the caller's mistake, before a service is asked."""
    with pytest.raises(ConfigError):
        parse_disk(text)


def test_a_name_means_one_disk() -> None:
    """A number means a domain, even if a guest has it as its name; a name means its domain; a kind must match."""
    vbd = ("vbd", 5, 51712)

    assert parse_disk("5/xvda").means(*vbd, guest="mail")
    assert parse_disk("mail/xvda").means(*vbd, guest="mail")
    assert not parse_disk("mail/xvda").means(*vbd)
    assert not parse_disk("6/xvda").means(*vbd, guest="6")
    assert not parse_disk("vbd3/5/xvda").means(*vbd, guest="mail")
    assert not parse_disk("5/xvdb").means(*vbd)
    assert "5/xvda" == disk_of(5, 51712)
