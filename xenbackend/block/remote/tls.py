"""TLS over a connected socket, as a client with certificates, with the interface of a socket.

Must not read a file, nor continue if a certificate is not valid. The socket underneath is not changed: whoever has
another descriptor of it sees its end as without TLS.

Python's `ssl` loads a client's own certificate from files only, and a worker cannot open any. So the certificate is
given to OpenSSL directly, by the functions of the library that `ssl` is linked with.

Source: NetworkBlockDevice/nbd doc/proto.md, "TLS support"; PySSLContext of CPython's Modules/_ssl.c, whose first field
is the SSL_CTX; SSL_CTX_use_certificate(3), PEM_read_bio_PrivateKey(3).
"""

from __future__ import annotations

import _ssl
import ctypes
import errno
import socket
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from xenbackend.block.servers import AUTHORITIES, CERTIFICATE, KEY
from xenbackend.errors import XenbackendError
from xenbackend.nbd.abi import NbdError

_MOST = 256 * 1024  # bytes that are encrypted, or received, at once
_MOST_EMPTY = 4  # receipts without data, as of session tickets, before others have their turn
_EXTRA_CHAIN_CERT = 14  # openssl/ssl.h, SSL_CTRL_EXTRA_CHAIN_CERT
_END_OF_FILE = "no start line"  # openssl/pem.h, PEM_R_NO_START_LINE
_UNKNOWN = "its certificate is not from an authority that ca-cert.pem has"
# openssl/x509_vfy.h, by X509_V_ERR_...
_SENTENCES = {
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    **dict.fromkeys((2, 18, 19, 20, 21), _UNKNOWN),
    62: "its certificate is for another host",
    64: "its certificate is for another address",
}


class TlsFailed(XenbackendError):
    """TLS with a server could not be established, or its certificate is not trusted."""


class Tls:
    """The settings of TLS: the authorities that we trust, our own certificate, and the host of the server."""

    def __init__(self, credentials: Mapping[str, str], host: str) -> None:
        """Take the contents of AUTHORITIES, CERTIFICATE and KEY as PEM; without the last two we have no certificate.

        `host` is the name or address that the server's certificate has to be for; empty: any that is signed will do.

        Raises: TlsFailed, naming the file.
        """
        self._host = host
        self._context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = bool(host)
        try:
            context.load_verify_locations(cadata=credentials[AUTHORITIES])
        except (ssl.SSLError, ValueError) as error:
            raise TlsFailed(f"{AUTHORITIES} has no certificate in it") from error
        try:
            self._begin(ssl.MemoryBIO(), ssl.MemoryBIO())
        except ValueError as error:  # UnicodeError among them
            raise TlsFailed(f"no certificate is of a host that is called {host!r}") from error
        if CERTIFICATE in credentials:
            _give_certificate(context, credentials[CERTIFICATE].encode(), credentials[KEY].encode())

    def over(self, near: socket.socket) -> TlsSocket:
        """Return a TLS socket over `near`; call its `handshake` next."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        return TlsSocket(near, self._begin(incoming, outgoing), incoming, outgoing)

    def _begin(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        return self._context.wrap_bio(incoming, outgoing, server_hostname=self._host or None)


class TlsSocket:
    """A socket with TLS, with those methods of a socket that are used here; if non-blocking, it raises BlockingIOError.

    In addition its methods raise NbdError if the data received are not TLS.
    """

    def __init__(
        self, near: socket.socket, session: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        self._socket = near
        self._session = session
        self._incoming, self._outgoing = incoming, outgoing
        self._unsent = memoryview(b"")
        self.fileno, self.setblocking, self.settimeout = near.fileno, near.setblocking, near.settimeout
        self.shutdown, self.close = near.shutdown, near.close

    @property
    def version(self) -> str:
        """The version of TLS that was agreed on, such as TLSv1.3."""
        return self._session.version() or ""

    @property
    def has_unsent(self) -> bool:
        """Whether there are encrypted data that the socket has not accepted yet."""
        return bool(self._unsent) or self._outgoing.pending > 0

    def handshake(self) -> None:
        """Continue the handshake until it is done. Raises: TlsFailed, OSError of the socket."""
        while True:
            try:
                self._session.do_handshake()
                self.flush()
                return
            except ssl.SSLWantReadError:
                self.flush()
                if not self._fetch():
                    raise TlsFailed("it has closed the connection while TLS began") from None
            except ssl.SSLError as error:
                with suppress(OSError):  # an alert for the server, if it can be sent
                    self.flush()
                raise TlsFailed(_sentence(error)) from error

    def flush(self) -> None:
        """Send the encrypted data that were not sent yet."""
        while self.has_unsent:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def writev(self, pieces: Iterable[bytes | memoryview]) -> int:
        """Encrypt the beginning of `pieces`, send that, and return its length; `flush` sends what is left over."""
        self.flush()
        taken, size = [], 0
        for piece in pieces:
            taken.append(piece[: _MOST - size])
            size += len(taken[-1])
            if size >= _MOST:
                break
        try:
            self._session.write(b"".join(taken))
        except ssl.SSLError as error:
            raise NbdError(f"TLS: {_reason(error)}") from error
        with suppress(BlockingIOError):
            self.flush()
        return size

    def sendall(self, data: bytes) -> None:
        """Encrypt and send all data; the socket blocks, or accepts that much."""
        left = memoryview(data)
        while left:
            left = left[self.writev([left]) :]
        self.flush()

    def recv(self, size: int) -> bytes:
        """Receive up to `size` bytes; none at the end of the connection."""
        room = bytearray(size)
        return bytes(room[: self.recv_into(memoryview(room))])

    def recv_into(self, view: memoryview) -> int:
        """Receive into `view`, and return the number of bytes, 0 at the end of the connection.

        Raises: BlockingIOError, also if records without data keep coming, since there may be no end of them.
        """
        empty = 0
        while True:
            try:
                return self._session.read(len(view), view)  # type: ignore[return-value]  # into a buffer
            except ssl.SSLWantReadError:  # `_incoming` is empty, so the socket will be readable when more comes
                if empty == _MOST_EMPTY:
                    raise BlockingIOError(errno.EAGAIN, "no data") from None
                empty += 1
                if not self._fetch():
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            except ssl.SSLError as error:
                raise NbdError(f"TLS: {_reason(error)}") from error

    def recvmsg_into(self, views: Iterable[memoryview]) -> tuple[int]:
        """Receive what is there into one view after the other; return the number of bytes, 0 at the end."""
        size = 0
        for view in views:
            filled = 0
            while filled < len(view):
                try:
                    received = self.recv_into(view[filled:])
                except BlockingIOError:
                    if size:
                        return (size,)
                    raise
                if not received:
                    return (size,)
                filled += received
                size += received
        return (size,)

    def _fetch(self) -> bool:
        """Receive encrypted data; return False at the end of the connection."""
        received = self._socket.recv(_MOST)
        self._incoming.write(received)
        return bool(received)


def _give_certificate(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Give a context our certificate, with the chain behind it in the same file, and its key. Raises: TlsFailed."""
    try:
        library = _library()
    except (OSError, AttributeError) as error:
        raise TlsFailed(f"this Python's OpenSSL cannot use {CERTIFICATE}: {error}") from error
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    if library.SSL_CTX_get_options(pointer) != context.options:  # the layout of this Python's contexts is another one
        raise TlsFailed(f"this Python's OpenSSL cannot use {CERTIFICATE}: the layout of its SSL contexts is unknown")
    library.ERR_clear_error()
    try:
        _use_certificates(library, pointer, certificate)
        _use_key(library, pointer, key)
    finally:
        library.ERR_clear_error()  # the end of the PEM data leaves an error


