"""sync: a raw image file or block device, one blocking call after the other.

Synopsis:
    sync:FILE[,cache=on|off][,sector=512|1024|2048|4096][,share=on|off]

Description:
    The same disk as `aio:`, served in the simplest way there is: each request is one system call that the worker waits
    for. It is there to compare with, and for hosts or file systems on which asynchronous I/O misbehaves.

Behaviour:
    Sectors, locking, flush, discard and errors are those of `aio:`. The worker does nothing else while a call lasts,
    although a driver's `submit` should never sleep: that is what this driver is for.

Example:
    log:|sync:/srv/images/guest.img

Limits:
    Those of `aio:`, and one request at a time: a slow disk makes the whole vbd wait.
"""

from __future__ import annotations

from xenbackend.block.drivers.aio import Aio


class Sync(Aio):
    """The driver aio, on a file that blocks."""

    name = "sync"
    blocking = True
