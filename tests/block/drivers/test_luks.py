"""The driver luks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Bottom, Machine, StepEnv, content, discard, flush, read, write
from tests.luks_images import PASSPHRASE, Made, key_file, luks1, luks2, xts
from xenbackend.block.driver import Geometry
from xenbackend.block.drivers import luks as module
from xenbackend.block.drivers.luks import _MAX_COPIES, Luks
from xenbackend.block.keys import Derivation
from xenbackend.block.request import Op, Request
from xenbackend.errors import ChainError, DriverError

SIZE = 1 << 20
needs_cryptsetup = pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="cryptsetup is not installed")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

MADE = {
    "LUKS1": (luks1, {}),
    "LUKS1, AES-128": (luks1, {"key": os.urandom(32)}),
    "LUKS1, sha1": (luks1, {"hash": "sha1"}),
    "LUKS1, sha512, few stripes": (luks1, {"hash": "sha512", "stripes": 7}),
    "LUKS1, essiv": (luks1, {"cipher": "cbc-essiv:sha256", "key": os.urandom(32)}),
    "LUKS2": (luks2, {}),
    "LUKS2, 1024": (luks2, {"sector": 1024}),
    "LUKS2, 4096": (luks2, {"sector": 4096}),
    "LUKS2, AES-128": (luks2, {"key": os.urandom(32), "sector": 2048}),
}


def run(*command: object, data: bytes = b"", status: int = 0) -> str:
    """Run a program, which ends with `status`, and return what it prints."""
    done = subprocess.run([str(each) for each in command], input=data, capture_output=True, check=False)
    assert done.returncode == status, (command, done.stderr)
    return done.stdout.decode() + done.stderr.decode()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with the passphrase."""
    return key_file(tmp_path / "key")


def text_of(image: Path, key: Path, options: str = "") -> str:
    """Return a chain."""
    return f"luks:key={key}{options}|aio:{image}"


