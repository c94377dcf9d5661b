"""The place of the control socket, as successive services find it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

import pytest

from tests.until import PATIENCE_S, until
from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service import listening
from xenbackend.supervisor.service.listening import alone_at, check_place, listen, take_over
from xenbackend.supervisor.service.server import Server


def is_waited_for(lock: Path) -> bool:
    """Return whether somebody in this process waits for a locked file, and so has it open beside its holder."""
    names = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return names.count(lock) > 1


def test_only_one_service_listens(tmp_path: Path) -> None:
    """A second service does not start while the first one listens; the socket that a dead service left is replaced."""
    place = tmp_path / "x"
    with listen(place), pytest.raises(ConfigError, match="listens there already"):
        listen(place)
    with listen(place), socket.socket(socket.AF_UNIX) as client:
        assert 0 == client.connect_ex(str(place))


def test_of_two_that_start_at_once_one_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two services start at once, one of them listens, even if the second looks when the first has bound its socket
    and does not listen yet.
    """
    place, really_listen = tmp_path / "x", socket.socket.listen
    with ThreadPoolExecutor() as threads, ExitStack() as held:
        second: list[Future[socket.socket]] = []

        def listen_late(near: socket.socket, backlog: int) -> None:
            if not second:
                second.append(threads.submit(lambda: held.enter_context(listen(place))))
                wait(second, timeout=0.2)
            really_listen(near, backlog)

        monkeypatch.setattr(socket.socket, "listen", listen_late)
        held.enter_context(listen(place))
        with pytest.raises(ConfigError, match="listens there already"):
            second[0].result(5)

    assert [place] == [*tmp_path.iterdir()]


@pytest.mark.usefixtures("descriptors")
def test_the_lock_is_the_file_that_has_its_name(tmp_path: Path) -> None:
    """Whoever waited for the lock while its holder removed the file holds a file that the next one finds."""
    place, lock = tmp_path / "x", tmp_path / "x.lock"
    entered, leave = Event(), Event()

    def enter() -> None:
        with alone_at(place):
            entered.set()
            leave.wait(PATIENCE_S)

    with ThreadPoolExecutor() as threads:
        with alone_at(place):
            second = threads.submit(enter)
            until(lambda: is_waited_for(lock))
        entered.wait(PATIENCE_S)
        found = lock.exists()
        leave.set()
        second.result()

    assert found
    assert [] == [*tmp_path.iterdir()]


def test_the_lock_is_held_until_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file before it releases the lock: else it would remove the file that the next holder has
    locked, and a third one would lock another file.
    """
    really_unlink, held = Path.unlink, list[bool]()

    def unlink(path: Path, *, missing_ok: bool = False) -> None:
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        really_unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with alone_at(tmp_path / "x"):
        pass

    assert [True] == held


def test_a_place_is_tried_by_nobody_else_meanwhile(tmp_path: Path) -> None:
    """The check whether a service could listen waits while another one looks for a listener, or begins to listen."""
    place = tmp_path / "x"
    with ThreadPoolExecutor() as threads:
        with alone_at(place):
            tried = threads.submit(check_place, str(place))
            until(lambda: is_waited_for(tmp_path / "x.lock") or tried.done())

            assert not tried.done()
        tried.result()


def test_a_service_that_ends_takes_no_path_from_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that ends listens until it has removed its socket, and so never removes the next service's."""
    place, really_unlink = tmp_path / "x", Path.unlink
    with closing(Reactor()) as reactor, ExitStack() as held:
        first = Server(str(place), reactor, lambda *_: None)

        def come_before(path: Path, missing_ok: bool = False) -> None:  # noqa: FBT002 - as Path has it
            monkeypatch.undo()
            with pytest.raises(ConfigError, match="listens there already"):
                held.enter_context(listen(place))
            really_unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", come_before)
        first.close()


def test_a_service_whose_socket_was_removed_leaves_the_path_to_the_next(tmp_path: Path) -> None:
    """A service whose socket somebody has removed does not remove that of the service that listens there now."""
    place = tmp_path / "x"
    with closing(Reactor()) as reactor:
        first = Server(str(place), reactor, lambda *_: None)
        place.unlink()
        with listen(place), socket.socket(socket.AF_UNIX) as client:
            first.close()
            assert 0 == client.connect_ex(str(place))


