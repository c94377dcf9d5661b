"""The handshake of an NBD client, fixed newstyle: a server's bytes in, our options out, until requests may follow.

Must not hold a socket, nor keep more bytes from a server than one reply may have.

    server  greeting ->
                      <- flags, STARTTLS                if TLS is wanted; everything else is sent inside TLS
                      <- flags, STRUCTURED_REPLY
                      <- SET_META_CONTEXT               if replies are structured: block status needs both
                      <- GO                             requests follow
            answers ->

Source: NetworkBlockDevice/nbd doc/proto.md, "Fixed newstyle negotiation".
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack_from

from xenbackend.errors import XenbackendError, printable
from xenbackend.nbd.abi import (
    ALLOCATION,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_BLOCK,
    MIN_BLOCK,
    NBDMAGIC,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    NbdError,
)

MAX_REPLY = 65536  # bytes of an option reply's data
MAX_REPLIES = 64  # in one handshake; known servers send about ten
MAX_NAME = 4096  # bytes of an export's name
_GREETING = 18  # bytes
_SENTENCES = {
    REP_ERR_UNSUP: "it does not support choosing an export by NBD_OPT_GO",
    REP_ERR_POLICY: "it does not let this client use export {name}",
    REP_ERR_TLS_REQD: "it requires TLS; write nbds:// with certificates=DIRECTORY",
    REP_ERR_UNKNOWN: "it has no export {name}",
    REP_ERR_SHUTDOWN: "it is shutting down",
}


class Refused(XenbackendError):
    """A server has refused an option or export, as the protocol allows."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server has told about its export, and what was agreed.

    size, ..._block  bytes; requests are multiples of `min_block`, and at most `max_block`
    flags            the transmission flags (`abi.SEND_...`)
    structured       whether replies to reads and to block status are structured
    context          the server's number for ALLOCATION in block status; None: block status is not available
    """

    size: int
    flags: int
    structured: bool = False
    context: int | None = None
    min_block: int = MIN_BLOCK
    preferred_block: int = 4096
    max_block: int = MAX_BLOCK


class ClientHandshake:
    """The handshake of one connection.

    offer       None until requests may be sent
    wants_tls   True if `tls` was asked for, and TLS has to begin now; then call `tls_established`
    """

    def __init__(self, export: str, *, tls: bool = False) -> None:
        self.offer: Offer | None = None
        self.wants_tls = False
        self._asks_for_tls = tls
        self._export = export
        self._name = export.encode(errors="surrogateescape")
        self._option = 0  # the option for which a reply is expected; 0: the greeting is expected
        self._replies = 0
        self._is_structured = False
        self._context: int | None = None
        self._size = self._flags = -1
        self._blocks = (MIN_BLOCK, 4096, MAX_BLOCK)

    def take(self, received: bytearray) -> bytes:
        """Remove the complete messages at the front of `received`, and return the bytes to send.

        Raises: Refused; NbdError if the server breaks the protocol.
        """
        answers = []
        while self.offer is None and not self.wants_tls:
            answer = self._take_reply(received) if self._option else self._take_greeting(received)
            if answer is None:
                break
            answers.append(answer)
        if (self.offer is not None or self.wants_tls) and received:  # bytes from before TLS may come from anybody
            raise NbdError("the server sends data before it is asked for any")
        return b"".join(answers)

    def tls_established(self) -> bytes:
        """Return the first bytes to send inside TLS, where the negotiation of options begins again."""
        self.wants_tls = False
        return self._ask(OPT_STRUCTURED_REPLY)

    def _take_greeting(self, received: bytearray) -> bytes | None:
        if len(received) < _GREETING:
            if received and not NBDMAGIC.startswith(received[:8]):
                raise NbdError(f"it greets with {bytes(received[:8])!r}: it is not an NBD server")
            return None
        if received[:8] != NBDMAGIC:
            raise NbdError(f"it greets with {bytes(received[:8])!r}: it is not an NBD server")
        (flags,) = unpack_from(">H", received, 16)
        if received[8:16] != IHAVEOPT or not flags & FLAG_FIXED_NEWSTYLE:
            raise Refused("it speaks an old form of NBD; the fixed newstyle is required")
        del received[:_GREETING]
        ours = pack(">I", flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        return ours + self._ask(OPT_STARTTLS if self._asks_for_tls else OPT_STRUCTURED_REPLY)

    def _take_reply(self, received: bytearray) -> bytes | None:
        if len(received) < OPTION_REPLY.size:
            return None
        magic, option, kind, length = OPTION_REPLY.unpack_from(received)
        if magic != OPTION_REPLY_MAGIC or option != self._option or length > MAX_REPLY:
            raise NbdError(f"a reply to option {option} that begins with {magic:#x}, of {length} bytes")
        end = OPTION_REPLY.size + length
        if len(received) < end:
            return None
        self._replies += 1
        if self._replies > MAX_REPLIES:
            raise NbdError(f"more than {MAX_REPLIES} replies to three options")
        data = bytes(received[OPTION_REPLY.size : end])
        del received[:end]
        if kind == REP_ERR_TLS_REQD:
            raise Refused(_SENTENCES[kind])
        if self._option == OPT_STARTTLS:
            if kind != REP_ACK:
                raise Refused("it does not offer TLS, which nbds:// requires")
            self.wants_tls = True
            return b""
        if self._option == OPT_STRUCTURED_REPLY:
            return self._structured(kind)
        if self._option == OPT_SET_META_CONTEXT:
            return self._meta_context(kind, data)
        return self._info(kind, data)

    def _structured(self, kind: int) -> bytes:
        self._is_structured = kind == REP_ACK
        if kind != REP_ACK and not kind & REP_ERROR:
            raise NbdError(f"an unexpected reply of type {kind} to NBD_OPT_STRUCTURED_REPLY")
        if not self._is_structured:
            return self._go()
        query = pack(">II", 1, len(ALLOCATION)) + ALLOCATION
        return self._ask(OPT_SET_META_CONTEXT, pack(">I", len(self._name)) + self._name + query)

    def _meta_context(self, kind: int, data: bytes) -> bytes:
        if kind == REP_META_CONTEXT and len(data) > 4:
            if data[4:] == ALLOCATION:
                (self._context,) = unpack_from(">I", data)
            return b""
        if kind != REP_ACK and not kind & REP_ERROR:
            raise NbdError(f"an unexpected reply of type {kind} to NBD_OPT_SET_META_CONTEXT")
        return self._go()

    def _info(self, kind: int, data: bytes) -> bytes:
        if kind & REP_ERROR:
            said = f" ({printable(data[:200].decode(errors='replace'))})" if data else ""
            sentence = _SENTENCES.get(kind, "it refuses the export {name}").format(name=repr(self._export))
            raise Refused(f"{sentence}{said}")
        if kind == REP_INFO and len(data) >= 2:
            (what,) = unpack_from(">H", data)
            if what == INFO_EXPORT and len(data) == 12:
                self._size, self._flags = unpack_from(">QH", data, 2)
            elif what == INFO_BLOCK_SIZE and len(data) == 14:
                self._blocks = unpack_from(">III", data, 2)
            return b""
        if kind != REP_ACK or self._size < 0:
            raise NbdError(f"a reply of type {kind} before the size of the export")
        self._agree()
        return b""

    def _agree(self) -> None:
        least, preferred, most = self._blocks
        if not (0 < least <= preferred <= most and least & (least - 1) == 0 and preferred % least == 0):
            raise NbdError(f"impossible block sizes {self._blocks}")
        self.offer = Offer(
            size=self._size,
            flags=self._flags,
            structured=self._is_structured,
            context=self._context,
            min_block=least,
            preferred_block=preferred,
            max_block=min(most, MAX_BLOCK),
        )

    def _go(self) -> bytes:
        wishes = pack(">HH", 1, INFO_BLOCK_SIZE)
        return self._ask(OPT_GO, pack(">I", len(self._name)) + self._name + wishes)

    def _ask(self, option: int, data: bytes = b"") -> bytes:
        self._option = option
        return OPTION.pack(IHAVEOPT, option, len(data)) + data
