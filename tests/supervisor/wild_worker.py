"""A worker that was taken over: it serves for a moment, then says and does anything that may harm its supervisor.

Must not harm anything but the supervisor: it runs as the real one does.

Disks of `null:` get it, all others a real worker (`--socket N`), forked by the real zygote or not (`--host …`).
`Wild.DEEDS` has what it does in turn; most of its messages are valid, so that it lives for a while. The file that
`WILD` names counts how often each deed was done, for the test to read (`Words`).
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import select
import socket
import sys
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tests.supervisor.fake_worker import FakeWorker
from xenbackend import journal
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.units import PAGE
from xenbackend.walls.raising import Wall, Walls
from xenbackend.worker import birth, zygote
from xenbackend.worker import main as real

ENVIRONMENT = "WILD"
HEARD, IS_CALM, SEED = 0, 1, 2  # words: messages taken by the service; 1: be calm; the seed
DISK_WORDS = 64  # per disk: its lives, then how often each deed was done; last OPENERS
OPENERS = 63  # how many openers came to connect it to servers, of which it has none
DISKS = 7
NAMES = [f"memory-{number}" for number in range(messages.MAX_MEMORIES // 2)]
ODD: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, -(2**70), 1.5, 1e308, "", "\0", "\ud800", "\udc80", "x" * 5000, [], {},
    [[]], {"kind": "Open"}, ["x"] * 4097, {"": ""}, "aio:/etc/shadow", "null:3G", "serving", "ok", [0] * 100,
]  # fmt: skip
_WILD = 60  # one of so many messages is a deed
_WANTS_S = 1.0  # for which it wants connections
_PATIENCE_S = 20.0  # if it is not killed by then it ends, and the test fails


class Words:
    """The 64-bit words that the test, the service and all wild workers share; each is written by one of them only."""

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), PAGE)).cast("Q")

    @staticmethod
    def make(path: Path, seed: int) -> Words:
        """Make the file."""
        path.write_bytes(bytes(PAGE))
        words = Words(str(path))
        words.words[SEED] = seed
        return words

    def deeds(self) -> dict[str, int]:
        """Return how often each deed was done."""
        rows = [self.words[DISK_WORDS * disk : DISK_WORDS * (disk + 1)] for disk in range(1, DISKS + 1)]
        return {name: sum(row[1 + place] for row in rows) for place, name in enumerate(Wild.DEEDS)}

    def openers(self) -> int:
        """Return how many openers have come to connect a wild worker to a server."""
        return sum(self.words[DISK_WORDS * disk + OPENERS] for disk in range(1, DISKS + 1))

    def lives(self) -> int:
        """Return how many wild workers there have been."""
        return sum(self.words[DISK_WORDS * disk] for disk in range(1, DISKS + 1))


class Wild:
    """A wild worker with its socket `near`, which was told to open a chain."""

    def __init__(self, near: socket.socket, words: Words) -> None:
        self._near = near
        self._words = words
        self._fake = FakeWorker()
        self._heard: list[bytes] = [b"{}"]
        self._fds: list[int] = []  # the journal, and memories of a predecessor
        self._asked: list[int] = []
        self._names = [*NAMES, "odd", "x", *(f"another-{number}" for number in range(messages.MAX_MEMORIES + 1))]
        self._row = memoryview(array("Q", bytes(8 * DISK_WORDS)))
        self._disk = 0
        self._random = Random(0)

    def run(self) -> None:
        """Serve for a moment, then do anything until killed."""
        while self._fake.standing.stage is not Stage.SERVING:
            if not self._obey():
                return
        self._progress()
        while self._is_calm() or self._random.randrange(4):
            if self._is_calm():
                self._say(*(messages.Drop(name) for name in self._names))
                self._names = []
            if not self._obey(0.05 if self._is_calm() else 0.002):
                return
        self._say(*(messages.Drop(name) for name in self._names[len(NAMES) :]))  # the memories of a predecessor
        give_up = time.monotonic() + _PATIENCE_S
        while time.monotonic() < give_up and not self._is_calm():
            self._obey(0)
            if self._random.randrange(_WILD):
                self._random.choice(self._HARMLESS)(self)
            else:
                done = sum(self._row[1:OPENERS])
                self._do([*self.DEEDS][(3 * self._disk + done) % len(self.DEEDS)])  # each has its turn
        os._exit(7)

    def _is_calm(self) -> bool:
        return bool(self._words.words[IS_CALM])

    def _do(self, name: str) -> None:
        self._row[1 + [*self.DEEDS].index(name)] += 1
        self.DEEDS[name](self)

    def _obey(self, timeout_s: float | None = None) -> bool:
        """Take one message, if one comes in time, and mostly obey it; return False if the service has gone."""
        if not select.select([self._near], [], [], timeout_s)[0]:
            return True
        message = self._take()
        if message is None:
            return False
        if isinstance(message, messages.Close):
            self._say(*self._fake.answers(message))
            return False
        if isinstance(message, messages.Ask) and not self._is_calm() and not self._random.randrange(3):
            self._do("wrong reply")
        elif not isinstance(message, messages.Reply):
            self._say(*self._fake.answers(message))
        return True

    def _take(self) -> messages.FromSupervisor | None:
        """Take a message that has come; return None if the service has gone."""
        try:
            datagram, fds, _, _ = socket.recv_fds(self._near, messages.MAX_MESSAGE, 70)
        except OSError:
            return None
        if not datagram:
            return None
        self._heard = [*self._heard[-9:], datagram]
        message = codec.from_supervisor(datagram)
        if isinstance(message, messages.Open):
            self._open(message, fds)
        else:
            for fd in fds:
                os.close(fd)
        if isinstance(message, messages.Ask):
            self._asked.append(message.id)
            self._row[OPENERS] += isinstance(message.question, messages.Reconnect)
        return message

    def _open(self, message: messages.Open, fds: list[int]) -> None:
        self._fake.journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
        self._fds = fds
        self._disk = disk = message.frontend_domid
        self._row = self._words.words[DISK_WORDS * disk : DISK_WORDS * (disk + 1)]
        self._random = Random(f"{self._words.words[SEED]} {disk} {self._row[0]}")
        self._row[0] += 1
        self._fake.no_walls = self._no_walls()

    def _progress(self) -> None:
        """Let the guest seem to have got an answer, so that a successor comes at once."""
        words = self._fake.journal[journal.RINGS_AT : journal.RINGS_AT + PAGE].cast("Q")
        words[journal.RING_ENTRIES] = 32
        words[journal.REQ_CONS] = (words[journal.REQ_CONS] + 1) & (2**40 - 1)

    def _say(self, *said: messages.Message) -> None:
        for each in said:
            self._send(codec.encode(each))

    def _send(self, datagram: bytes, fds: list[int] | None = None) -> None:
        """Send a datagram, however long the service takes to read."""
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._near, [datagram], fds or [])

    # valid messages

    def _stand(self) -> None:
        texts = ["", "", "it broke", "x" * 3000, "\0\n\t\x1b[2J", "\udcff"]
        halted, trouble = self._random.choice(texts), self._random.choice(texts)
        self._fake.standing = replace(self._fake.standing, halted=halted, trouble=trouble)
        self._say(self._fake.standing)

    def _stand_as_before(self) -> None:
        old = replace(self._fake.standing, number=self._random.choice([-1, 0, 5]), trouble="it broke")
        self._say(self._random.choice([old, self._fake.standing]))

    def _log(self) -> None:
        level = self._random.choice(["info", "critical", "nonsense", "", "x" * 1000])
        self._say(messages.Log(level, "I am a line\n" * self._random.randrange(400), self._random.randrange(3)))

    def _drop(self) -> None:
        self._say(messages.Drop(self._random.choice([*NAMES, "", "nothing", "\udcff" * 4096])))

    def _ask(self) -> None:
        self._say(messages.Ask(self._random.choice([0, 1, -5, 2**63]), messages.Command("0", "get", [])))
        self._obey(1.0)

    # breaches and other attacks

    def _valid(self) -> dict[str, Any]:
        said = self._random.choice([
            self._fake.standing, messages.Log("info", "x"), messages.Drop("x"), messages.Reply(1, Code.OK),
            messages.Ask(1, messages.Command("0", "get", [])),
        ])  # fmt: skip
        return dict(json.loads(codec.encode(said)))

    def _random_bytes(self) -> None:
        self._send(self._random.randbytes(self._random.choice([1, 2, 80, 5000, 100_000])))

    def _empty(self) -> None:
        self._send(b"")

    def _changed_bytes(self) -> None:
        datagram = bytearray(json.dumps(self._valid()).encode())
        for _ in range(self._random.choice([1, 1, 3, 20])):
            datagram[self._random.randrange(len(datagram))] = self._random.randrange(256)
        self._send(bytes(datagram))

    def _changed_field(self) -> None:
        values = self._valid()
        values[self._random.choice([*values])] = self._random.choice(ODD)
        self._send(json.dumps(values).encode())

    def _field_more_or_less(self) -> None:
        values = self._valid()
        if self._random.randrange(2):
            values[self._random.choice(["", "x", "is_admin", "number", "__class__"])] = self._random.choice(ODD)
        else:
            del values[self._random.choice([*values])]
        self._send(json.dumps(values).encode())

    def _deep(self) -> None:
        piece = self._random.choice([b"[", b'{"a":', b'{"version":3,"kind":"Standing","layers":['])
        self._send(piece * (self._random.choice([900, 60_000]) // len(piece)))

    def _too_long(self) -> None:
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        with suppress(OSError):
            self._send(codec.encode(messages.Log("info", "x" * (messages.MAX_MESSAGE + 1))))

    def _echo(self) -> None:
        self._send(self._random.choice(self._heard))

    def _wrong_number(self) -> None:
        number = self._fake.standing.number + self._random.choice([1, 2, 10**9, 2**62 - self._fake.standing.number])
        self._say(replace(self._fake.standing, number=number))

    def _wrong_stage(self) -> None:
        self._say(replace(self._fake.standing, stage=self._random.choice([Stage.IDLE, Stage.OPEN, Stage.LEAVING])))

    def _wrong_chain(self) -> None:
        self._say(
            replace(self._fake.standing, chain=self._random.choice(["", "aio:/etc/shadow", "null:9G", "|" * 2000]))
        )

    def _wrong_export(self) -> None:
        path = self._random.choice(["/run/nbd/vbd-1-51712.sock", "/x,file=/etc/shadow", "?", "x" * 100])
        self._say(replace(self._fake.standing, export=path))
        select.select([], [], [], _PATIENCE_S)  # so that it stays if it is believed

    def _no_walls(self) -> dict[str, str]:
        """Return reasons that nobody has told yet."""
        reason = f"no {self._random.random()}" + self._random.choice(["", "x" * 3000, "\0\n\t" * 300])
        return {str(wall): reason for wall in self._random.sample([*Wall], self._random.choice([0, 1, 1, 11]))}

    def _wants_connections(self) -> None:
        self._fake.standing = replace(self._fake.standing, wants_connections=True)
        self._say(self._fake.standing)
        give_up = time.monotonic() + _WANTS_S
        while (left_s := give_up - time.monotonic()) > 0 and select.select([self._near], [], [], left_s)[0]:
            message = self._take()
            if message is None:
                return
            self._say(*self._fake.answers(message))

    def _other_walls(self) -> None:
        for _ in range(self._random.choice([1, 1000])):
            walls = [str(each) for each in self._random.sample([*Wall, "", "x" * 3000], 2)]
            number = self._random.choice([0, self._fake.standing.number])
            self._say(replace(self._fake.standing, number=number, walls=walls, no_walls=self._no_walls()))

    def _long_standings(self) -> None:
        """Say what takes the service longest to read, and at last more than that."""
        facts = {str(number): "x" * 8 for number in range(messages.MAX_FACTS)}
        layer = replace(self._fake.standing.layers[0], facts=facts)
        for count in [messages.MAX_LAYERS] * 20 + [messages.MAX_LAYERS + 1]:
            self._say(replace(self._fake.standing, layers=[layer] * count))

    def _reply_to_nobody(self) -> None:
        self._say(messages.Reply(self._random.choice([2**62, 2**63]), Code.OK))

    def _wrong_reply(self) -> None:
        number = self._asked.pop() if self._asked else 0
        code, data = (
            self._random.choice([*Code]),
            self._random.choice(["", "null:7G", "aio:/etc/shadow", "[[", "\0" * 9000]),
        )
        for _ in range(self._random.choice([1, 1, 2])):
            self._say(messages.Reply(number, code, self._random.choice(["", "no", "x" * 9000]), data))

    def _odd_descriptors(self) -> None:
        near, far = os.pipe()
        one, other = socket.socketpair()
        epoll = select.epoll()
        kinds = [near, far, one.fileno(), other.fileno(), epoll.fileno(), self._near.fileno(), self._fds[0], 0]
        fds = self._random.choices(kinds, k=self._random.choice([1, 1, 2, 60, 253]))
        message = self._random.choice([messages.Drop("odd"), messages.Log("info", "x"), self._fake.standing])
        self._send(codec.encode(message), fds)
        for each in (one, other, epoll):
            each.close()
        os.close(near)
        os.close(far)

    def _flood(self) -> None:
        self._near.setblocking(False)
        for _ in range(self._random.choice([100, 1000])):
            with suppress(BlockingIOError):
                self._random.choice([self._log, self._stand, self._drop])()
        self._near.setblocking(True)

    def _read_nothing(self) -> None:
        ask = codec.encode(messages.Ask(1, messages.Command("0", "get", [])))
        for _ in range(2000):
            self._send(ask)

    def _scribble_journal(self) -> None:
        page = self._fake.journal
        for _ in range(self._random.choice([1, 20])):
            place = 8 * self._random.choice([
                self._random.randrange(512), 512 + self._random.randrange(8), 1024 + self._random.randrange(8192),
                self._random.randrange(journal.SIZE // 8),
            ])  # fmt: skip
            page[place : place + 8] = self._random.choice([bytes(8), b"\xff" * 8, self._random.randbytes(8)])
        if self._random.randrange(2):
            with suppress(ValueError):
                journal.AGREED.write(page, {"chain": self._random.choice(ODD[:10]), "connect": {"rings": [[]] * 50}})

    def _truncate(self) -> None:
        for fd in self._fds:
            for size in (0, 1, 1 << 40):
                with suppress(OSError):
                    os.ftruncate(fd, size)
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)

    def _hang_up(self) -> None:
        self._near.close()
        select.select([], [], [], _PATIENCE_S)

    def _half_close(self) -> None:
        self._near.shutdown(self._random.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
        self._obey(0.01)

    def _end(self) -> None:
        os._exit(self._random.randrange(256))

    _HARMLESS = (_stand, *[_stand_as_before] * 3, *[_log] * 4, *[_drop] * 4, _ask)
    DEEDS: dict[str, Callable[[Wild], None]] = {  # noqa: RUF012 - a table
        "random bytes": _random_bytes,
        "an empty datagram": _empty,
        "changed bytes": _changed_bytes,
        "a changed field": _changed_field,
        "a field more or less": _field_more_or_less,
        "deep values": _deep,
        "a message too long": _too_long,
        "an order's echo": _echo,
        "a number that nobody gave": _wrong_number,
        "a stage that cannot be": _wrong_stage,
        "a chain that nobody ordered": _wrong_chain,
        "an export that nobody ordered": _wrong_export,
        "wants connections": _wants_connections,
        "other walls": _other_walls,
        "long standings": _long_standings,
        "a reply to nobody": _reply_to_nobody,
        "wrong reply": _wrong_reply,
        "odd descriptors": _odd_descriptors,
        "a flood": _flood,
        "reads nothing": _read_nothing,
        "scribbles into the journal": _scribble_journal,
        "cuts memories short": _truncate,
        "hangs up and stays": _hang_up,
        "closes one way": _half_close,
        "ends": _end,
    }


def serve(near: socket.socket, walls: Walls, told: birth.Birth) -> int:
    """Be a wild worker, without walls, for a disk of `null:`, and a real one for any other."""
    message = codec.from_supervisor(near.recv(messages.MAX_MESSAGE, socket.MSG_PEEK))
    if not (isinstance(message, messages.Open) and message.chain.startswith("null:")):
        return real.serve(near, walls, told)
    near.setblocking(True)
    Wild(near, Words(os.environ[ENVIRONMENT])).run()
    return 0


def main(arguments: list[str]) -> int:
    """Run a worker that was started by exec."""
    given = birth.parse(arguments)
    assert given is not None
    return serve(socket.socket(fileno=int(given["socket"])), *birth.by_exec(given))


def be_zygote(arguments: list[str]) -> int:
    """Run the zygote."""
    zygote.SERVE[zygote.WORKER] = serve
    return zygote.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