def _use_certificates(library: Any, pointer: ctypes.c_void_p, certificate: bytes) -> None:
    bio = library.BIO_new_mem_buf(certificate, len(certificate))
    try:
        found = 0
        while one := library.PEM_read_bio_X509(bio, None, None, b""):
            if not found:
                is_taken = library.SSL_CTX_use_certificate(pointer, one)
                library.X509_free(one)
                if is_taken != 1:
                    raise TlsFailed(f"OpenSSL does not accept {CERTIFICATE}: {_last_error(library)}")
            else:
                library.SSL_CTX_ctrl(pointer, _EXTRA_CHAIN_CERT, 0, one)  # the context owns it from now on
            found += 1
    finally:
        library.BIO_free(bio)
    if _last_error(library) != _END_OF_FILE:
        raise TlsFailed(f"{CERTIFICATE} has a certificate in it that cannot be read: {_last_error(library)}")
    if not found:
        raise TlsFailed(f"{CERTIFICATE} has no certificate in it")


def _use_key(library: Any, pointer: ctypes.c_void_p, key: bytes) -> None:
    bio = library.BIO_new_mem_buf(key, len(key))
    try:
        private = library.PEM_read_bio_PrivateKey(bio, None, None, b"")  # no passphrase, or OpenSSL would ask for it
    finally:
        library.BIO_free(bio)
    if not private:
        raise TlsFailed(f"{KEY} has no key in it that can be read without a passphrase")
    is_its = library.SSL_CTX_use_PrivateKey(pointer, private)
    library.EVP_PKEY_free(private)
    # A context has room for a certificate for each type of key. A key of another type than the certificate's is not
    # refused at once, and we would present no certificate.
    if is_its != 1 or library.SSL_CTX_check_private_key(pointer) != 1:
        raise TlsFailed(f"{KEY} is not the key of {CERTIFICATE}")


def _last_error(library: Any) -> str:
    """Return OpenSSL's text for its last error."""
    said = library.ERR_reason_error_string(library.ERR_peek_last_error())
    return said.decode() if said else "no reason is given"


@cache
def _library() -> Any:
    """Return the library that `ssl` is linked with. Raises: OSError, AttributeError if it cannot be reached."""
    library = ctypes.PyDLL(getattr(_ssl, "__file__", None))
    address, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, arguments, result in (
        ("BIO_new_mem_buf", [text, number], address),
        ("BIO_free", [address], number),
        ("PEM_read_bio_X509", [address, address, address, text], address),
        ("PEM_read_bio_PrivateKey", [address, address, address, text], address),
        ("X509_free", [address], None),
        ("EVP_PKEY_free", [address], None),
        ("ERR_clear_error", [], None),
        ("ERR_peek_last_error", [], ctypes.c_ulong),
        ("ERR_reason_error_string", [ctypes.c_ulong], text),
        ("SSL_CTX_check_private_key", [address], number),
        ("SSL_CTX_use_certificate", [address, address], number),
        ("SSL_CTX_use_PrivateKey", [address, address], number),
        ("SSL_CTX_get_options", [address], ctypes.c_uint64),
        ("SSL_CTX_ctrl", [address, number, ctypes.c_long, address], ctypes.c_long),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _sentence(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _SENTENCES.get(error.verify_code, f"its certificate cannot be verified: {error.verify_message}")
    return _reason(error)


def _reason(error: ssl.SSLError) -> str:
    """Return OpenSSL's text for an error."""
    if not error.reason:
        return error.strerror or f"error {error.errno or errno.EPROTO}"
    return error.reason.replace("_", " ").lower()


# Now, since a process behind walls can open no file, and so load nothing.
with suppress(OSError, AttributeError):
    _library()
ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
