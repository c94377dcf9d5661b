"""The opener as its worker sees it: asked over a socket, it opens the files, devices and sockets for this process.

Must not look at a path. A call waits for its answer, as a system call would: it is made while a chain is opened, and
if the chain's storage hangs, no guest could be served anyhow.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress

from xenbackend.block.driver import Found
from xenbackend.block.keys import Derivation
from xenbackend.block.servers import Account, After, Endpoint
from xenbackend.errors import ConfigError, DriverError, KernelError
from xenbackend.kernel import memfd
from xenbackend.kernel.inuse import InUse
from xenbackend.kernel.locks import Access
from xenbackend.protocol import codec, datagrams, opening
from xenbackend.protocol.opening import Facts, Given, Question

QUESTION_S = 5.0  # for a question of the supervisor, as the guest waits; less than clients wait for the order
_MOST_CARRIED = 2  # descriptors beside one answer: both devices


class OpenerLate(DriverError):
    """Storage does not answer, and the guest must not wait any longer for what was asked."""

    def __init__(self) -> None:
        super().__init__(f"its storage has not answered for {QUESTION_S:.0f} s", errno=errno.ETIMEDOUT)


class OpenerGone(DriverError):
    """The opener or its supervisor has ended; a successor of this process gets another opener."""

    def __init__(self) -> None:
        super().__init__("the process that opens its files has ended", errno=errno.EPIPE)


class NoOpener:
    """Refuses everything: between two orders nothing may be opened."""

    def hold(self, path: str) -> None:
        """Refuse it."""
        raise _refusal(path)

    def release(self, path: str) -> None:
        """Do nothing: another opener has opened the file."""

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, Facts]:
        """Refuse it."""
        raise _refusal(path)

    def is_used_beside(self, path: str, fd: int, access: Access) -> bool:
        """Refuse it."""
        raise _refusal(path)

    def why_in_use(self, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Refuse it."""
        raise _refusal(path)

    def is_stand_in(self, path: str) -> bool:
        """See `worker.files.Opener`: nothing is open."""
        return False

    def open_record(self, path: str, *, creates: bool = True) -> int:
        """Refuse it."""
        raise _refusal(path)

    def look(self, path: str) -> Facts:
        """Refuse it."""
        raise _refusal(path)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Refuse it."""
        raise _refusal(image)

    def resolve(self, path: str) -> str:
        """Refuse it."""
        raise _refusal(path)

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Refuse it."""
        raise _refusal(str(endpoint))

    def derive(self, source: str, how: Derivation, *, without_newline: bool) -> memoryview:
        """Refuse it."""
        raise _refusal(source)

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Refuse it."""
        raise _refusal(account.conf)

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """Refuse it."""
        raise _refusal(directory)


class RemoteOpener:
    """The opener of one order or question, for one chain of its job."""

    def __init__(self, near: socket.socket, chain: int = 0, patience_s: float | None = None) -> None:
        """Use a socket that the supervisor gave; `chain` is an index of `Job.chains`.

        `patience_s` limits the wait for an answer, for a guest in service that can do without it; None: no limit.
        """
        self.chain = chain
        self._socket = near
        self._patience_s = patience_s
        near.settimeout(patience_s)

    def for_chain(self, chain: int) -> RemoteOpener:
        """Return the same opener for another chain of its job."""
        return type(self)(self._socket, chain, self._patience_s)

    def hold(self, path: str) -> None:
        """Do nothing: to the opener a name means the same file as long as the opener lives."""

    def release(self, path: str) -> None:
        """Do nothing, as `hold`."""

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, Facts]:
        """Return a descriptor of a new open file description, and the facts of the file.

        Raises: DriverError; OSError, with EBUSY if it `claims` a device that somebody else uses.
        """
        given, fds = self._ask(opening.OpenFile(path, write=write, claims=claims, chain=self.chain), 1)
        try:
            return fds[0], _facts(given)
        except OpenerGone:
            os.close(fds[0])
            raise

    def is_used_beside(self, path: str, fd: int, access: Access) -> bool:
        """Return whether an image that we have locked is used by another face. Raises: DriverError, OSError."""
        question = opening.LookBeside(path, write=access.writes, shareable=access.is_shared, chain=self.chain)
        try:
            self._ask(question, 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            raise
        return False

    def why_in_use(self, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Return the error for an image that somebody else claims or has locked. Raises: DriverError, OSError."""
        question = opening.SayWhoUses(
            path, access.writes, access.is_shared, is_claimed=is_claimed, with_names=with_names, chain=self.chain
        )
        try:
            self._ask(question, 0)
        except InUse as found:
            return found
        raise OpenerGone

    def is_stand_in(self, path: str) -> bool:
        """See `worker.files.Opener`: it is not known here, and nothing is written to files that must not be created."""
        return False

    def open_record(self, path: str, *, creates: bool = True) -> int:
        """Return a descriptor of a record file, which is made if it is not there. Raises: DriverError, OSError.

        If not `creates`, another file stands for one that a chain which is to be put in would make.
        """
        question = opening.OpenFile(path, write=True, create=True, chain=self.chain, stands_in=not creates)
        return self._ask(question, 1)[1][0]

    def look(self, path: str) -> Facts:
        """Return what a file is. Raises: DriverError, OSError."""
        return _facts(self._ask(opening.LookAt(path, self.chain), 0)[0])

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Return the file that an image names, if it may be followed there. Raises: DriverError.

        The opener takes `within` from the chain's text itself.
        """
        given = self._ask(opening.FindFile(what, image, list(names)[: opening.MAX_NAMES], self.chain), 0)[0]
        return Found(given.path, given.by)

    def resolve(self, path: str) -> str:
        """Return the directory of a file with all links followed. Raises: DriverError."""
        return self._ask(opening.Resolve(path, self.chain), 0)[0].path

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Return a socket connected to a server, as `opening.ConnectTo`. Raises: DriverError, OSError."""
        question = opening.ConnectTo(str(endpoint), place, after.value, keeps, self.chain)
        return socket.socket(fileno=self._ask(question, 1)[1][0])

    def derive(self, source: str, how: Derivation, *, without_newline: bool) -> memoryview:
        """Return a key that is made of a passphrase, as `block.driver.Files.derive`. Raises: DriverError, OSError."""
        question = opening.Derive(
            source, how.function, how.salt.hex(), how.length, how.iterations, how.hash, how.memory_kib, how.lanes,
            without_newline, self.chain,
        )  # fmt: skip
        try:
            fd = self._ask(question, 1)[1][0]
        except OpenerLate:
            problem = f"its key takes longer than {QUESTION_S:.0f} s to derive, and the guest would have to wait for it"
            raise DriverError(
                f"{problem}; detach the disk, and attach it again with this chain", errno=errno.ETIMEDOUT
            ) from None
        try:
            return memfd.map_sealed(fd, how.length)
        except KernelError as error:
            raise OSError(error.errno, str(error)) from None
        finally:
            os.close(fd)

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Return what a client of a cluster has to know, as `opening.ReadCluster`. Raises: DriverError, OSError."""
        return self._ask(opening.ReadCluster(account.conf, account.user, self.chain), 0)[0].settings

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """Return certificates for TLS, as `opening.ReadCertificates`. Raises: DriverError, OSError."""
        return self._ask(opening.ReadCertificates(directory, self.chain), 0)[0].settings

    def fileno(self) -> int:
        """Return the descriptor at which the answer to `begin_connect` comes."""
        return self._socket.fileno()

    def begin_connect(self, endpoint: Endpoint, place: int, after: After) -> None:
        """Ask for a connection for a disk in service; `end_connect` returns it, and waits if it must."""
        with suppress(OSError):  # if the opener has ended, `end_connect` finds that out
            self._socket.send(opening.encode(opening.ConnectTo(str(endpoint), place, after.value, True, self.chain)))

    def end_connect(self) -> socket.socket:
        """Return the socket that was asked for. Raises: DriverError, OSError."""
        return socket.socket(fileno=self._checked(*self._receive(), 1)[1][0])

    def make(self) -> int:
        """Return a descriptor of the new file that the job is to make. Raises: ConfigError, OSError."""
        try:
            return self._ask(opening.MakeFile(), 1)[1][0]
        except DriverError as problem:
            raise ConfigError(problem.problem) from problem

    def publish(self) -> bool:
        """Give the new file its name, and return whether it is marked with its parent.

        Raises: ConfigError, where the name is taken meanwhile; OSError.
        """
        try:
            return self._ask(opening.Publish(), 0)[0].is_marked
        except DriverError as problem:
            raise ConfigError(problem.problem) from problem

    def make_memory(self, name: str, size: int) -> int:
        """Return the descriptor of a new memory, as `opening.MakeMemory`. Raises: DriverError, OSError."""
        return self._ask(opening.MakeMemory(name, size), 1)[1][0]

    def open_devices(self) -> list[int]:
        """Return the devices' descriptors, as `kernel.ports.open_devices`. Raises: DriverError, OSError."""
        return self._ask(opening.OpenDevices(), None)[1]

    def listen(self) -> socket.socket:
        """Return the socket for the export. Raises: DriverError, OSError."""
        return socket.socket(fileno=self._ask(opening.Listen(), 1)[1][0])

    def close(self) -> None:
        """Let the opener end."""
        self._socket.close()

    def _ask(self, question: Question, carried: int | None) -> tuple[Given, list[int]]:
        """Ask, and return the answer with exactly `carried` descriptors, or with any number if that is None."""
        return self._checked(*self._transact(question), carried)

    def _transact(self, question: Question) -> tuple[opening.FromOpener | None, list[int]]:
        """Send a question, and return the answer with its descriptors; None if none comes."""
        try:
            self._socket.send(opening.encode(question))
        except OSError:
            return None, []
        return self._receive()

    def _checked(
        self, given: opening.FromOpener | None, fds: list[int], carried: int | None
    ) -> tuple[Given, list[int]]:
        if isinstance(given, Given) and given.errno:
            carried = 0
        if not isinstance(given, Given) or (carried is not None and len(fds) != carried):
            for fd in fds:
                os.close(fd)
            raise OpenerGone
        if given.sentence and given.errno == errno.EBUSY:
            raise InUse(given.sentence, given.path, given.user)
        if given.sentence:
            raise DriverError(given.sentence, path=given.path, errno=given.errno)
        if given.errno:
            raise OSError(given.errno, os.strerror(given.errno), given.path or None)
        return given, fds

    def _receive(self) -> tuple[opening.FromOpener | None, list[int]]:
        """Return an answer with its descriptors; None if none comes."""
        fds: list[int] = []
        try:
            datagram, fds, _ = datagrams.receive(self._socket, opening.MAX_MESSAGE, _MOST_CARRIED)
            return opening.from_opener(datagram), fds
        except TimeoutError:
            self._socket.shutdown(socket.SHUT_RDWR)  # a late answer would be taken for that to another question
            raise OpenerLate from None
        except (OSError, codec.NotAMessage):
            return None, fds


def _refusal(path: str) -> DriverError:
    problem = f"{path} was to be opened while no order under way may open files"
    return DriverError(problem, path=path, errno=errno.EPERM)


def _facts(given: Given) -> Facts:
    if given.facts is None:
        raise OpenerGone
    return given.facts
