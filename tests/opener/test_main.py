"""The opener's process, here in a thread: what it gives, refuses and reports, and when it ends."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.luks_images import PASSPHRASE, key_file
from tests.openers import Openers
from xenbackend.block.driver import Found
from xenbackend.block.keys import MAX_ITERATIONS, Derivation
from xenbackend.block.mapped.parents import PARENT
from xenbackend.block.servers import DISK, Account, After, Endpoint
from xenbackend.errors import ConfigError, DriverError
from xenbackend.kernel import memfd
from xenbackend.opener.main import BREACH, Attendant
from xenbackend.protocol import opening
from xenbackend.protocol.jobs import Job
from xenbackend.protocol.messages import MAX_MEMORIES
from xenbackend.protocol.opening import MAX_NAMES, MAX_REFUSED
from xenbackend.worker.opener import RemoteOpener


@pytest.fixture
def openers() -> Iterator[Openers]:
    """Return openers, which may leave nothing open."""
    before = open_descriptors()
    openers = Openers()
    yield openers
    openers.close()
    assert before == open_descriptors()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image."""
    (tmp_path / "image").write_bytes(b"first".ljust(512))
    return tmp_path / "image"


def job(*chains: str, read_only: bool = False, **more: object) -> Job:
    """Return a job for these chains."""
    return Job("vbd/5/51712", list(chains), read_only, **more)


def read(opener: RemoteOpener, path: Path, *, write: bool = False) -> bytes:
    """Open a file, and return its first bytes."""
    fd, _ = opener.open(str(path), write=write, claims=write)
    try:
        return os.pread(fd, 5, 0)
    finally:
        os.close(fd)


def test_who_writes_claims_what_he_opens(openers: Openers, image: Path) -> None:
    """A worker can open a file for writing only with a claim, unless an administrator has said that it is shared."""
    opener = openers.remote(job(f"aio:{image}"))
    with pytest.raises(DriverError, match="must not be written to by others") as caught:
        opener.open(str(image), write=True)
    os.close(opener.open(str(image), write=False)[0])
    opener.close()
    assert errno.EACCES == caught.value.errno
    for shared in (job(f"aio:{image}", shareable=True), job(f"aio:{image},share=on")):
        opener = openers.remote(shared)
        os.close(opener.open(str(image), write=True)[0])
        opener.close()


def test_a_file_is_handed_over_before_the_worker_has_it(openers: Openers, image: Path) -> None:
    """The supervisor gets each file once, before the worker does; a file that it does not keep is not given."""
    opener = openers.remote(job(f"aio:{image}"))
    assert [b"first"] * 2 == [read(opener, image), read(opener, image, write=True)]
    opener.close()
    openers.refusal = "no room for it"
    other = openers.remote(job(f"aio:{image}"))
    with pytest.raises(DriverError, match="no room for it"):
        read(other, image)
    other.close()

    assert [str(image)] * 2 == [each.name for each in openers.opened]
    assert openers.opened[0].identity == openers.opened[1].identity


def test_a_name_means_the_file_that_was_held(openers: Openers, image: Path) -> None:
    """Within a job, a name means the same file in all questions, whatever happens to it meanwhile."""
    opener = openers.remote(job(f"aio:{image}"))
    size = opener.look(str(image)).size
    image.unlink()
    image.write_bytes(b"other")

    assert (512, b"first") == (size, read(opener, image))
    opener.close()


def test_nothing_else_is_opened(openers: Openers, image: Path, tmp_path: Path) -> None:
    """Other names, writing to what is read-only, and devices, sockets or new files that the job does not have, are
    refused.
    """
    (tmp_path / "secret").write_bytes(b"s" * 512)
    (tmp_path / "images").mkdir()
    opener = openers.remote(job(f"aio:{image}", read_only=True))
    for function in (
        lambda: opener.open(str(tmp_path / "secret"), write=False),
        lambda: opener.open(str(image), write=True),
        lambda: opener.open_record(str(image)),
        lambda: opener.look("/etc/shadow"),
        lambda: opener.find(PARENT, str(tmp_path / "secret"), ["image"]),
        lambda: opener.find(PARENT, str(image), ["/etc/shadow"]),
        lambda: opener.resolve("/root/x"),
        lambda: opener.for_chain(1).look(str(image)),
        lambda: opener.for_chain(-1).look(str(image)),
        lambda: opener.read_cluster(Account("/etc/ceph/ceph.conf", "admin")),
        lambda: opener.read_certificates("/etc/ssl"),
        opener.open_devices,
        opener.listen,
    ):
        with pytest.raises(DriverError):
            function()
    with pytest.raises(ConfigError):
        opener.make()
    assert b"first" == read(opener, image)  # it goes on
    opener.close()


