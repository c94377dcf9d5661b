"""The protocol with the guest: bytes in, bytes out, no I/O."""
