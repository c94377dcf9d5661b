"""A worker without a chain or a ring: speaks `xenbackend.control` and does as its chain's text says.

null:1G serves; null:2G cannot be opened; null:3G dies when it is asked to connect; null:4G never disconnects, holds or
reports; null:5G cannot take another chain's place; null:6G does, and dies before it says so.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from dataclasses import replace

from xenbackend import control, journal


def main() -> int:
    """Serve until told to close."""
    channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1]))
    worker = FakeWorker()
    while True:
        datagram, fds, _, _ = socket.recv_fds(channel, control.MAX_MESSAGE, 8)
        if not datagram:
            return 0
        message = control.decode(datagram)
        if isinstance(message, control.Open):
            worker.journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
            worker.journal[0] += 7  # the counter `reads`
        for answer in worker.answers(message):
            channel.send(control.encode(answer))
        if isinstance(message, control.Close):
            return 0


class FakeWorker:
    """What it has been told until now."""

    def __init__(self) -> None:
        self.journal = memoryview(b"")
        self.standing = control.Standing(
            "idle", "", read_only=False, shareable=False, layers=[], export="", halted="", paused="", trouble=""
        )

    def answers(self, message: control.Message) -> list[control.Message]:
        """Do what a message asks for, and return what is said."""
        said = self._answers(self.standing.chain, message)
        for each in said:
            match each:
                case control.Opened():
                    self.standing = replace(self.standing, phase="open", layers=each.layers)
                case control.Connected():
                    self.standing = replace(self.standing, phase="serving")
                case control.Disconnected():
                    self.standing = replace(self.standing, phase="open")
                case control.Swapped():
                    self.standing = replace(self.standing, chain=each.chain, layers=each.layers)
        return said

    def _note(self, chain: str, connect: object) -> None:
        journal.AGREED.write(self.journal, {"chain": chain, "connect": connect} if connect else None)

    def _answers(  # noqa: C901, PLR0911, PLR0912 - a table
        self, chain: str, message: control.Message
    ) -> list[control.Message]:
        match message:
            case control.Open():
                self.standing = replace(
                    self.standing, chain=message.chain, read_only=message.read_only, shareable=message.shareable
                )
                told = {"lost": message.lost, "paused": str(message.is_paused), "policy": message.policy}
                log = control.Log("info", "opening", told)
                broken = control.Failed("null: it is broken", 5)
                if message.chain == "null:2G":
                    return [log, broken]
                return [log, control.Opened([_layer(message.chain, message.read_only)], message.export)]
            case control.Connect() if chain == "null:3G":
                os._exit(3)
            case control.Connect():
                self._note(chain, control.as_fields(message))
                agreed = {"discard": str(message.can_discard), "segments": str(message.max_segments)}
                return [control.Log("info", "connecting", {"rings": str(message.rings), **agreed}), control.Connected()]
            case control.Rejoin():
                return [control.Log("info", "rejoining", {}), control.Connected()]
            case control.Disconnect() if chain != "null:4G":
                self._note(chain, None)
                return [control.Disconnected()]
            case control.Swap(chain="null:5G"):
                return [control.Unswapped("null:5G: it is too small")]
            case control.Swap():
                agreed = journal.AGREED.read(self.journal)
                if agreed is not None:
                    self._note(message.chain, agreed["connect"])
                if message.chain == "null:6G":
                    os._exit(6)
                return [control.Swapped(message.chain, [_layer(message.chain, self.standing.read_only)])]
            case control.Branch(file="/full"):
                return [control.Unswapped("/full: no room for another image")]
            case control.Branch():
                return [control.Branched("null:7G")]
            case control.Pause() if chain != "null:4G":
                return [control.Held()]
            case control.Resume():
                return [control.Log("info", "resuming", {})]
            case control.Obey():
                return [control.Log("info", "obeying", {"policy": message.policy})]
            case control.Report() if chain != "null:4G":
                return [replace(self.standing, report=message.id)]
            case control.Command():
                return [control.Reply(message.id, message.verb == "get", f"{message.layer} {message.arguments}")]
            case control.Close():
                if not message.hands_over and len(self.journal):
                    self._note(chain, None)
                return [control.Closed()]
        return []


def _layer(chain: str, read_only: bool) -> control.LayerFacts:
    return control.LayerFacts(
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