def test_what_stands_for_a_record(openers: Openers, image: Path, tmp_path: Path) -> None:
    """For a chain that is to be put in, another file may stand for a record that is not there, or empty, until it is to
    be made. It is the same one for all questions, and not one of a chain in service.
    """
    new, empty, full = (tmp_path / name for name in ("new", "empty", "full"))
    empty.touch()
    full.write_bytes(b"data")
    chain = "".join(f"log:{each}|" for each in (new, empty, full)) + f"aio:{image}"
    opener = openers.remote(job(f"aio:{image}", chain))
    later = opener.for_chain(1)

    def record(path: Path, *, creates: bool) -> tuple[int, bytes]:
        fd = later.open_record(str(path), creates=creates)
        try:
            os.pwrite(fd, b"more", os.fstat(fd).st_size)
            return os.fstat(fd).st_ino, os.pread(fd, 100, 0)
        finally:
            os.close(fd)

    for path in (new, empty):
        inode, content = record(path, creates=False)
        assert (b"more", (inode, b"moremore")) == (content, record(path, creates=False))
        assert 8 == later.look(str(path)).size
    assert [False, 0] == [new.exists(), empty.stat().st_size]
    assert (full.stat().st_ino, b"datamore") == record(full, creates=False)
    for path in (new, empty):
        found = record(path, creates=True)
        assert (path.stat().st_ino, b"more") == found == (path.stat().st_ino, path.read_bytes())
    opener.close()

    opener = openers.remote(job(f"log:{tmp_path / 'now'}|aio:{image}"))
    os.close(opener.open_record(str(tmp_path / "now"), creates=False))
    assert (tmp_path / "now").exists()
    opener.close()


def test_certificates_are_read(openers: Openers, tmp_path: Path) -> None:
    """A worker gets the certificates in the directory that its chain names, and no others."""
    (tmp_path / "ca-cert.pem").write_text("ours")
    (tmp_path / "secret").write_text("s")
    opener = openers.remote(job(f"nbd:nbds://host/a,certificates={tmp_path}"))
    assert {"ca-cert.pem": "ours"} == opener.read_certificates(str(tmp_path))
    with pytest.raises(DriverError, match="has no certificates of this disk"):
        opener.read_certificates(str(tmp_path.parent))
    opener.close()


def test_the_settings_of_a_cluster_are_read(openers: Openers, tmp_path: Path) -> None:
    """A worker gets the settings of its chain's account, and an id that no other disk has."""
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon host = 10.0.0.1\nkey = SECRET==\nlog file = /x\n")
    opener = openers.remote(job(f"rbd:a/b,id=x,conf={conf}"))
    settings = dict(opener.read_cluster(Account(str(conf), "x")))

    assert settings.pop(DISK).endswith(f" {job('').vbd}")
    assert {"mon_host": "10.0.0.1", "key": "SECRET=="} == settings
    with pytest.raises(DriverError, match="is not a configuration of this disk"):
        opener.read_cluster(Account(str(conf), "y"))
    opener.close()


def test_what_an_image_names_may_be_opened_once_it_was_found(openers: Openers, image: Path, tmp_path: Path) -> None:
    """A file that an image names can be opened once it was found, for reading, and is kept like any other."""
    (tmp_path / "base").write_bytes(b"based".ljust(512))
    opener = openers.remote(job(f"qcow2:{image},parents={tmp_path}"))
    with pytest.raises(DriverError):
        read(opener, tmp_path / "base")
    found = Found(str(tmp_path / "base"), f"parents={tmp_path}")
    assert found == opener.find(PARENT, str(image), ["gone", "base"], "/what/the/worker/says")
    with pytest.raises(DriverError):
        read(opener, tmp_path / "base", write=True)

    assert b"based" == read(opener, tmp_path / "base")
    assert [str(image), str(tmp_path / "base")] == [each.name for each in openers.opened]
    opener.close()


def test_how_often_a_worker_may_ask_for_what_is_refused(openers: Openers, image: Path, tmp_path: Path) -> None:
    """R18: a worker that was taken over learns little of the host by asking what an image could lead to: after a few
    refusals, and for a question with too many names, the opener no longer looks. Files that may be found do not count.
    """
    (tmp_path / "base").write_bytes(bytes(512))
    opener = openers.remote(job(f"qcow2:{image},parents={tmp_path / 'base'}"))
    for _ in range(2 * MAX_REFUSED):
        assert str(tmp_path / "base") == opener.find(PARENT, str(image), ["base"]).path
    for number in range(MAX_REFUSED):
        with pytest.raises(DriverError, match="/etc/passwd is named only by the image" if number else "is not there"):
            opener.find(PARENT, str(image), ["/etc/passwd" if number else "/etc/gone"])
    for name in ("/etc/passwd", "/etc/gone", "base"):
        with pytest.raises(DriverError, match=r"were to be looked for$"):
            opener.find(PARENT, str(image), [name])
    assert b"first" == read(opener, image)  # it goes on
    opener.close()


