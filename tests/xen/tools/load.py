"""fio in a guest: random writes of every size with flushes in between, then each block is read back and compared.

Must not measure: what an emulated machine's rates are worth is for a benchmark to say.
"""

from __future__ import annotations

from tests.xen.tools.command import until
from tests.xen.tools.driver_domain import DriverDomain
from tests.xen.tools.guest import Guest
from tests.xen.tools.service import Service

SIZE_MIB = 4  # of a disk that a load writes


def verify(file: str, size: str = "8m", *, sector_size: int = 512) -> str:
    """Return the command; its status says whether every block was right."""
    return (
        f"fio --name=verify --filename={file} --size={size} --rw=randwrite --bsrange={sector_size}-128k "
        "--ioengine=libaio --iodepth=16 --direct=1 --fsync=64 --verify=crc32c --minimal --alloc-size=1024"
    )


class Load:
    """A disk of a guest, the first `SIZE_MIB` of it, that is written and verified again and again until `stop`.

    guest   whose disk it is
    """

    def __init__(self, guest: Guest, vdev: str, *, sector_size: int = 512) -> None:
        self.guest = guest
        self._vdev = vdev
        self._end = f"/run/stop-{vdev}"
        command = verify(f"/dev/{vdev}", f"{SIZE_MIB}m", sector_size=sector_size)
        again = f"until [ -e {self._end} ]; do {command} || exit 1; done"
        self._job = guest.start(f"rm -f {self._end}\n{again}")

    def wait_until_it_writes(self, service: Service | DriverDomain) -> None:
        """Return when the service that has the disk, here or in a driver domain, has seen more requests."""
        before = self._writes(service)
        until(f"{self._vdev} is written", lambda: self._writes(service) > before)

    def stop(self) -> None:
        """End it. Raises: Failed, when a request failed or a block was wrong."""
        self.guest.run(f"touch {self._end}")
        self._job.wait()

    def is_over(self) -> bool:
        """Return whether it has ended, by itself or because it was told to."""
        return self._job.is_over()

    def _writes(self, service: Service | DriverDomain) -> int:
        return int(service.disk(self.guest.domid, self._vdev)["counters"].get("writes", 0))
