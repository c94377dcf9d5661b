"""`python -m tests.engines.client CONF IMAGE`: another client of a cluster, which has an image's lock.

It prints ``locked CLIENT ADDRESS`` and then obeys lines: for ``write BYTE OFFSET LENGTH`` it writes at once and then
flushes, and prints the errno of both; ``close`` closes the image in order. The end of its input ends it at once.
"""

from __future__ import annotations

import os
import sys

from xenbackend.block.servers import Account
from xenbackend.ceph.cluster import Cluster
from xenbackend.ceph.image import Image, Pool
from xenbackend.ceph.requests import Requests
from xenbackend.opener.cluster import read_settings


def main(conf: str, name: str) -> None:
    """Take the lock and obey the lines of standard input."""
    cluster = Cluster("admin", read_settings(Account(conf, "admin")))
    pool = Pool(cluster, "rbd")
    image = Image(cluster, pool, name, read_only=False)
    image.acquire()
    ready = os.eventfd(0)
    image.notify(ready)
    requests = Requests(image)
    print("locked", image.owners()[0].client, cluster.address(), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["write", byte, offset, length]:
                data = [memoryview(bytearray(byte.encode() * int(length)))]
                codes = []
                for start in (requests.write, requests.flush):
                    start(0, int(offset), int(length), data)
                    os.eventfd_read(ready)
                    codes += [result for _, result in requests.poll()]
                print(*(-code for code in codes), flush=True)
            case ["close"]:
                image.close()
                pool.close()
                cluster.close()
                print("closed", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
