"""The rights that a worker gives up before it reads its first byte from a guest or an image."""
