"""A worker without a chain or a ring: speaks `xenbackend.control` and does as its chain's text says.

null:1G serves; null:2G cannot be opened; null:3G dies when it is asked to connect; null:4G never disconnects.
"""

from __future__ import annotations

import os
import socket
import sys

from xenbackend import control


def main() -> int:
    """Serve until told to close."""
    channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1]))
    chain = ""
    while True:
        datagram, fds, _, _ = socket.recv_fds(channel, control.MAX_MESSAGE, 8)
        if not datagram:
            return 0
        message = control.decode(datagram)
        if isinstance(message, control.Open):
            chain = message.chain
            reads = int.from_bytes(os.pread(fds[0], 8, 0), "little")
            os.pwrite(fds[0], (reads + 7).to_bytes(8, "little"), 0)  # the counter `reads`
        for answer in _answers(chain, message):
            channel.send(control.encode(answer))
        if isinstance(message, control.Close):
            return 0


def _answers(chain: str, message: control.Message) -> list[control.Message]:
    match message:
        case control.Open():
            broken = control.Failed("null: it is broken", 5)
            return [broken if chain == "null:2G" else control.Opened([_layer(message)], message.export)]
        case control.Connect() if chain == "null:3G":
            os._exit(3)
        case control.Connect():
            agreed = {"discard": str(message.can_discard), "segments": str(message.max_segments)}
            return [control.Log("info", "connecting", {"rings": str(message.rings), **agreed}), control.Connected()]
        case control.Disconnect() if chain != "null:4G":
            return [control.Disconnected()]
        case control.Command():
            return [control.Reply(message.id, message.verb == "get", f"{message.layer} {message.arguments}")]
        case control.Close():
            return [control.Closed()]
    return []


def _layer(message: control.Open) -> control.LayerFacts:
    return control.LayerFacts(
        text=message.chain,
        size=1 << 30,
        sector_size=512,
        read_only=message.read_only,
        can_flush=True,
        can_discard=False,
        discard_granularity=0,
        discard_alignment=0,
    )


if __name__ == "__main__":
    sys.exit(main())
