"""sync: a raw image file or block device, by one blocking call after the other.

Synopsis:
    sync:FILE[,cache=on|off][,sector=512|1024|2048|4096][,share=on|off]

Description:
    The same disk as `aio:`, served in the simplest way: each request is one system call, for which the worker waits.
    Use it for comparisons, and on hosts or file systems where asynchronous I/O misbehaves.

Behaviour:
    Sectors, locks, flushes, discards and errors are as with `aio:`. During a call the worker does nothing else:
    `submit` sleeps, which no other driver's may.

Example:
    log:|sync:/srv/images/guest.img

Limits:
    Those of `aio:`. Requests are done one at a time, so a slow disk makes the whole vbd wait.
"""

from __future__ import annotations

from xenbackend.block.drivers.aio import Aio


class Sync(Aio):
    """`Aio` on a file whose calls block."""

    name = "sync"
    blocking = True
