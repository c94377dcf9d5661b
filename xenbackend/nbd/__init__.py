"""The protocol with an NBD client: bytes in, bytes out, no I/O."""