def test_how_many_names_an_image_may_have_for_one_file(openers: Openers, image: Path) -> None:
    """A question with more names than any image of ours has is refused without a look at them."""
    near = openers.begin(job(f"qcow2:{image}"))
    answers = []
    for names in (["/etc/gone"] * MAX_NAMES, ["/etc/gone"] * (MAX_NAMES + 1)):
        near.send(opening.encode(opening.FindFile(PARENT, str(image), names)))
        answers.append(opening.from_opener(near.recv(opening.MAX_MESSAGE)).errno)
    near.close()
    assert [errno.ENOENT, errno.EACCES] == answers


def test_what_is_kept_counts_and_not_the_name(openers: Openers, image: Path) -> None:
    """The chain in service gets the kept files; names of a chain that is to replace it are looked up."""
    first = openers.remote(job(f"aio:{image}"))
    read(first, image)
    first.close()
    openers.opened.clear()
    image.unlink()
    image.write_bytes(b"other".ljust(512))
    opener = openers.remote_of(job(f"aio:{image}", f"log:|aio:{image}"))
    found = [read(opener, image), read(opener.for_chain(1), image)]
    opener.close()

    assert [b"first", b"other"] == found
    assert [(str(image), 1)] == [(each.name, each.chain) for each in openers.opened]


def test_a_new_file_appears_whole_or_not_at_all(openers: Openers, tmp_path: Path) -> None:
    """A new file has its name only once it is published; if it never is, nothing is left."""
    for is_published in (False, True):
        opener = openers.remote(job("null:1G", makes=str(tmp_path / "new")))
        fd = opener.make()
        os.write(fd, b"data")
        os.close(fd)
        assert not (tmp_path / "new").exists()
        if is_published:
            assert not opener.publish()  # there is no parent to mark it with
        opener.close()
        openers.close()
        assert [tmp_path / "new"][: int(is_published)] == list(tmp_path.iterdir())

    assert b"data" == (tmp_path / "new").read_bytes()
    again = openers.remote(job("null:1G", makes=str(tmp_path / "new")))
    with pytest.raises(ConfigError, match="exists already"):
        again.make()
    again.close()


def test_one_that_is_asked_nonsense_ends(openers: Openers) -> None:
    """An opener that gets an invalid question ends with an exit status that marks the breach."""
    near = openers.begin(job("null:1G"))
    near.send(b'{"kind": "Job"}')
    assert b"" == near.recv(16)
    near.close()
    openers.close()

    assert [BREACH] == openers.ends


def test_a_chain_that_cannot_be_is_an_answer(openers: Openers) -> None:
    """If a chain in the job is invalid, because its driver is gone for example, questions get an error, and the opener
    goes on.
    """
    opener = openers.remote(job("nosuch:/img"))
    for _ in range(2):
        with pytest.raises(DriverError, match="nosuch"):
            opener.look("/img")
    opener.close()


def test_without_a_supervisor_nothing_new_is_opened(image: Path) -> None:
    """Without a supervisor no new file is opened, as nobody would keep it for the next worker."""
    from xenbackend.opener.main import Attendant
    from xenbackend.protocol import datagrams

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, near, far:
        ours.shutdown(socket.SHUT_RDWR)
        datagrams.send(near, opening.encode(opening.LookAt(str(image))))
        near.shutdown(socket.SHUT_WR)
        status = Attendant(job(f"aio:{image}"), theirs, far, {}).serve()
        answer = opening.from_opener(near.recv(opening.MAX_MESSAGE))

        assert 0 == status
        assert isinstance(answer, opening.Given)
        assert (errno.ECONNABORTED, None) == (answer.errno, answer.facts)


def test_a_memory_is_kept_before_the_worker_has_it(openers: Openers, image: Path) -> None:
    """The supervisor gets each memory, sealed and of zeros, before the worker does; one that it does not keep is not
    given.
    """
    opener = openers.remote(job(f"log:|aio:{image}"))
    fd = opener.make_memory("log:dirty", 8192)
    assert memfd.is_sealed(fd, 8192)
    memfd.map_sealed(fd, 8192)[8188:] = b"same"
    assert bytes(8188) + b"same" == os.pread(openers.memories["log:dirty"], 9000, 0)
    os.close(fd)
    openers.refusal = "a disk has at most 64 memories"
    with pytest.raises(DriverError, match="at most 64 memories"):
        opener.make_memory("log:other", 8192)
    opener.close()


