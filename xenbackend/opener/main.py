"""The process that opens files, devices and sockets for one worker: one job, then one question after the other.

Must not wait for a lock (it waits only for its turn to make a key), keep a copy of what it has handed over, or open
anything for a worker once its supervisor has gone: a name whose file nobody keeps could mean another file to the next
worker.

A call to storage that does not answer may hang: then this process and its worker hang, and nothing else. A thread that
watches the calls tells the supervisor.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import assert_never

from xenbackend.block.keys import Derivation
from xenbackend.block.servers import DISK
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.kernel import locks, memfd
from xenbackend.kernel.ports import open_devices
from xenbackend.opener import steps
from xenbackend.opener.access import Access, kept_of
from xenbackend.opener.certificates import read_certificates
from xenbackend.opener.cluster import boot_id, read_settings
from xenbackend.opener.connecting import Connections
from xenbackend.opener.deriving import Work, derive
from xenbackend.opener.listening import listen
from xenbackend.opener.newfile import NewFile
from xenbackend.opener.watch import Watch
from xenbackend.protocol import codec, datagrams, jobs, opening
from xenbackend.protocol.messages import MAX_MEMORIES, SENTENCE_MAX
from xenbackend.protocol.opening import Given

_MOST_MEMORIES = 2 * MAX_MEMORIES  # for one order: of another chain, and of the former one where that fails
BREACH = 3  # exit status: the worker sent what no worker of ours sends


class SupervisorGone(Exception):
    """The supervisor has gone, so that nobody keeps what is opened."""


class Attendant:
    """Answers the questions of one worker."""

    def __init__(
        self,
        job: jobs.Job,
        supervisor: socket.socket,
        worker: socket.socket,
        kept: dict[str, int],
        connections: Sequence[int] = (),
    ) -> None:
        """Open nothing yet. `kept` are O_PATH descriptors by name, ours from now on, as are the connections."""
        self._job = job
        self._supervisor = supervisor
        self._worker = worker
        self._kept = kept
        self._connections = Connections(job, connections)
        self._access: Access | None = None  # made at the first question, whose answer tells what is wrong with a chain
        self._new: NewFile | None = None
        self._work = Work()
        self._memories = 0  # that were made

    def serve(self) -> int:
        """Answer until the worker closes its end, and return the exit status."""
        watch = Watch(lambda name: self._say_waits(name, makes_key=isinstance(question, opening.Derive)))
        try:
            while datagram := self._worker.recv(opening.MAX_MESSAGE):
                try:
                    question = opening.from_worker(datagram)
                except codec.NotAMessage:
                    return BREACH
                with watch.over(self._about(question)):
                    answer, fds = self.answer(question)
                try:
                    datagrams.send(self._worker, opening.encode(answer), fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except (ConnectionResetError, BrokenPipeError):
            pass
        finally:
            watch.close()
            self.close()
        return 0

    def close(self) -> None:
        """Close everything, and remove a new file that was not published."""
        self._connections.close()
        if self._access is not None:
            self._access.close()
        if self._new is not None:
            self._new.abandon()
            self._new = None

    def answer(self, question: opening.Question) -> tuple[Given, list[int]]:
        """Return the answer to one question, and the descriptors that were opened for it, the caller's."""
        fds: list[int] = []
        if self._job.only_connects and not isinstance(question, opening.ConnectTo):
            return _refusal(question), fds
        try:
            answer = self._do(question, fds)
        except XenbackendError as problem:
            code, path = getattr(problem, "errno", 0) or errno.EINVAL, getattr(problem, "path", "")
            answer = Given(code, _plain(getattr(problem, "problem", "") or str(problem)), path)
        except OSError as problem:
            sentence = "" if problem.errno else _plain(str(problem))
            answer = Given(problem.errno or errno.EINVAL, sentence, str(problem.filename or ""))
        except SupervisorGone:  # the worker may go on: what is kept it can still get
            answer = Given(
                errno.ECONNABORTED, "the service has ended meanwhile, so nothing would keep what is opened now"
            )
        except AssertionError:
            raise
        except Exception as bug:  # of ours, or of a driver's options: the worker has to know
            answer = Given(errno.EIO, _plain(f"the opener could not do it: {type(bug).__name__}: {bug}"))
        return answer, fds

    def _do(self, question: opening.Question, fds: list[int]) -> Given:
        job, access = self._job, self._access
        if access is None:
            access = self._access = Access(job, self._kept, self._tell)
        match question:
            case opening.LookAt() | opening.FindFile() | opening.OpenFile() | opening.Resolve():
                return _do_with_file(access, question, fds)
            case opening.LookBeside() | opening.SayWhoUses():
                return _look_for_users(access, question)
            case opening.MakeFile() | opening.Publish():
                return self._do_with_new_file(access, question, fds)
            case opening.OpenDevices() | opening.Listen() | opening.MakeMemory():
                return self._do_without_file(question, fds)
            case opening.Derive():
                access.check_key(question.source, question.chain)
                fds.append(_derive(question, job.turns, self._work))
            case opening.ConnectTo():
                fds.append(
                    self._connections.connect(question, access.server(question.server, question.chain), self._say)
                )
            case opening.ReadCluster() | opening.ReadCertificates():
                return Given(settings=_read_settings(access, question, job.vbd))
            case _:
                assert_never(question)
        return Given()

    def _do_with_new_file(self, access: Access, question: opening.MakeFile | opening.Publish, fds: list[int]) -> Given:
        if isinstance(question, opening.MakeFile) and self._job.makes and self._new is None:
            access.check_names()
            self._new = NewFile(self._job.makes)
            fds.append(os.dup(self._new.fd))
            return Given()
        if isinstance(question, opening.Publish) and self._new is not None:
            is_marked = access.mark_child(self._new.fd)
            self._new.publish()
            return Given(is_marked=is_marked)
        return _refusal(question)

    def _do_without_file(
        self, question: opening.OpenDevices | opening.Listen | opening.MakeMemory, fds: list[int]
    ) -> Given:
        match question:
            case opening.OpenDevices() if self._job.host:
                fds += open_devices(self._job.host, self._job.frontend_domid)
            case opening.Listen() if self._job.export:
                fds.append(listen(self._job.export))
            case opening.MakeMemory():
                fds.append(self._make_memory(question))
            case _:
                return _refusal(question)
        return Given()

    def _make_memory(self, question: opening.MakeMemory) -> int:
        """Return a memory that the supervisor keeps, too. Raises: DriverError, KernelError, SupervisorGone."""
        if self._memories >= _MOST_MEMORIES:
            raise DriverError(f"one order makes at most {_MOST_MEMORIES} memories", errno=errno.ENOSPC)
        if question.size <= 0:
            raise DriverError(f"no memory has {question.size} bytes", errno=errno.EINVAL)
        self._memories += 1
        fd = memfd.make("xenbackend", question.size)
        try:
            refusal = self._say(opening.Made(question.name), [fd])
            if refusal:
                raise DriverError(refusal, errno=errno.ENOSPC)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _about(self, question: opening.Question) -> str:
        """Return the name of the file that a question is about; empty if it is about none."""
        match question:
            case opening.FindFile():
                return question.named_by
            case opening.MakeFile() | opening.Publish():
                return self._job.makes
            case opening.ConnectTo():
                return question.server
            case opening.Derive():
                return question.source
            case opening.ReadCluster():
                return question.conf
            case opening.ReadCertificates():
                return question.directory
            case opening.OpenDevices() | opening.Listen() | opening.MakeMemory():
                return ""  # no storage can delay these
        return question.name

    def _say_waits(self, name: str, *, makes_key: bool) -> None:
        with suppress(OSError):  # the supervisor has gone, or does not read now
            self._supervisor.send(opening.encode(opening.Waits(name, makes_key)), socket.MSG_DONTWAIT)

    def _tell(self, found: opening.Opened, fd: int) -> str:
        """Hand a file to the supervisor, wait for its answer, and return why the worker may not have it, if so."""
        return self._say(found, [fd])

    def _say(self, found: opening.Found, fds: Sequence[int]) -> str:
        """Send what was found, with its descriptors; after the answer return why the worker may not have it, if so."""
        try:
            datagrams.send(self._supervisor, opening.encode(found), fds)
            datagram = self._supervisor.recv(opening.MAX_MESSAGE)
        except OSError:
            raise SupervisorGone from None
        if not datagram:
            raise SupervisorGone
        ack = opening.from_supervisor(datagram)
        if not isinstance(ack, opening.Ack):
            raise SupervisorGone
        return ack.refusal


