"""Disks of servers and clusters as targets of image commands: recognises them, and creates images in a cluster.

Must not know a protocol, nor overwrite an existing image.

An image in a cluster is created as ``NAME.partial``, and renamed when all of it is durable. If anything fails, it is
removed again. If the process is killed, it is left, and an administrator has to remove it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from xenbackend.block.rbd.making import PARTIAL, Place, partial_of, place_of
from xenbackend.block.servers import account_of, servers_of
from xenbackend.block.spec import ChainSpec, LayerSpec, parse_chain
from xenbackend.errors import ConfigError, DriverError, printable
from xenbackend.image.convert import Converted, identity_of, without_small_holes
from xenbackend.image.extents import map_chain
from xenbackend.image.names import has_driver
from xenbackend.image.session import Progress, Session
from xenbackend.image.transfer import Transfer, pieces_of


def find_remote(text: str) -> ChainSpec | None:
    """Return the chain if a text is one layer with a disk of a server or cluster, else None. Raises: ChainError."""
    if not has_driver(text):
        return None
    chain = parse_chain(text)
    options = chain.layers[-1].options
    is_remote = bool(servers_of(options)) or account_of(options) is not None
    return chain if is_remote and len(chain.layers) == 1 else None


def convert(source: ChainSpec, target: ChainSpec, progress: Progress, *, direct: bool = False) -> Converted:
    """Create an image in a cluster from the disk of `source`.

    Raises: ConfigError if the target exists, or is not in a cluster; DriverError, RequestFailed.
    """
    (layer,) = target.layers
    if account_of(layer.options) is None:
        raise ConfigError(f"{printable(target.text)} exists already; to overwrite all of its content: --overwrite")
    with Session(direct=direct) as session:
        disk = session.open(source, read_only=True)
        begun = identity_of(disk)
        with _made(session, layer, disk.size) as partial:
            made = session.open(parse_chain(partial), read_only=False)
            transfer = Transfer(session, disk, made, is_blank=True)
            progress(0, disk.size)
            extents = without_small_holes(map_chain(disk.chain.layers, all_holes=True))
            data = (each for each in extents if not each.is_zeros)
            transfer.run(pieces_of(data), lambda piece: progress(piece.end, disk.size))
            transfer.flush()
            session.close(made)
            if identity_of(disk) != begun:
                raise ConfigError(f"the source was changed while it was converted to {printable(target.text)}")
            progress(disk.size, disk.size)
        return Converted(disk.size, transfer.written, 0)


def take_lock(target: ChainSpec, owner: str) -> str:
    """Take the lock of an image in a cluster from `owner`, which has died; return who that was.

    Raises: ConfigError if the target is not in a cluster; DriverError.
    """
    layer = target.layers[-1]
    account = account_of(layer.options)
    if account is None:
        raise ConfigError(f"{printable(layer.text)} is not an image of a cluster, so there is no lock")
    with Session() as session, place_of(layer.options, session.opener.read_cluster(account)) as place:
        return str(place.take_lock(layer.options.image.image, owner))


@contextmanager
def _made(session: Session, layer: LayerSpec, size: int) -> Iterator[str]:
    """Yield the layer of a new, partial image. It is renamed if the body succeeds, and removed otherwise."""
    account, name = account_of(layer.options), layer.options.image.image
    assert account is not None  # noqa: S101 - the caller has checked it
    text = partial_of(layer)
    with place_of(layer.options, session.opener.read_cluster(account)) as place:
        if place.has(name):
            raise ConfigError(f"{printable(name)} exists already; to overwrite all of its content: --overwrite")
        if place.has(name + PARTIAL):
            raise ConfigError(f"{printable(name + PARTIAL)} is left from an earlier conversion; `rbd rm` removes it")
        place.create(name + PARTIAL, size)
        try:
            yield text
            _publish(place, name)
        except BaseException:
            with suppress(DriverError):  # the first failure is the one to report
                session.close_chain(text)
                place.remove(name + PARTIAL)
            raise


def _publish(place: Place, name: str) -> None:
    try:
        place.rename(name + PARTIAL, name)
    except DriverError as problem:
        if problem.errno != errno.EEXIST:
            raise
        raise ConfigError(f"{printable(name)} has been made meanwhile by another client") from problem