@pytest.mark.parametrize("question", [opening.MakeMemory("map", 1), opening.OpenDevices(), opening.Listen()])
def test_what_no_storage_can_delay_is_not_said_to_wait_for_it(question: opening.Question) -> None:
    """On a busy host, a memory, a device or a socket may take long, but nobody is told that storage does not answer."""
    nobody: Any = None
    attendant = Attendant(job("aio:/img", host="host", export="/export"), nobody, nobody, {})

    assert "" == attendant._about(question)


@pytest.mark.parametrize("size", [0, -1, 1 << 63, 1 << 70])
def test_a_memory_of_an_impossible_size_is_an_answer(openers: Openers, image: Path, size: int) -> None:
    """A worker that asks for no bytes, or for more than there can be, gets an error, and nothing is kept."""
    opener = openers.remote(job(f"aio:{image}"))
    with pytest.raises((DriverError, OSError)):
        opener.make_memory("x", size)
    opener.close()

    assert {} == openers.memories


def test_a_worker_has_so_many_memories_made_and_no_more(openers: Openers, image: Path) -> None:
    """E4: an opener makes no more memories than two chains can have, whatever becomes of the former ones."""
    opener = openers.remote(job(f"aio:{image}"))
    for _ in range(2 * MAX_MEMORIES):
        os.close(opener.make_memory("again", 4096))
    with pytest.raises(DriverError, match="one order makes at most 128 memories"):
        opener.make_memory("again", 4096)
    opener.close()


def test_keys_of_a_passphrase(openers: Openers, image: Path, tmp_path: Path) -> None:
    """A worker gets keys derived from its chain's passphrase, in a sealed memory, and never the passphrase; invalid
    questions are refused.
    """
    passphrase, how = key_file(tmp_path / "key"), Derivation("pbkdf2", b"salt" * 8, 64, 1000, "sha256")
    opener = openers.remote(job(f"luks:key={passphrase}|aio:{image}"))
    found = opener.derive(str(passphrase), how, without_newline=False)
    assert hashlib.pbkdf2_hmac("sha256", PASSPHRASE, how.salt, 1000, 64) == bytes(found)
    found.release()
    with pytest.raises(DriverError, match="is not a passphrase of this disk"):
        opener.derive(str(image), how, without_newline=False)
    with pytest.raises(DriverError, match="10 iterations of PBKDF2"):
        opener.derive(str(passphrase), replace(how, iterations=10), without_newline=False)
    with pytest.raises(OSError, match="No data"):
        opener.derive(str(passphrase), how, without_newline=True)
    with pytest.raises(DriverError, match="is not opened"):
        opener.open(str(passphrase), write=False)
    opener.close()


def test_one_for_lost_connections_does_nothing_else(openers: Openers, image: Path, tmp_path: Path) -> None:
    """An opener for lost connections connects to the chain's servers, and does nothing else that the chain allows:
    a worker gets such openers again and again, only because it says so, each with new limits on its work.
    """
    passphrase = key_file(tmp_path / "key")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        chain = f"luks:key={passphrase}|cow:{tmp_path}/record|nbd:nbd+unix:///?socket={tmp_path}/server"
        opener = openers.remote(job(chain, only_connects=True))
        for function in (
            lambda: opener.derive(
                str(passphrase), Derivation("pbkdf2", b"s" * 32, 64, 1000, "sha256"), without_newline=False
            ),
            lambda: opener.open_record(f"{tmp_path}/record"),
            lambda: opener.look(f"{tmp_path}/record"),
            lambda: opener.resolve(f"{tmp_path}/record"),
        ):
            with pytest.raises(DriverError, match="the job is of no"):
                function()
        opener.connect(Endpoint(path=f"{tmp_path}/server"), 0, After.LOSS, keeps=True).close()
        opener.close()
    openers.close()

    assert [] == openers.opened
    assert not (tmp_path / "record").exists()


def test_a_worker_has_so_many_keys_made_and_no_more(openers: Openers, image: Path, tmp_path: Path) -> None:
    """E4: the work that a worker asks for is counted before the passphrase is read, even if no key comes of it."""
    passphrase = key_file(tmp_path / "key")
    passphrase.chmod(0o604)
    dear = Derivation("pbkdf2", b"salt" * 8, 64, MAX_ITERATIONS, "sha256")
    opener = openers.remote(job(f"luks:key={passphrase}|aio:{image}"))
    for _ in range(2):
        with pytest.raises(DriverError, match="every user may access"):
            opener.derive(str(passphrase), dear, without_newline=False)
    with pytest.raises(DriverError, match="trying all of its key slots takes too much work"):
        opener.derive(str(passphrase), dear, without_newline=False)
    opener.close()
