"""A worker without a chain or a ring, which speaks `xenbackend.protocol` and behaves as the text of its chain says.

null:1G serves. null:2G cannot be opened. null:3G dies when it is told to connect. null:4G never leaves, pauses, reports
or accepts another chain. null:5G cannot replace another chain. null:6G can, and dies before it reports that. null:8G
reports that it is only open when it is told to serve. null:9G sends a reply to a question that nobody asked. A snapshot
to /full fails for lack of room; the reply to one to /lies names another file.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from dataclasses import replace

from xenbackend import journal
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage


def main() -> int:
    """Serve until told to close."""
    channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1]))
    worker = FakeWorker()
    while True:
        datagram, fds, _, _ = socket.recv_fds(channel, messages.MAX_MESSAGE, 8)
        if not datagram:
            return 0
        message = codec.from_supervisor(datagram)
        if isinstance(message, messages.Open):
            worker.journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
            worker.journal[0] += 7  # the counter `reads`
        for answer in worker.answers(message):
            channel.send(codec.encode(answer))
        if isinstance(message, messages.Close):
            return 0


class FakeWorker:
    """The standing and journal of a fake worker; `no_walls` is told from its first standing on."""

    def __init__(self) -> None:
        self.no_walls: dict[str, str] = {}
        self.journal = memoryview(b"")
        self.standing = messages.Standing(-1, Stage.IDLE, "", read_only=False, shareable=False)

    def answers(self, message: messages.FromSupervisor) -> list[messages.FromWorker]:
        """Obey a message, and return the messages that answer it."""
        if isinstance(message, messages.Ask):
            return self._replies(message)
        if isinstance(message, messages.Reply):
            return []
        logs = self._obey(message)
        if self.standing.chain == "null:4G" and isinstance(message, messages.Leave | messages.Report):
            return []
        self.standing = replace(self.standing, number=message.number)
        return [*(messages.Log("info", event) for event in logs), self.standing]

    def _note(self, chain: str, connect: messages.Connect | None) -> None:
        journal.AGREED.write(self.journal, codec.as_fields(messages.Agreed(chain, connect)))

    def _obey(self, order: messages.Order) -> list[str]:
        """Obey an order, and return lines for the log."""
        chain = self.standing.chain
        match order:
            case messages.Open():
                self.standing = messages.Standing(-1, Stage.OPEN, order.chain, order.read_only, order.shareable)
                self.standing = replace(self.standing, is_paused=order.is_paused, export=order.export)
                self.standing = replace(self.standing, no_walls=self.no_walls)
                if order.chain == "null:2G":
                    self.standing = replace(
                        self.standing,
                        stage=Stage.IDLE,
                        failure="null: it is broken",
                        errno=5,
                        is_mistake=True,
                        export="",
                    )
                else:
                    self.standing = replace(self.standing, layers=[_layer(order.chain, read_only=order.read_only)])
                return [f"opening paused={order.is_paused} policy={order.policy}"]
            case messages.Serve() if chain == "null:3G" and order.connect is not None:
                os._exit(3)
            case messages.Serve():
                stage = Stage.OPEN if chain == "null:8G" else Stage.SERVING
                self.standing = replace(self.standing, stage=stage, export="")
                if order.connect is None:
                    return ["rejoining"]
                self._note(chain, order.connect)
                agreed = f"discard={order.connect.can_discard} segments={order.connect.max_segments}"
                return [f"connecting rings={order.connect.rings} {agreed}"]
            case messages.Leave() if chain != "null:4G":
                self._note(chain, None)
                self.standing = replace(self.standing, stage=Stage.OPEN)
            case messages.Close():
                if not order.hands_over and len(self.journal):
                    self._note(chain, None)
                self.standing = replace(self.standing, stage=Stage.IDLE, layers=[], export="")
        return []

    def _replies(self, ask: messages.Ask) -> list[messages.FromWorker]:
        """Return the reply, after the standing if that has changed."""
        former = self.standing
        reply = self._reply(ask)
        if former.chain == "null:4G" and isinstance(ask.question, messages.Pause | messages.Swap):
            return []
        said: list[messages.FromWorker] = [reply] if self.standing == former else [self.standing, reply]
        match ask.question:
            case messages.Resume():
                return [messages.Log("info", "resuming"), *said]
            case messages.SetPolicy():
                return [messages.Log("info", f"obeying policy={ask.question.policy}"), *said]
        return said if self.standing.chain != "null:9G" else [*said, messages.Reply(ask.id + 1, Code.OK)]

    def _reply(self, ask: messages.Ask) -> messages.Reply:
        match ask.question:
            case messages.Swap() if self.standing.chain != "null:4G":
                return self._swap(ask.id, ask.question)
            case messages.Branch(file="/full"):
                return messages.Reply(ask.id, Code.FAILED, "/full: no room for another image")
            case messages.Branch() if messages.own_snapshot(ask.question.file) is not None:
                return messages.Reply(ask.id, Code.OK, data="qcow2:/etc/shadow")
            case messages.Branch():
                file = "/etc/shadow" if ask.question.file == "/lies" else ask.question.file
                filters, bar, _ = self.standing.chain.rpartition("|")
                return messages.Reply(ask.id, Code.OK, data=f"{filters}{bar}qcow2:{file}")
            case messages.Command():
                answer = f"{ask.question.layer} {ask.question.arguments}"
                if ask.question.verb == "get":
                    return messages.Reply(ask.id, Code.OK, data=answer)
                return messages.Reply(ask.id, Code.INVALID, answer)
            case messages.Measure():
                return messages.Reply(ask.id, Code.OK, data='[{"layer": "null:", "operations": {}}]')
            case messages.Pause() | messages.Resume():
                self.standing = replace(self.standing, is_paused=isinstance(ask.question, messages.Pause))
        return messages.Reply(ask.id, Code.OK)

    def _swap(self, number: int, question: messages.Swap) -> messages.Reply:
        if question.chain == "null:5G":
            return messages.Reply(number, Code.INVALID, "null:5G: it is too small")
        if question.is_dry_run:
            return messages.Reply(number, Code.OK, data=f'["{question.chain}"]')
        agreed = journal.AGREED.read(self.journal)
        self._note(question.chain, codec.restore(messages.Agreed, agreed).connect if agreed else None)
        if question.chain == "null:6G":
            os._exit(6)
        layers = [_layer(question.chain, read_only=self.standing.read_only)]
        self.standing = replace(self.standing, chain=question.chain, layers=layers)
        return messages.Reply(number, Code.OK)


def _layer(chain: str, *, read_only: bool) -> messages.LayerFacts:
    return messages.LayerFacts(
        text=chain,
        size=(int(chain[5]) if chain.startswith("null:") else 7) << 30,
        sector_size=512,
        read_only=read_only,
        can_flush=True,
        can_discard=False,
        discard_granularity=0,
        discard_alignment=0,
        physical_sector_size=512,
    )


if __name__ == "__main__":
    sys.exit(main())
