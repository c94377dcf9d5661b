"""The handshake of an NBD server, fixed newstyle: a client's bytes in, answers out, until the transmission phase.

Must not hold a socket, nor keep more bytes from a client than one option may have.

    server  greeting ->
                      <- flags                          client
                      <- option: LIST, INFO, unknown    any number up to a limit; each is answered
                      <- option: GO, EXPORT_NAME        requests follow
                         option: ABORT                  the end

Source: NetworkBlockDevice/nbd doc/proto.md, "Fixed newstyle negotiation".
"""

from __future__ import annotations

from enum import Enum
from struct import pack, unpack_from

from xenbackend.nbd.abi import (
    EXPORT_NAME_REPLY,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_BLOCK,
    MIN_BLOCK,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_SERVER,
    ZEROES,
    Export,
    NbdError,
)

GREETING = NBDMAGIC + IHAVEOPT + pack(">H", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
MAX_OPTION = 8192  # bytes of an option's data: two names of the maximum length
MAX_OPTIONS = 32  # of one client; known clients send five


class Phase(Enum):
    """How far a client is in the handshake: what it sends next."""

    FLAGS = "its flags"
    OPTIONS = "its options"
    TRANSMISSION = "transmission"
    ENDED = "the end"


class Handshake:
    """One client's handshake, after the greeting was sent."""

    def __init__(self, export: Export) -> None:
        self.phase = Phase.FLAGS
        self._export = export
        self._flags = 0
        self._options = 0

    def take(self, received: bytearray) -> bytes:
        """Remove the complete messages at the front of `received`, and return the bytes to send.

        Once `phase` is TRANSMISSION, the remaining bytes are requests. Raises: NbdError.
        """
        answers = []
        while self.phase in (Phase.FLAGS, Phase.OPTIONS):
            answer = self._take_flags(received) if self.phase is Phase.FLAGS else self._take_option(received)
            if answer is None:
                break
            answers.append(answer)
        return b"".join(answers)

    def _take_flags(self, received: bytearray) -> bytes | None:
        if len(received) < 4:
            return None
        (self._flags,) = unpack_from(">I", received)
        del received[:4]
        if self._flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise NbdError(f"flags {self._flags:#x} that were not offered")
        self.phase = Phase.OPTIONS
        return b""

    def _take_option(self, received: bytearray) -> bytes | None:
        if len(received) < OPTION.size:
            return None
        magic, option, length = OPTION.unpack_from(received)
        if magic != IHAVEOPT:
            raise NbdError(f"an option that begins with {magic!r}")
        if length > MAX_OPTION:
            raise NbdError(f"an option with {length} bytes of data, more than {MAX_OPTION}")
        end = OPTION.size + length
        if len(received) < end:
            return None
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise NbdError(f"more than {MAX_OPTIONS} options")
        data = bytes(received[OPTION.size : end])
        del received[:end]
        return self._answer(option, data)

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == OPT_EXPORT_NAME:
            return self._export_name(data)
        if option in (OPT_GO, OPT_INFO):
            return self._info(option, data)
        if option == OPT_ABORT:
            self.phase = Phase.ENDED
            return _reply(option, REP_ACK)
        if option == OPT_LIST:
            if data:
                return _reply(option, REP_ERR_INVALID)
            return _reply(option, REP_SERVER, bytes(4)) + _reply(option, REP_ACK)
        return _reply(option, REP_ERR_UNSUP)

    def _export_name(self, name: bytes) -> bytes:
        if name:  # no reply to this option can refuse
            raise NbdError(f"there is no export {name[:40]!a}; this disk's has the empty name")
        self.phase = Phase.TRANSMISSION
        zeroes = b"" if self._flags & FLAG_NO_ZEROES else ZEROES
        return EXPORT_NAME_REPLY.pack(self._export.size, self._export.flags) + zeroes

    def _info(self, option: int, data: bytes) -> bytes:
        """Answer GO or INFO. `data`: length of the name, name, number of information requests, each of two bytes."""
        if len(data) < 6:
            return _reply(option, REP_ERR_INVALID)
        (length,) = unpack_from(">I", data)
        if len(data) < 6 + length or len(data) != 6 + length + 2 * unpack_from(">H", data, 4 + length)[0]:
            return _reply(option, REP_ERR_INVALID)
        if length:
            return _reply(option, REP_ERR_UNKNOWN, b"the only export has no name")
        if option == OPT_GO:
            self.phase = Phase.TRANSMISSION
        # The block sizes are sent even if the client does not ask, since smaller requests are refused.
        export = self._export
        blocks = pack(">HIII", INFO_BLOCK_SIZE, MIN_BLOCK, export.preferred_block, MAX_BLOCK)
        return (
            _reply(option, REP_INFO, pack(">HQH", INFO_EXPORT, export.size, export.flags))
            + _reply(option, REP_INFO, blocks)
            + _reply(option, REP_ACK)
        )


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data
