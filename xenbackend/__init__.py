"""xenbackend: disks for Xen guests, made of chains of block drivers."""

__version__ = "0.2.0"
