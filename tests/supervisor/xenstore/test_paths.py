"""Xenstore's names for a vbd, both ways."""

import pytest

from xenbackend.errors import ConfigError
from xenbackend.supervisor.xenstore.paths import (
    DEVID_END,
    VbdPath,
    devid_to_vdev,
    parse_backend_path,
    parse_domain_directory,
    vdev_to_devid,
)

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
    """A virtual device's name and its number turn into each other as xen-vbd-interface(7) says."""
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
    """Whatever number stands in xenstore, its name is accepted and means the same number."""
    numbers = [*range(0, 60000, 7), *range(202 << 8, 203 << 8), *range(1 << 28, (1 << 28) + 9000), DEVID_END - 1]

    assert numbers == [vdev_to_devid(devid_to_vdev(devid)) for devid in numbers]


@pytest.mark.parametrize(
    "vdev", ["", "xvd", "xvda256", "sdq", "sda16", "hde", "hda64", "xvdA", "xvda01", "vda", "d", "d1p", "-1", "٣",
             "xvda\n", str(DEVID_END), "99999999999", "zz"],
)  # fmt: skip
def test_what_is_no_device_is_refused(vdev: str) -> None:
    """A name outside the interface is refused with a sentence that repeats it."""
    with pytest.raises(ConfigError) as caught:
        vdev_to_devid(vdev)

    assert repr(vdev) in str(caught.value)


def test_a_vbd_knows_its_paths() -> None:
    """A vbd's backend lies under the backend domain, its frontend under the guest."""
    vbd = VbdPath("vbd3", 0, 5, 51712)

    assert vbd.backend == "/local/domain/0/backend/vbd3/5/51712"
    assert vbd.frontend == "/local/domain/5/device/vbd/51712"
    assert str(vbd) == "vbd3/5/51712"


def test_paths_lead_back_to_the_vbd() -> None:
    """A path in a vbd's directory gives the vbd and the rest; a relative one belongs to our own domain."""
    vbd = VbdPath("vbd", 3, 5, 51712)

    assert (vbd, "") == parse_backend_path(vbd.backend, 0)
    assert (vbd, "state") == parse_backend_path(f"{vbd.backend}/state", 0)
    assert (vbd, "a/b") == parse_backend_path("backend/vbd/5/51712/a/b", 3)


@pytest.mark.parametrize(
    "path",
    ["", "backend", "backend/vbd", "backend/vbd/5", "backend/vbd/5/", "backend/vbd/05/1", "backend/vbd/5/xvda",
     "backend/vbd/32752/1", "backend/vbd/5/536870912", "/local/domain/5/device/vbd/51712", "/backend/vbd/5/1",
     "/local/domain/0/backend/vbd/5/-1", "/local/domain/x/backend/vbd/5/1", "backend/vbd/5/1\n",
     "backend/vbd/99999999999/1"],
)  # fmt: skip
def test_paths_of_no_vbd_are_nobodys(path: str) -> None:
    """A path above, beside or misspelt is no vbd's; nothing is guessed."""
    assert parse_backend_path(path, 0) is None


def test_a_number_of_any_length_is_a_sentence() -> None:
    """A device number that Python would refuse to read is refused with a sentence, and a short one."""
    with pytest.raises(ConfigError, match="device numbers end before") as caught:
        vdev_to_devid("1" * 5000)

    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/local/domain/0/backend/vbd/5", ("vbd", 5)),
        ("backend/vbd3/12", ("vbd3", 12)),
        ("/local/domain/0/backend/vbd", None),
        ("/local/domain/0/backend/vbd/5/51712", None),
        ("/local/domain/0/backend/vbd/05", None),
        ("/local/domain/0/backend/vbd/5/", None),
        ("/local/domain/0/backend/VBD/5", None),
    ],
)
def test_a_domains_directory(path: str, expected: tuple[str, int] | None) -> None:
    """Exactly what toolstacks make for the vbds of one domain is one; all else is looked at as a whole."""
    assert expected == parse_domain_directory(path)
