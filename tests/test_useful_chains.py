"""The chains that README.md's table recommends do what their rows say."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, content, flush, read, write
from tests.luks_images import Made, key_file, luks2
from tests.pages import readme_chains
from tests.partition_tables import gpt
from tests.qemu import qemu_img
from xenbackend.block.order import remarks
from xenbackend.block.spec import parse_chain

MEANT = (
    "throttle:",
    "cow:",
    "cow:|",
    "checksum:",
    "cache:",
    "luks:",
    "partition:",
    "log:|throttle:",
    "fault:",
)  # the beginnings of the chains that are tested here


@pytest.fixture
def at(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that finds a chain by its beginning and puts it on files of 8 MiB.

    They hold random bytes and a partition table.
    """
    disk = gpt(8 << 20, {1: (2048, 4095), 2: (4096, 8191)})
    disk[1 << 20 : 7 << 20] = Random(1).randbytes(6 << 20)
    for name in ("guest.raw", "template.raw", "vm.raw"):
        (tmp_path / name).write_bytes(disk)
    qemu_img("convert", "-O", "qcow2", tmp_path / "vm.raw", tmp_path / "vm.qcow2")

    def chain(begin: str) -> str:
        """Return that chain."""
        return next(each for each in readme_chains() if each.startswith(begin)).replace("/img/", f"{tmp_path}/")

    return chain


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


def test_a_guest_leaves_some_of_the_disk(machine: Machine, at: Callable[[str], str]) -> None:
    """`throttle` lets 500 requests a second pass, after a burst of 50."""
    chain = machine.open(at("throttle:"))
    began = machine.reactor.now()
    assert [0] * 120 == machine.do(chain, *(read(place * 4096, 4096) for place in range(120)))
    took = machine.reactor.now() - began
    chain.close()

    assert took > 0.13


def test_many_guests_start_from_one_image(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """A `cow` leaves its image unchanged, and a second guest can use the image at the same time."""
    before = (tmp_path / "template.raw").read_bytes()
    one, two = machine.open(at("cow:")), machine.open(at("cow:").replace("1.cow", "2.cow"))
    first = read(0, 512)
    assert [0, 0] == machine.do(one, write(0, b"1" * 512), flush())
    assert [0] == machine.do(two, first)
    one.close()
    two.close()

    assert before[:512] == content(first)
    assert b"1" * 512 + before[512:] == machine.contents(at("cow:"))
    assert before == (tmp_path / "template.raw").read_bytes()


def test_a_disk_to_throw_away(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """Without a file, `cow` keeps what was written while the disk is open, and makes no other file."""
    (tmp_path / "vm.qcow2").rename(tmp_path / "template.qcow2")
    before, names = machine.contents(at("cow:|")), sorted(tmp_path.iterdir())
    chain = machine.open(at("cow:|"))
    assert [0] == machine.do(chain, write(4096, b"x" * 512))
    assert b"x" * 512 == machine.everything(chain)[4096:4608]
    chain.close()

    assert before == machine.contents(at("cow:|"))
    assert names == sorted(tmp_path.iterdir())


def test_a_slow_disk_is_read_once(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """A second read comes from the cache."""
    text = at("cache:").replace("/ssd/", f"{tmp_path}/").replace("/mnt/nfs/", f"{tmp_path}/")
    chain = machine.open(text)
    give_up = machine.reactor.now() + 10
    while chain.layers[0].driver.figures()["hits"] < 3:
        found = read(1 << 20, 4096)
        assert [0] == machine.do(chain, found)
        assert (tmp_path / "guest.raw").read_bytes()[1 << 20 : (1 << 20) + 4096] == content(found)
        assert machine.reactor.now() < give_up
    chain.close()


def test_a_medium_that_gives_back_other_data(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """One changed bit is an error for its block and for no other."""
    chain_text = at("checksum:").replace("/srv/sums/", f"{tmp_path}/")
    chain = machine.open(chain_text)
    machine.everything(chain)
    with (tmp_path / "guest.raw").open("r+b") as file:
        file.seek(5 << 20)
        byte = file.read(1)[0]
        file.seek(5 << 20)
        file.write(bytes([byte ^ 1]))

    assert [errno.EILSEQ, 0] == machine.do(chain, read(5 << 20, 512), read((5 << 20) + 4096, 512))
    chain.close()


def test_who_takes_the_medium_away_reads_nothing(
    machine: Machine, at: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest writes is readable with the passphrase, and not in the image."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "guest.luks").write_bytes(luks2(Made(bytes(1 << 20))))
    chain = machine.open(at("luks:").replace("credential:guest", f"{key_file(tmp_path / 'guest')}"))
    assert [0, 0] == machine.do(chain, write(4096, b"what nobody is to read".ljust(4096)), flush())
    chain.close()
    assert b"nobody" not in (tmp_path / "guest.luks").read_bytes()

    assert machine.contents(at("luks:"))[4096:].startswith(b"what nobody is to read ")


def test_a_partition_is_a_disk(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """The chain is the second partition of the disk in the QCOW2 image."""
    assert (tmp_path / "vm.raw").read_bytes()[2 << 20 : 4 << 20] == machine.contents(at("partition:"))


def test_a_disk_is_copied_while_it_is_written(machine: Machine, at: Callable[[str], str]) -> None:
    """`log` reports what was written since the last look, and no more."""
    chain = machine.open(at("log:|throttle:"))
    assert [0, 0] == machine.do(chain, write(4096, bytes(8192)), write(1 << 20, bytes(512)))
    *ranges, more = chain.control("log", "get", []).decode().splitlines()
    assert ["8 16", "2048 1"] == ranges
    assert b"end\n" == chain.control("log", "get", [more.removeprefix("more ")])
    chain.close()


def test_a_guest_meets_errors_and_its_image_none(machine: Machine, at: Callable[[str], str], tmp_path: Path) -> None:
    """`fault` fails one write in a hundred, and the image stays unchanged."""
    before = (tmp_path / "guest.raw").read_bytes()
    chain = machine.open(at("fault:"))
    statuses = machine.do(chain, *(write(place * 512, bytes(512)) for place in range(300)))
    chain.close()

    assert [errno.EIO] * 3 == [status for status in statuses if status]
    assert before == (tmp_path / "guest.raw").read_bytes()


def test_no_order_makes_no_sense() -> None:
    """`check` has no remark on the order of any chain, and the chains tested here are in the table."""
    for text in readme_chains():
        assert [] == remarks([layer.driver.name for layer in parse_chain(text).layers])
    for begin in MEANT:
        assert any(each.startswith(begin) for each in readme_chains())
