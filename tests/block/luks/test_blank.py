"""New encrypted volumes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers_block import Machine, content, flush, read, write
from tests.luks_images import PASSPHRASE, key_file, xts
from xenbackend.block.formats.blank import Blank
from xenbackend.block.keys import Derivation
from xenbackend.block.luks.blank import DATA_AT, blank_volume, derivation
from xenbackend.cli.main import main
from xenbackend.errors import ConfigError
from xenbackend.opener.newfile import write_new

SIZE = 1 << 20


def cheap() -> Derivation:
    """Return a cheap key derivation."""
    return replace(derivation(), memory_kib=1024, lanes=1)


def made(size: int = SIZE) -> Blank:
    """Return a volume that the tests' passphrase opens."""
    low_level = pytest.importorskip("argon2").low_level
    how = cheap()
    key = low_level.hash_secret_raw(
        PASSPHRASE, how.salt, how.iterations, how.memory_kib, how.lanes, how.length, low_level.Type.ID
    )
    return blank_volume(size, how, bytearray(key))


def test_what_is_made_is_opened_and_used(machine: Machine, tmp_path: Path) -> None:
    """The passphrase opens a new volume. What is written is encrypted there, and the key is nowhere in plain text."""
    image, key = tmp_path / "img", key_file(tmp_path / "key")
    write_new(str(image), made())
    chain = machine.open(f"luks:key={key}|aio:{image}")
    assert (SIZE, 4096) == (chain.geometry.size, chain.geometry.sector_size)
    found = read(4096, 4096)
    volume_key = bytes(chain.layers[0].driver._key.value)
    assert [0, 0, 0] == machine.do(chain, write(4096, b"x" * 4096), flush(), read(0, 4096))
    assert [0] == machine.do(chain, found)
    assert b"x" * 4096 == content(found)
    chain.close()
    data = image.read_bytes()

    assert xts(volume_key, b"x" * 4096, 4096, 8) == data[DATA_AT + 4096 :][:4096]
    assert volume_key[:32] not in data
    assert image.stat().st_blocks * 512 < 2 << 20


def test_no_two_are_alike() -> None:
    """Key, salts and names are random: two volumes with the same passphrase have nothing in common."""
    one, other = (made().pieces for _ in range(2))

    assert all(first[1] != second[1] for first, second in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
def test_cryptsetup_takes_it(tmp_path: Path, machine: Machine) -> None:
    """Cryptsetup opens and shows a new volume and adds a key slot, which the driver opens. If the first header is
    destroyed, both use the second one.
    """
    image, key, second = tmp_path / "img", key_file(tmp_path / "key"), key_file(tmp_path / "second", b"second")
    write_new(str(image), made())

    def run(*words: object) -> str:
        command = ["cryptsetup", *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("open", "--test-passphrase", "--key-file", key, image)
    assert "sector: 4096 [bytes]" in run("luksDump", image)
    cost = ["--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1"]
    run("luksAddKey", "-q", *cost, "--key-file", key, image, second)
    machine.open(f"luks:key={second}|aio:{image}").close()
    with image.open("r+b") as file:
        file.write(os.urandom(2048))
    run("open", "--test-passphrase", "--key-file", second, image)

    machine.open(f"luks:key={key}|aio:{image}").close()


@pytest.mark.slow
def test_the_command(tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """`image create raw FILE SIZE --encrypt KEY` makes a volume, prints its chain, and does not replace a file."""
    pytest.importorskip("argon2")
    image, key = tmp_path / "img", key_file(tmp_path / "a,key")
    create = ["image", "create", "raw", str(image), "1000448", "--sector-size", "512", "--encrypt", str(key)]
    assert 0 == main(create)
    text = f"luks:key={tmp_path}/a\\,key|aio:{image}"
    assert text in capsys.readouterr().out
    chain = machine.open(text)
    assert (1000448, 512) == (chain.geometry.size, chain.geometry.sector_size)
    chain.close()
    before = hashlib.sha256(image.read_bytes()).digest()
    assert 2 == main(create)
    assert "exists already" in capsys.readouterr().err

    assert before == hashlib.sha256(image.read_bytes()).digest()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["qcow2", "{0}/img", "1M", "--encrypt", "{0}/key"], "--encrypt makes raw images of a SIZE"),
        (["raw", "{0}/img", "--encrypt", "{0}/key"], "--encrypt makes raw images of a SIZE"),
        (["raw", "{0}/img", "1M", "--encrypt", "{0}/key", "--fixed"], "--encrypt makes raw images of a SIZE"),
        (["raw", "{0}/img", "1M", "--sector-size", "512"], "use it with --encrypt"),
        (["raw", "{0}/img", "1M", "--encrypt", "{0}/none"], "cannot be read: No such file"),
        (["raw", "{0}/img", "1M", "--encrypt", ""], "it is empty; name a file with the passphrase"),
        (["raw", "{0}/img", "1M", "--encrypt", "credential:../x"], "is not a name for a credential"),
        (["raw", "{0}/img", "1000448", "--encrypt", "{0}/key"], "choose a multiple of 4096"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If something is wrong, the error says so and no file is made."""
    key_file(tmp_path / "key")
    assert 2 == main(["image", "create", *(word.format(tmp_path) for word in words)])

    assert problem in capsys.readouterr().err
    assert not (tmp_path / "img").exists()


def test_a_size_is_whole_sectors() -> None:
    """The size of a volume must be a multiple of its sector size, and not 0."""
    for size, sector in ((0, 4096), (-4096, 4096), (4095, 4096), (512, 4096), (0, 512), (700, 512)):
        with pytest.raises(ConfigError, match=f"choose a multiple of {sector}"):
            blank_volume(size, cheap(), bytearray(64), sector)