@pytest.mark.parametrize("name", MADE)
def test_a_volume_is_read_and_written(machine: Machine, tmp_path: Path, key: Path, name: str) -> None:
    """A volume made by the specification is read, and writes are encrypted by it, at any place and of any length."""
    make, options = MADE[name]
    chance = Random(name)
    plain = bytearray(chance.randbytes(256 << 10))
    made = Made(bytes(plain), **options)
    image = tmp_path / "img"
    image.write_bytes(make(made))
    before = image.read_bytes()
    start = len(before) - len(plain)
    chain = machine.open(text_of(image, key))
    assert plain == machine.everything(chain)
    sector = chain.geometry.sector_size
    assert made.sector == sector
    for _ in range(30):
        length = sector * chance.choice([1, 1, 2, 8, 20])
        place = chance.randrange(0, (len(plain) - length) // sector + 1) * sector
        data = chance.randbytes(length)
        plain[place : place + length] = data
        assert [0] == machine.do(chain, write(place, data[:512], data[512:]))
        assert plain == machine.everything(chain)
    chain.close()

    assert before[:start] + made.sectors(made.key, bytes(plain), made.sector) == image.read_bytes()


@pytest.mark.slow
@needs_cryptsetup
@pytest.mark.parametrize("name", MADE)
def test_cryptsetup_opens_what_the_tests_make(tmp_path: Path, key: Path, name: str) -> None:
    """The images that these tests make are accepted by cryptsetup, except for those with few stripes."""
    make, options = MADE[name]
    if "stripes" in options:
        pytest.skip("cryptsetup knows 4000 stripes only")
    image = tmp_path / "img"
    image.write_bytes(make(Made(bytes(256 << 10), **options)))

    run("cryptsetup", "open", "--test-passphrase", "--key-file", key, image)
    run("cryptsetup", "luksDump", image)


FORMATS = {
    "LUKS2, argon2id": ["--type", "luks2", "--pbkdf-memory", "32768", "--pbkdf-parallel", "4"],
    "LUKS2, argon2i": ["--type", "luks2", "--pbkdf", "argon2i", "--pbkdf-memory", "32768", "--sector-size", "512"],
    "LUKS2, pbkdf2": ["--type", "luks2", "--pbkdf", "pbkdf2", "--hash", "sha512", "--sector-size", "4096"],
    "LUKS2, AES-128": ["--type", "luks2", "--pbkdf-memory", "32768", "-s", "256", "--sector-size", "1024"],
    "LUKS1": ["--type", "luks1"],
    "LUKS1, essiv": ["--type", "luks1", "-c", "aes-cbc-essiv:sha256", "-s", "256"],
}


@pytest.mark.slow
@needs_cryptsetup
@pytest.mark.parametrize("name", FORMATS)
def test_what_cryptsetup_makes(machine: Machine, tmp_path: Path, name: str) -> None:
    """E1: an image of cryptsetup is opened by the exact bytes of its key file, NUL and newline included. Its data are
    where its offset and sectors say, encrypted by its key; the test computes them without the driver.
    """
    if "argon2" in name or name == "LUKS2, AES-128":
        pytest.importorskip("argon2")
    image, key = tmp_path / "img", key_file(tmp_path / "key", Random(name).randbytes(512) + b"\0\n")
    image.write_bytes(bytes(20 << 20))
    least = "4" if "--pbkdf-memory" in FORMATS[name] else "1000"  # of Argon2, of PBKDF2
    run("cryptsetup", "luksFormat", "-q", "--pbkdf-force-iterations", least, *FORMATS[name], "--key-file", key, image)
    dumped = tmp_path / "volume-key"
    run(
        "cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", dumped, "--key-file", key, image
    )  # fmt: skip
    data = Random(1).randbytes(64 << 10)
    chain = machine.open(text_of(image, key))
    assert [0] == machine.do(chain, write(1 << 20, data))
    size, sector = chain.geometry.size, chain.geometry.sector_size
    chain.close()
    offset = (20 << 20) - size
    first = (1 << 20) // 512
    cipher = "cbc-essiv:sha256" if "essiv" in name else "xts-plain64"
    made = Made(b"", key=dumped.read_bytes(), cipher=cipher)
    found = image.read_bytes()[offset + (1 << 20) :][: len(data)]

    if cipher == "xts-plain64":
        assert xts(made.key, data, sector, first) == found
    else:
        assert made.sectors(made.key, bytes(1 << 20) + data)[1 << 20 :] == found
    assert data == machine.contents(text_of(image, key))[1 << 20 :][: len(data)]


@pytest.mark.slow
@needs_qemu
@pytest.mark.parametrize("cipher", ["xts", "cbc"])
def test_qemu_reads_what_is_written_and_the_reverse(machine: Machine, tmp_path: Path, key: Path, cipher: str) -> None:
    """We read what QEMU has written to its image, and QEMU reads what we write."""
    image, secret = tmp_path / "img", f"secret,id=s,file={key}"
    options = "key-secret=s,iter-time=100"
    if cipher == "cbc":
        options += ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256"
    create = ["qemu-img", "create", "-q", "-f", "luks", "--object", secret, "-o", options, image, "4M"]
    for _ in range(20):  # qemu-img measures the host's speed, and fails if the host is busy
        done = subprocess.run([str(each) for each in create], capture_output=True, check=False)
        if b"accurate CPU usage" not in done.stderr:
            break
    assert (0, b"") == (done.returncode, done.stderr)
    ours, theirs = Random(1).randbytes(64 << 10), b"\x5a" * (128 << 10)
    chain = machine.open(text_of(image, key))
    assert 4 << 20 == chain.geometry.size
    assert [0, 0] == machine.do(chain, write(512, ours), flush())
    chain.close()
    opts = f"driver=luks,key-secret=s,file.filename={image}"
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "--object", secret, "--image-opts", opts, "-O", "raw", raw)
    assert ours == raw.read_bytes()[512:][: len(ours)]
    run("qemu-io", "--object", secret, "--image-opts", opts, "-c", "write -P 0x5a 1M 128k")

    assert theirs == machine.contents(text_of(image, key))[1 << 20 :][: len(theirs)]


