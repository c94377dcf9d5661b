"""Looks at the files, locks and sockets of chains; all are real."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xenbackend.block.servers import Account, Endpoint
from xenbackend.doctor import storage
from xenbackend.doctor.finding import Finding, Verdict
from xenbackend.kernel import locks


def of(chain: str, *, read_only: bool = False) -> list[Finding]:
    """Return all findings about the chain of 5/xvda."""
    return [each for probe in storage.probes("5/xvda", chain, read_only=read_only) for each in probe.look().findings]


@contextmanager
def locked(path: Path, access: locks.Access) -> Iterator[None]:
    """Hold an image's lock, as another program would."""
    fd = os.open(path, os.O_RDWR)
    try:
        assert locks.take(fd, access)
        yield
    finally:
        os.close(fd)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image file."""
    path = tmp_path / "img"
    path.write_bytes(bytes(512))
    return path


def test_a_chain_whose_files_are_there(image: Path, tmp_path: Path) -> None:
    """Each file has a finding; one that its layer would create may be missing; a look leaves no lock."""
    found = of(f"log:{tmp_path}/rec|cow:{tmp_path}/cow|aio:{image}")

    assert [(Verdict.OK, "file", "5/xvda")] * 3 == [(each.verdict, each.check, each.disk) for each in found]
    assert "will be made when it is needed" in found[0].sentence
    with locked(image, locks.WRITE):
        pass
    assert {"img"} == {each.name for each in tmp_path.iterdir()}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is named, with control characters escaped."""
    [found] = of(f"aio:{tmp_path}/\x1b[2J")

    assert found.is_wrong
    assert rf"there is no file or device {tmp_path}/\x1b[2J" == found.sentence
    assert of(f"aio:{tmp_path}")[0].is_wrong


def test_what_is_no_disk_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe or a character device is not opened, which could have effects; only its kind is examined."""
    flags: list[int] = []
    real = os.open
    os.mkfifo(tmp_path / "pipe")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, how: (flags.append(how), real(path, how))[1])
        found = [*of(f"aio:{tmp_path}/pipe"), *of("aio:/dev/null")]

    assert [True, True] == [each.is_wrong and "neither a file nor a block device" in each.sentence for each in found]
    assert all(each & os.O_PATH for each in flags)


def test_who_has_an_image_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's own worker may have the image, and readers may share one; any other user that excludes us is named."""
    users: list[str] = []
    monkeypatch.setattr(storage, "users_of", lambda _fd: ", ".join(users))
    with locked(image, locks.WRITE):
        users[:] = ["qemu-img (process 7)"]
        [other] = of(f"aio:{image}")
        users[:] = ["the disk 5/xvda (process 8)"]
        [own] = of(f"aio:{image}")
        users[:] = ["the disk 15/xvda (process 8)"]
        [alike] = of(f"aio:{image}")
    with locked(image, locks.READ):
        [shared] = of(f"aio:{image}", read_only=True)
        [written] = of(f"aio:{image}")

    assert (True, f"{image} is in use by qemu-img (process 7)") == (other.is_wrong, other.sentence)
    assert (Verdict.OK, f"{image} is used by the disk's own worker") == (own.verdict, own.sentence)
    assert alike.is_wrong
    assert (Verdict.OK, True) == (shared.verdict, written.is_wrong)


def test_a_file_that_may_not_be_opened_is_not_known(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the caller may not open a file, the finding is unknown, and the command is for root."""

    def refuse(path: object, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    found = storage.look_at_file(str(image), locks.WRITE)

    assert (Verdict.UNKNOWN, "sudo xenbackend doctor") == (found.verdict, found.command)


def test_a_passphrases_file_is_not_read(tmp_path: Path, image: Path) -> None:
    """A passphrase's file must exist and not be open to everybody; its contents are not shown."""
    key = tmp_path / "key"
    chain = f"luks:key={key}|aio:{image}"
    missing, _ = of(chain)
    key.write_text("open sesame")
    key.chmod(0o644)
    wide, _ = of(chain)
    key.chmod(0o600)
    good, _ = of(chain)

    assert (True, True, Verdict.OK) == (missing.is_wrong, wide.is_wrong, good.verdict)
    assert f"chmod o= {key}" == wide.command
    assert "sesame" not in "".join(each.sentence for each in (missing, wide, good))


def test_a_server_at_a_socket_is_not_bothered(tmp_path: Path) -> None:
    """Whether a server listens at a socket is read from the kernel's table, as a connection would count as a client."""
    path = tmp_path / "nbd.sock"
    chain = f"nbd:unix:{path}"
    [missing] = of(chain)
    with socket.socket(socket.AF_UNIX) as near:
        near.bind(str(path))
        [deaf] = of(chain)
        near.listen()
        [listens] = of(chain)
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.accept()

    assert (True, True, Verdict.OK) == (missing.is_wrong, deaf.is_wrong, listens.verdict)
    assert "nothing listens at" in deaf.sentence
    assert f"ss -xl | grep -F {path}" == deaf.command


def test_a_server_at_a_port_is_connected_to() -> None:
    """A server at a port is tried by connecting: well if it listens, wrong if not."""
    with socket.socket() as near:
        near.bind(("127.0.0.1", 0))
        port = near.getsockname()[1]
        refused = storage.look_at_server(Endpoint(host="127.0.0.1", port=port))
        near.listen()
        reached = storage.look_at_server(Endpoint(host="127.0.0.1", port=port))

    assert (True, Verdict.OK) == (refused.is_wrong, reached.verdict)
    assert f"127.0.0.1:{port} cannot be reached: Connection refused" == refused.sentence
    assert f"nc -vz 127.0.0.1 {port}" == refused.command


def test_a_cluster_is_reached_by_a_monitor_and_its_key_is_not_told(tmp_path: Path) -> None:
    """A cluster is well if one monitor listens; otherwise the last error is shown. The key never is."""
    conf = tmp_path / "ceph.conf"
    with socket.socket() as near, socket.socket() as deaf:
        for each in (near, deaf):
            each.bind(("127.0.0.1", 0))
        near.listen()
        port, closed = (each.getsockname()[1] for each in (near, deaf))
        text = f"[global]\nkey = AQSECRET==\nmon host = v1:127.0.0.1:{closed}/0, v2:127.0.0.1:{port}/0\n"
        conf.write_text(text)
        reached = storage.look_at_cluster(Account(str(conf), "xen"))
        conf.write_text(text.partition(", v2")[0] + "\n")
        lost = storage.look_at_cluster(Account(str(conf), "xen"))
    missing = storage.look_at_cluster(Account(str(tmp_path / "none"), "xen"))

    assert (Verdict.OK, True, True) == (reached.verdict, lost.is_wrong, missing.is_wrong)
    assert f"(127.0.0.1:{closed}: Connection refused)" in lost.sentence
    assert "SECRET" not in "".join(each.sentence + each.command for each in (reached, lost, missing))


def test_monitors_have_many_spellings() -> None:
    """Monitors are parsed in all spellings of Ceph; without a port both of its ports are used."""
    assert [("1.2.3.4", 3300), ("1.2.3.4", 6789), ("fd00::1", 3300), ("fd00::1", 6789), ("5.6.7.8", 1)] == (
        storage.monitors_of("[v2:1.2.3.4:3300/0,v1:1.2.3.4:6789/0],[fd00::1] any:5.6.7.8:1")
    )