def look_up(supervisor: socket.socket, look: opening.FromSupervisor) -> None:
    """Tell the supervisor what names mean now, one after the other, until it asks for no more."""
    try:
        while isinstance(look, opening.Look):
            for name in look.names:
                supervisor.send(opening.encode(_meaning(name)))
            datagram = supervisor.recv(opening.MAX_MESSAGE)
            if not datagram:
                return
            look = opening.from_supervisor(datagram)
    except (ConnectionResetError, BrokenPipeError):
        pass


def _meaning(name: str) -> opening.Meaning:
    try:
        fd = steps.hold(name)
        try:
            return opening.Meaning(name, steps.identify(fd))
        finally:
            os.close(fd)
    except (XenbackendError, OSError) as problem:
        return opening.Meaning(name, errno=getattr(problem, "errno", 0) or errno.EIO)


def serve(supervisor: socket.socket) -> int:
    """Take one job from the supervisor, serve its worker, and return the exit status."""
    datagram, fds, _ = datagrams.receive(supervisor, opening.MAX_MESSAGE, opening.MAX_CARRIED)
    if not datagram:
        return 0
    job = opening.from_supervisor(datagram)
    if isinstance(job, opening.Look):
        look_up(supervisor, job)
        return 0
    assert isinstance(job, jobs.Job)  # noqa: S101 - a supervisor sends nothing else at first
    while len(fds) < 1 + len(job.kept) + len(job.connections):
        datagram, more, _ = datagrams.receive(supervisor, opening.MAX_MESSAGE, opening.MAX_CARRIED)
        if not datagram:
            return 0
        fds += more
    with socket.socket(fileno=fds[0]) as worker:
        first = 1 + len(job.kept)
        return Attendant(job, supervisor, worker, kept_of(job, fds[1:first]), fds[first:]).serve()