@pytest.mark.parametrize(
    ("written", "passphrase", "problem"),
    [
        (b"pw", b"pw\n", "without the newline at its end it opens slot 0"),
        (b"pw\n", b"pw", r"the passphrase of .* opens no key slot of it \(tried: 0\)"),
        (b"pw", b"pw\r\n", "opens no key slot of it"),
        (b"pw\n", b"pw\n", ""),
        (b"a\0b\xff" * 100, b"a\0b\xff" * 100, ""),
    ],
)
def test_all_bytes_of_a_passphrase_count(
    machine: Machine, tmp_path: Path, written: bytes, passphrase: bytes, problem: str
) -> None:
    """E1: a key file is used byte for byte. If its last newline is the only fault, the error says so."""
    image = tmp_path / "img"
    image.write_bytes(luks2(Made(bytes(8192), passphrases=[written])))
    text = text_of(image, key_file(tmp_path / "key", passphrase))
    if problem:
        with pytest.raises(DriverError, match=problem):
            machine.open(text)
    else:
        assert bytes(8192) == machine.contents(text)


def test_each_slot_opens_and_one_can_be_named(machine: Machine, tmp_path: Path) -> None:
    """Key slots are tried in order until one opens. With `slot=` only that one is tried."""
    image, second = tmp_path / "img", key_file(tmp_path / "key", b"second")
    for make in (luks1, luks2):
        image.write_bytes(make(Made(bytes(8192), passphrases=[b"first", b"second"])))
        chain = machine.open(text_of(image, second))
        assert f"LUKS{1 if make is luks1 else 2}, key slot 1" == chain.layers[0].driver.env.facts["header"]
        chain.close()
        machine.open(text_of(image, second, ",slot=1")).close()
        with pytest.raises(DriverError, match=r"opens no key slot of it \(tried: 0\)"):
            machine.open(text_of(image, second, ",slot=0"))
        with pytest.raises(DriverError, match="none of its key slots is active, or none of those to be tried"):
            machine.open(text_of(image, second, ",slot=2"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("luks:|ram:1M", "the key is missing"),
        ("luks:key=|ram:1M", "it is empty; name a file with the passphrase"),
        ("luks:key=credential:|ram:1M", "is not a name for a credential"),
        ("luks:key=credential:../x|ram:1M", "is not a name for a credential"),
        ("luks:key=credential:..|ram:1M", "is not a name for a credential"),
        ("luks:key=/k,slot=-1|ram:1M", "a whole number of 0 or more"),
    ],
)
def test_odd_options_are_refused(machine: Machine, text: str, problem: str) -> None:
    """A `key=` that cannot be the place of a passphrase is refused before anything is opened."""
    with pytest.raises(ChainError, match=problem):
        machine.open(text)


def test_no_discard_unless_it_is_asked_for(machine: Machine, tmp_path: Path, key: Path) -> None:
    """Without `discard=on` no discard is offered or done. With it, the range is discarded in the layer below."""
    image = tmp_path / "img"
    image.write_bytes(luks1(Made(Random(1).randbytes(SIZE))))
    start = image.stat().st_size - SIZE
    before = image.read_bytes()
    chain = machine.open(text_of(image, key))
    assert (False, 0) == (chain.geometry.can_discard, chain.geometry.discard_granularity)
    assert [errno.EOPNOTSUPP] == machine.do(chain, discard(0, 65536))
    chain.close()
    assert before == image.read_bytes()
    chain = machine.open(text_of(image, key, ",discard=on"))
    geometry = chain.geometry
    place = geometry.discard_alignment or geometry.discard_granularity
    assert geometry.can_discard
    assert (start + place) % geometry.discard_granularity == 0
    assert [0] == machine.do(chain, discard(place, 65536))
    chain.close()

    assert before[: start + place] + bytes(65536) + before[start + place + 65536 :] == image.read_bytes()