@pytest.mark.usefixtures("descriptors")
def test_a_holder_that_is_stopped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that waits too long for the lock of another process gives up, and says which process to continue. It is
    started again: it does not end as after a mistake, when systemd would drop what it keeps of the disks in service.
    """
    monkeypatch.setattr(listening, "PATIENCE_S", 0.1)
    place = tmp_path / "x"
    code = "import sys; from pathlib import Path; from xenbackend.supervisor.service.listening import alone_at\n"
    code += "with alone_at(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(place)]
    with (
        ThreadPoolExecutor() as threads,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder,
    ):
        assert holder.stdout
        holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(XenbackendError) as caught:
                threads.submit(listen, place).result(PATIENCE_S)
        finally:
            holder.send_signal(signal.SIGCONT)
            holder.communicate()
    listen(place).close()

    assert f"process {holder.pid} has held the lock {place}.lock for 0.1 s; continue" in str(caught.value)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(("code", "is_mistake"), [(errno.ENOSPC, False), (errno.EMFILE, False), (errno.EACCES, True)])
def test_a_host_that_is_short_of_something_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, *, is_mistake: bool
) -> None:
    """If the file system is full or no descriptor is left, a service ends so that it is started again; only after a
    mistake it is not.
    """

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(XenbackendError, match=os.strerror(code)) as caught:
            listen(tmp_path / "x")

    assert is_mistake == isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_stands_in_the_way_of_the_lock_is_named(tmp_path: Path, kind: str) -> None:
    """Something else at the place of the lock file is named, and left alone; a lock file left by SIGKILL is used."""
    place, lock, other = tmp_path / "x", tmp_path / "x.lock", tmp_path / "other"
    lock.touch()
    with listen(place):
        place.unlink()
    if kind == "link":
        lock.symlink_to(other)
    else:
        lock.mkdir()
    with pytest.raises(ConfigError, match=rf"{place}: cannot listen: {lock}: \w"):
        listen(place)

    assert [lock] == [*tmp_path.iterdir()]


def test_whoever_accepts_nobody_is_not_replaced(tmp_path: Path) -> None:
    """A service that hangs still listens, however many clients wait for it: another one is refused at once."""
    place = tmp_path / "x"
    with socket.socket(socket.AF_UNIX) as hanging, ExitStack() as clients:
        hanging.bind(str(place))
        hanging.listen(0)
        code = 0
        while not code:
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            code = client.connect_ex(str(place))
        with pytest.raises(ConfigError, match="listens there already"):
            listen(place)


def test_whoever_accepts_nobody_keeps_its_own_place(tmp_path: Path) -> None:
    """An inherited socket for which many clients wait is no other service's."""
    place = tmp_path / "x"
    with listen(place) as near, ExitStack() as clients:
        near.listen(0)
        code = 0
        while not code:
            client = clients.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            code = client.connect_ex(str(place))
        check_place(str(place), near.fileno())
        taken = take_over(place, os.dup(near.fileno()))

        assert taken is not None
        taken.close()


def test_missing_directory_is_named(tmp_path: Path) -> None:
    """If the socket's directory is missing, the error names the directory to make."""
    with pytest.raises(ConfigError, match=r"make the directory .*/none"):
        listen(tmp_path / "none" / "x")


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """Only a socket is replaced: a file that was named by mistake is left alone."""
    file = tmp_path / "precious"
    file.write_text("x")
    with pytest.raises(ConfigError, match="it is not a socket"):
        listen(file)

    assert "x" == file.read_text()


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    """The check whether a service could listen leaves no file behind. It accepts a place where the given inherited
    socket listens already.
    """
    place, other = tmp_path / "x", tmp_path / "y"
    check_place(str(place))
    assert [] == [*tmp_path.iterdir()]
    with listen(place) as first:
        check_place(str(place), first.fileno())
        check_place(str(other), first.fileno())
        with pytest.raises(ConfigError, match="listens there already"):
            check_place(str(place))
        assert [place] == [*tmp_path.iterdir()]


def test_another_services_socket_is_not_taken_for_the_inherited_one(tmp_path: Path) -> None:
    """If another service listens at the path of an inherited socket, the check names it; a socket that nobody listens
    at is replaced.
    """
    place = tmp_path / "x"
    code = "import sys; from pathlib import Path; from xenbackend.supervisor.service.listening import listen\n"
    code += "near = listen(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(place)]
    with listen(place) as first:
        place.unlink()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout
            other.stdout.readline()
            with pytest.raises(ConfigError, match="another xenbackend service listens there already"):
                check_place(str(place), first.fileno())
            other.communicate()
        assert place.is_socket()
        assert None is take_over(place, os.dup(first.fileno()))


def test_our_own_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the unit's runtime directory is missing, the service makes it, for root alone."""
    own = tmp_path / "xenbackend"
    monkeypatch.setattr(listening, "OWN_DIRECTORY", own)
    with closing(Reactor()) as reactor:
        Server(str(own / "x"), reactor, lambda *_: None).close()

    assert 0o700 == own.stat().st_mode & 0o777


def test_a_socket_that_nobody_can_reach_is_not_taken_over(tmp_path: Path) -> None:
    """If the file of an inherited socket is gone, or the settings name another path, the service makes a new socket."""
    path = tmp_path / "x"
    for wanted in (path, tmp_path / "y"):
        with closing(Reactor()) as reactor:
            first = Server(str(path), reactor, lambda *_: None)
            kept = os.dup(first.fileno())
            first.close(leaves=True)
            if wanted == path:
                path.unlink()
            else:
                os.mknod(wanted, 0o600 | stat.S_IFSOCK)  # left by somebody else
            second = Server(str(wanted), reactor, lambda *_: None, kept)

            with socket.socket(socket.AF_UNIX) as client:
                assert 0 == client.connect_ex(str(wanted))
            second.close()
