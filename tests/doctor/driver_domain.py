"""A driver domain on the simulated xenstore, with the rights that libxl gives it."""

from __future__ import annotations

from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.store import Store


def make_driver_domain(xenstored: Xenstored) -> str:
    """Make domain 7 serve a disk of domain 5, and return the address at which it finds xenstore."""
    address = xenstored.add_domain_socket(7)
    frontend = "/local/domain/5/device/vbd/51712"
    with Store(xenstored.address) as nodes:
        for path, rights in (("/local/domain/7/backend", ["n0", "r7"]), ("/local/domain/5/device", ["n5"])):
            nodes.mkdir(path)
            nodes.set_permissions(path, rights)
        keys = {"frontend": frontend, "script": "block-xenbackend", "params": "aio:/img", "mode": "w", "state": "2",
                "hotplug-status": "connected"}  # fmt: skip
        nodes.write_many("/local/domain/7/backend/vbd/5/51712", keys)
        nodes.write("/local/domain/5/name", "guest-5")
        nodes.set_permissions("/local/domain/5/name", ["n0", "r5"])
        for path in (frontend, f"{frontend}/state"):
            nodes.write(path, "3" if path.endswith("state") else "")
            nodes.set_permissions(path, ["n5", "r7"])
    return address
