"""Looks at a chain whose image another worker still writes to, without locking or changing anything.

Must not serve a guest's requests: the chain is open only for as long as the look takes.

While a guest migrates within a host, the disks of its new domain are made while the old domain still has them. The new
domain's frontend must find its keys before the old domain ends, so its chain is only looked at first, and opened with
its locks when a ring is to be connected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain as chain_of
from itertools import repeat

from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import messages
from xenbackend.worker.env import EnvFactory, WorkerEnv
from xenbackend.worker.facts import facts_of
from xenbackend.worker.files import HostFiles, Opener


def probe(chain: str, reactor: Reactor, opener: Opener, *, read_only: bool) -> list[messages.LayerFacts]:
    """Return a chain's layers, top first, as they are likely to be once it is open.

    Raises: ChainError, DriverError; also if it could not be written to, unless `read_only`.
    """
    with probing(chain, reactor, opener, read_only=read_only) as found:
        top, *others = [facts_of(layer) for layer in found.layers]
    return [replace(top, read_only=read_only), *others]


@contextmanager
def probing(chain: str, reactor: Reactor, opener: Opener, *, read_only: bool) -> Iterator[Chain]:
    """Open a chain within this context, to look at it. Raises: as `probe`."""
    source = HostFiles(reactor, opener, use_queues=False, locks=False, whole=not read_only, creates=False)
    files = HostFiles(reactor, opener, use_queues=False, locks=False, creates=False)
    factories = [EnvFactory(reactor, source), EnvFactory(reactor, files)]
    ways = chain_of(
        factories[:1], repeat(factories[1])
    )  # the source is opened first; what comes after is not written to

    def make_env(layer: str, *, read_only: bool, shareable: bool) -> WorkerEnv:
        return next(ways)(layer, read_only=read_only, shareable=shareable)

    try:
        found = open_chain(parse_chain(chain), make_env, read_only=True, shareable=True)
        try:
            yield found
        finally:
            found.close()
    finally:
        for factory in factories:
            factory.close()
        files.close()
        source.close()