def test_discards_count_from_where_the_data_begin() -> None:
    """The alignment of discards takes into account that the data begin behind the header."""
    image, driver = luks1(Made(bytes(65536))), Luks(Luks.Options(key="/k", discard=True))
    driver.env, driver.below = StepEnv(files=Unlocking()), Geometry(len(image), can_discard=True)
    driver.below = replace(driver.below, discard_granularity=65536, discard_alignment=4096)
    driver.look = lambda offset, length: image[offset : offset + length]
    geometry = driver.open(driver.env)
    start = len(image) - 65536

    assert 65536 == geometry.discard_granularity
    assert 4096 == (start + geometry.discard_alignment) % 65536
    assert start % 65536


def test_sectors_fit_those_below(machine: Machine, tmp_path: Path, key: Path) -> None:
    """E3: the disk has the larger sector size of the volume and the layer below. Data that begin inside a sector of
    that layer are refused.
    """
    image = tmp_path / "img"
    image.write_bytes(luks1(Made(bytes(65536))))
    chain = machine.open(f"luks:key={key}|aio:{image},sector=4096")
    assert 4096 == chain.geometry.sector_size
    assert [0] == machine.do(chain, write(4096, b"x" * 4096))
    chain.close()
    data = image.read_bytes()
    image.write_bytes(data[:104] + (int.from_bytes(data[104:108], "big") - 1).to_bytes(4, "big") + data[108:])
    key.unlink()  # the check comes before the key is asked for

    with pytest.raises(DriverError, match="inside a sector of the layer below, which has 4096 bytes"):
        machine.open(f"luks:key={key}|aio:{image},sector=4096")


class Held(Bottom):
    """A source over bytes in memory that does requests when the test says so."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = bytearray(data)

    def do(self) -> None:
        """Do all requests that have come."""
        batches, self.batches = self.batches, []
        for batch in batches:
            for request in batch:
                end = request.offset + request.length
                if request.op == Op.READ:
                    request.iov[0][:] = self.data[request.offset : end]
                elif request.op == Op.WRITE:
                    self.data[request.offset : end] = content(request)
                request.status = 0
            self.complete(batch)


class Unlocking:
    """The `files` of a layer, which derive keys and count how often."""

    def __init__(self) -> None:
        self.made = 0

    def derive(self, source: str, how: Derivation, *, without_newline: bool = False) -> memoryview:
        """Return the key derived from the passphrase of the tests."""
        import hashlib

        self.made += 1
        return memoryview(bytearray(hashlib.pbkdf2_hmac(how.hash, PASSPHRASE, how.salt, how.iterations, how.length)))


def opened(image: bytes, env: StepEnv, options: Luks.Options | None = None) -> tuple[Luks, Held, list[Request]]:
    """Return an open layer over an image, the source below, and the list of finished requests."""
    driver, disk, back = Luks(options or Luks.Options(key="/k")), Held(image), list[Request]()
    driver.env, driver.next, driver.below = env, disk, Geometry(len(image), can_discard=True)
    driver.look = lambda offset, length: image[offset : offset + length]
    driver.open(env)
    disk.complete, driver.complete = driver.on_complete, back.extend
    return driver, disk, back


def test_a_guest_sees_and_alters_no_copy(tmp_path: Path) -> None:
    """D7: the layer below gets memory of our own, encrypted from the guest's page as it was at submission. The guest's
    page gets nothing but plain text, after the read below has ended.
    """
    made = Made(b"p" * 8192)
    image = luks2(made)
    driver, disk, back = opened(image, StepEnv(files=Unlocking()))
    request = write(0, b"a" * 4096)
    page = request.iov[0]
    driver.submit([request])
    page[:] = b"b" * 4096  # the guest writes into its page meanwhile
    (own,) = disk.batches[0]
    assert page is not own.iov[0]
    assert xts(made.key, b"a" * 4096) == content(own)
    disk.do()
    assert b"b" * 4096 == bytes(page)
    asked = read(0, 4096)
    driver.submit([asked])
    assert b"\xee" * 4096 == content(asked)
    disk.do()

    assert [request, asked] == back
    assert b"a" * 4096 == content(asked)


def test_errors_go_up_and_nothing_is_shown(tmp_path: Path) -> None:
    """A read that fails below ends with the same status and leaves the guest's page unchanged."""
    driver, disk, back = opened(luks2(Made(bytes(8192))), StepEnv(files=Unlocking()))
    asked = read(0, 4096)
    driver.submit([asked, flush()])
    (first, second) = disk.batches.pop()
    first.status, second.status = errno.EIO, 0
    disk.complete([first, second])

    assert [errno.EIO, 0] == [request.status for request in back]
    assert b"\xee" * 4096 == content(asked)


