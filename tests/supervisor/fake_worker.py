"""A worker without a chain or a ring: speaks `xenbackend.protocol.messages` and does as its chain's text says.

null:1G serves; null:2G cannot be opened; null:3G dies when it is asked to connect; null:4G never disconnects, holds or
reports; null:5G cannot take another chain's place; null:6G does, and dies before it says so.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from dataclasses import replace

from xenbackend import journal
from xenbackend.protocol import messages


def main() -> int:
    """Serve until told to close."""
    channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1]))
    worker = FakeWorker()
    while True:
        datagram, fds, _, _ = socket.recv_fds(channel, messages.MAX_MESSAGE, 8)
        if not datagram:
            return 0
        message = messages.decode(datagram)
        if isinstance(message, messages.Open):
            worker.journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
            worker.journal[0] += 7  # the counter `reads`
        for answer in worker.answers(message):
            channel.send(messages.encode(answer))
        if isinstance(message, messages.Close):
            return 0


class FakeWorker:
    """What it has been told until now."""

    def __init__(self) -> None:
        self.journal = memoryview(b"")
        self.standing = messages.Standing(
            "idle", "", read_only=False, shareable=False, layers=[], export="", halted="", paused="", trouble=""
        )

    def answers(self, message: messages.Message) -> list[messages.Message]:
        """Do what a message asks for, and return what is said."""
        said = self._answers(self.standing.chain, message)
        for each in said:
            match each:
                case messages.Opened():
                    self.standing = replace(self.standing, phase="open", layers=each.layers)
                case messages.Connected():
                    self.standing = replace(self.standing, phase="serving")
                case messages.Disconnected():
                    self.standing = replace(self.standing, phase="open")
                case messages.Swapped():
                    self.standing = replace(self.standing, chain=each.chain, layers=each.layers)
        return said

    def _note(self, chain: str, connect: object) -> None:
        journal.AGREED.write(self.journal, {"chain": chain, "connect": connect} if connect else None)

    def _answers(  # noqa: C901, PLR0911, PLR0912 - a table
        self, chain: str, message: messages.Message
    ) -> list[messages.Message]:
        match message:
            case messages.Open():
                self.standing = replace(
                    self.standing, chain=message.chain, read_only=message.read_only, shareable=message.shareable
                )
                told = {"lost": message.lost, "paused": str(message.is_paused), "policy": message.policy}
                log = messages.Log("info", "opening", told)
                broken = messages.Failed("null: it is broken", 5)
                if message.chain == "null:2G":
                    return [log, broken]
                return [log, messages.Opened([_layer(message.chain, message.read_only)], message.export)]
            case messages.Connect() if chain == "null:3G":
                os._exit(3)
            case messages.Connect():
                self._note(chain, messages.as_fields(message))
                agreed = {"discard": str(message.can_discard), "segments": str(message.max_segments)}
                return [
                    messages.Log("info", "connecting", {"rings": str(message.rings), **agreed}),
                    messages.Connected(),
                ]
            case messages.Rejoin():
                return [messages.Log("info", "rejoining", {}), messages.Connected()]
            case messages.Disconnect() if chain != "null:4G":
                self._note(chain, None)
                return [messages.Disconnected()]
            case messages.Swap(chain="null:5G"):
                return [messages.Unswapped("null:5G: it is too small")]
            case messages.Swap():
                agreed = journal.AGREED.read(self.journal)
                if agreed is not None:
                    self._note(message.chain, agreed["connect"])
                if message.chain == "null:6G":
                    os._exit(6)
                return [messages.Swapped(message.chain, [_layer(message.chain, self.standing.read_only)])]
            case messages.Branch(file="/full"):
                return [messages.Unswapped("/full: no room for another image")]
            case messages.Branch():
                return [messages.Branched("null:7G")]
            case messages.Pause() if chain != "null:4G":
                return [messages.Held()]
            case messages.Resume():
                return [messages.Log("info", "resuming", {})]
            case messages.Obey():
                return [messages.Log("info", "obeying", {"policy": message.policy})]
            case messages.Report() if chain != "null:4G":
                return [replace(self.standing, report=message.id)]
            case messages.Command():
                return [messages.Reply(message.id, message.verb == "get", f"{message.layer} {message.arguments}")]
            case messages.Close():
                if not message.hands_over and len(self.journal):
                    self._note(chain, None)
                return [messages.Closed()]
        return []


def _layer(chain: str, read_only: bool) -> messages.LayerFacts:
    return messages.LayerFacts(
        text=chain,
        size=int(chain[5]) << 30,
        sector_size=512,
        read_only=read_only,
        can_flush=True,
        can_discard=False,
        discard_granularity=0,
        discard_alignment=0,
    )


if __name__ == "__main__":
    sys.exit(main())
