"""The front-end side of the vhost-user protocol: gives a back-end process access to our memory and one virtqueue.

Must not know a request or the layout of a queue.

Source: QEMU docs/interop/vhost-user.rst (messages), linux/virtio_config.h and virtio_ring.h (feature bits).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from struct import Struct

from xenbackend.bench.plan import BenchError

GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
SET_MEM_TABLE = 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 8, 9, 10
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
SET_VRING_ENABLE = 18
GET_CONFIG = 24

VERSION_1 = 1 << 32
EVENT_IDX = 1 << 29
PROTOCOL_FEATURES = 1 << 30
WANTED = VERSION_1 | EVENT_IDX | PROTOCOL_FEATURES
PROTOCOL_REPLY_ACK = 1 << 3
PROTOCOL_CONFIG = 1 << 9
PROTOCOL_WANTED = PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG

FLAG_VERSION, FLAG_REPLY, FLAG_NEED_REPLY = 1, 4, 8
_HEADER = Struct("=III")  # request, flags, length of the payload
_U64 = Struct("=Q")
_VRING_STATE = Struct("=II")  # index, value
_VRING_ADDRESSES = Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
_MEMORY = Struct("=IIQQQQ")  # regions, padding; address in the queue, size, our address, offset in the descriptor
_CONFIG = Struct("=III8s")  # offset, size, flags; the first field of virtio_blk_config is the capacity in sectors
_TIMEVAL = Struct("@ll")  # seconds, microseconds
_TIMEOUT = 10  # seconds for the answer to a message


@dataclass(frozen=True, slots=True)
class QueueAddresses:
    """Where a virtqueue of `entries` lies: offsets in bytes from the start of the shared memory."""

    entries: int
    descriptors: int
    available: int
    used: int


class VhostUser:
    """A connection to the Unix socket of a vhost-user backend.

    Raises: BenchError if the backend lacks a feature in `WANTED`, or refuses a message; OSError if there is none.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_TIMEOUT, 0))
        self._acknowledges = False
        try:
            self._socket.connect(path)
            self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    def _negotiate(self) -> None:
        features = self._ask(GET_FEATURES)
        if features & WANTED != WANTED:
            raise BenchError(f"{self.path}: the backend offers features {features:#x} and lacks some of {WANTED:#x}")
        self._tell(SET_OWNER, b"")
        if self._ask(GET_PROTOCOL_FEATURES) & PROTOCOL_WANTED != PROTOCOL_WANTED:
            raise BenchError(f"{self.path}: the backend cannot acknowledge messages or tell its disk's size")
        self._tell(SET_PROTOCOL_FEATURES, _U64.pack(PROTOCOL_WANTED))
        self._acknowledges = True
        self._tell(SET_FEATURES, _U64.pack(WANTED))

    def capacity(self) -> int:
        """Return the size of the disk in sectors of 512 bytes. Raises: BenchError."""
        self._send(GET_CONFIG, _CONFIG.pack(0, 8, 0, bytes(8)), FLAG_VERSION, [])
        return int.from_bytes(_CONFIG.unpack(self._receive(GET_CONFIG))[3], "little")

    def share(self, memory: int, size: int) -> None:
        """Pass the descriptor of our memory to the backend; addresses in queues are offsets in this memory."""
        self._tell(SET_MEM_TABLE, _MEMORY.pack(1, 0, 0, size, 0, 0), [memory])

    def start_queue(self, addresses: QueueAddresses, kick: int, call: int) -> None:
        """Start queue 0. `kick` and `call` are eventfds: kick wakes the backend, call wakes us."""
        self._tell(SET_VRING_NUM, _VRING_STATE.pack(0, addresses.entries))
        self._tell(SET_VRING_BASE, _VRING_STATE.pack(0, 0))
        where = (addresses.descriptors, addresses.used, addresses.available)
        self._tell(SET_VRING_ADDR, _VRING_ADDRESSES.pack(0, 0, *where, 0))
        self._tell(SET_VRING_CALL, _U64.pack(0), [call])
        self._tell(SET_VRING_KICK, _U64.pack(0), [kick])
        self._tell(SET_VRING_ENABLE, _VRING_STATE.pack(0, 1))

    def close(self) -> None:
        """Hang up; the backend stops the queue and waits for the next connection."""
        self._socket.close()

    def _ask(self, request: int) -> int:
        self._send(request, b"", FLAG_VERSION, [])
        return int(_U64.unpack(self._receive(request))[0])

    def _tell(self, request: int, payload: bytes, descriptors: list[int] | None = None) -> None:
        flags = FLAG_VERSION | (FLAG_NEED_REPLY if self._acknowledges else 0)
        self._send(request, payload, flags, descriptors or [])
        if self._acknowledges and _U64.unpack(self._receive(request)) != (0,):
            raise BenchError(f"{self.path}: the backend refused vhost-user message {request}")

    def _send(self, request: int, payload: bytes, flags: int, descriptors: list[int]) -> None:
        socket.send_fds(self._socket, [_HEADER.pack(request, flags, len(payload)) + payload], descriptors)

    def _receive(self, wanted: int) -> bytes:
        request, flags, length = _HEADER.unpack(self._exactly(_HEADER.size))
        if request != wanted or not flags & FLAG_REPLY:
            raise BenchError(f"{self.path}: the backend answered vhost-user message {wanted} with {request}")
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        try:
            data = self._socket.recv(length, socket.MSG_WAITALL)
        except BlockingIOError:
            data = b""
        if len(data) != length:
            raise BenchError(f"{self.path}: the backend hung up or fell silent in the vhost-user handshake")
        return data
