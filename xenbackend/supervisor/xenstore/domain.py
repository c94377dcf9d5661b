"""What xenstore says of the domain that a vbd is for.

Must not read what a guest may write.
"""

from __future__ import annotations

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.paths import domain_path
from xenbackend.supervisor.xenstore.store import Store

_INCOMING = "--incoming"  # xl's: appended to the name until the guest runs here


def is_incoming(store: Store, domid: int) -> bool:
    """Return whether `xl migrate` brings the guest here: until it runs, its former self may have its images."""
    return _read(store, f"{domain_path(domid)}/name").endswith(_INCOMING)


def boots_by_device_model(store: Store, domid: int) -> bool:
    """Return whether a device model shows the guest an emulated disk until its own driver starts."""
    return _read(store, f"/libxl/{domid}/type") == "hvm"


def _read(store: Store, path: str) -> str:
    try:
        return store.read_optional(path) or ""
    except StoreError:
        return ""  # the guest gets its disk all the same
