"""The NBD protocol, as a server and as a client: bytes in, bytes out, no I/O."""