def main(arguments: list[str]) -> int:
    """Serve over the socket to the supervisor whose number is given; return the exit status."""
    if len(arguments) != 2 or arguments[0] != "--socket" or not arguments[1].isdecimal():
        print("an opener is started by the service, with --socket and the number of a descriptor", file=sys.stderr)
        return 2
    return serve(datagrams.inherited(int(arguments[1])))


def _refusal(question: opening.Question) -> Given:
    return Given(errno.EACCES, f"the job is of no {type(question).__name__}")


def _do_with_file(
    access: Access, question: opening.LookAt | opening.FindFile | opening.OpenFile | opening.Resolve, fds: list[int]
) -> Given:
    match question:
        case opening.LookAt():
            return Given(facts=access.look(question.name, question.chain))
        case opening.FindFile():
            found = access.find(question.what, question.named_by, question.names, question.chain)
            return Given(path=found.path, by=found.by)
        case opening.OpenFile():
            fd, facts = access.open(
                question.name, question.chain, write=question.write, create=question.create, claims=question.claims,
                stands_in=question.stands_in,
            )  # fmt: skip
            fds.append(fd)
            return Given(facts=facts)
        case opening.Resolve():
            return Given(path=access.resolve(question.name, question.chain))


def _read_settings(
    access: Access, question: opening.ReadCluster | opening.ReadCertificates, vbd: str
) -> dict[str, str]:
    if isinstance(question, opening.ReadCertificates):
        return read_certificates(access.credentials(question.directory, question.chain))
    found = read_settings(access.account(question.conf, question.user, question.chain))
    return {**found, DISK: f"{boot_id()} {vbd}"}


def _derive(question: opening.Derive, turns: str, work: Work) -> int:
    """Return the descriptor of a memory with the key. Raises: DriverError, OSError, KernelError."""
    try:
        salt = bytes.fromhex(question.salt)
    except ValueError:
        raise DriverError("the salt is not hexadecimal", errno=errno.EINVAL) from None
    how = Derivation(
        question.function, salt, question.length, question.iterations, question.hash,
        question.memory_kib, question.lanes,
    )  # fmt: skip
    work.take(how)
    key = derive(question.source, how, turns, without_newline=question.without_newline)
    try:
        fd = memfd.make("xenbackend-key", len(key))
        memfd.map_sealed(fd, len(key))[:] = key
    finally:
        key[:] = bytes(len(key))
    return fd


def _look_for_users(access: Access, question: opening.LookBeside | opening.SayWhoUses) -> Given:
    wanted = locks.access(read_only=not question.write, shareable=question.shareable)
    if isinstance(question, opening.LookBeside):
        return Given(errno.EBUSY if access.is_used_beside(question.name, question.chain, wanted) else 0)
    found = access.why_in_use(
        question.name, question.chain, wanted, is_claimed=question.is_claimed, with_names=question.with_names
    )
    return Given(errno.EBUSY, _plain(found.problem), found.path, user=_plain(found.user))


def _plain(sentence: str) -> str:
    """Return any text as a sentence that fits into a message: not longer than SENTENCE_MAX, and valid as UTF-8."""
    return sentence[:SENTENCE_MAX].encode(errors="backslashreplace").decode()[:SENTENCE_MAX]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