def test_copies_have_a_bound(tmp_path: Path) -> None:
    """However much a guest asks for at once, copies take at most 32 MiB. Other requests wait."""
    driver, disk, back = opened(luks2(Made(bytes(65536))), StepEnv(files=Unlocking()))
    length, count = 1 << 20, 100
    page = memoryview(bytearray(length))
    disk.data += bytes(length)
    for _ in range(count):
        request = Request()
        request.op, request.offset, request.length, request.iov = Op.READ, 0, length, [page]
        driver.submit([request])
    assert _MAX_COPIES // length == sum(map(len, disk.batches))
    most = 0
    while disk.batches:
        most = max(most, driver._copied)
        disk.do()

    assert count == len(back)
    assert most == _MAX_COPIES
    assert 0 == driver._copied


def test_a_host_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no memory for a copy, the request ends with ENOMEM. Later ones are done."""
    driver, disk, back = opened(luks2(Made(b"p" * 65536)), StepEnv(files=Unlocking()))
    allocate = module.allocate

    def fails(size: int) -> memoryview:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(module, "allocate", fails)
    first, late = read(0, 4096), read(4096, 4096)
    driver.submit([first, flush()])
    disk.do()
    assert [errno.ENOMEM, 0] == [first.status, back[-1].status]
    monkeypatch.setattr(module, "allocate", allocate)
    driver.submit([late])
    disk.do()

    assert b"p" * 4096 == content(late)
    assert 0 == driver._copied


def test_a_successor_has_the_key(tmp_path: Path) -> None:
    """E2: the key is derived once. A successor takes it from memory, and derives its own for another volume."""
    plain = Random(2).randbytes(8192)
    image, files, memories = luks2(Made(plain)), Unlocking(), dict[str, bytearray]()
    first, _, _ = opened(image, StepEnv(files=files, memories=memories))
    first.close()
    del first
    second, disk, _ = opened(image, StepEnv(files=files, memories=memories))
    asked = read(0, 8192)
    second.submit([asked])
    disk.do()
    assert plain == content(asked)
    assert 1 == files.made
    other = luks2(Made(plain))
    third, disk, _ = opened(other, StepEnv(files=files, memories=memories))
    asked = read(0, 8192)
    third.submit([asked])
    disk.do()
    assert plain == content(asked)

    assert 2 == files.made


def test_a_memory_that_was_cut_off_is_no_key(tmp_path: Path) -> None:
    """D11: if a worker dies before the memory is complete, its successor derives the key again."""
    image, files, memories = luks2(Made(bytes(8192))), Unlocking(), dict[str, bytearray]()
    opened(image, StepEnv(files=files, memories=memories))[0].close()
    memories["key"][:32] = bytes(32)
    opened(image, StepEnv(files=files, memories=memories))[0].close()

    assert 2 == files.made


def test_a_chain_that_is_looked_at_beside_makes_no_key(tmp_path: Path) -> None:
    """A second opening of the same volume in this process, as for `set` and `resize`, shares the key. If it names
    another passphrase or slot it derives its own, because a dry run has to find out whether that opens the volume.
    """
    image, files = luks2(Made(bytes(8192))), Unlocking()
    first, _, _ = opened(image, StepEnv(files=files))
    second, _, _ = opened(image, StepEnv(files=files))
    assert 1 == files.made
    key = first._key
    assert key is second._key
    opened(image, StepEnv(files=files), Luks.Options(key="/other"))
    assert 2 == files.made
    opened(image, StepEnv(files=files), Luks.Options(key="/k", slot=0))
    assert 3 == files.made
    first.close()
    second.close()
    held = key.value
    del key

    assert bytes(64) == bytes(held)
