"""A new leaf for a chain in service: an empty image whose parent is the image that the guest writes to.

Must not touch the chain: the caller waits until nothing is in flight, closes it, and opens the new one in its place.

The new image is durable and has its name when `make_leaf` returns. Nothing in it depends on what is written to its
parent, so it is made with the guest's requests in flight, and they wait only while chains are closed and opened:

    text = make_leaf(chain, ...)         the guest writes to `chain`
    hold, flush, chain.close()           its requests wait
    open text                            the old image is opened as a parent: read-only, its lock shared
"""

from __future__ import annotations

import os

from xenbackend.block.chain import Chain
from xenbackend.block.driver import Filter
from xenbackend.block.leaf import leaf_over
from xenbackend.errors import ConfigError
from xenbackend.opener.newfile import fill, naming
from xenbackend.worker.opener import RemoteOpener


def make_leaf(chain: Chain, opener: RemoteOpener, path: str, image_format: str = "") -> str:
    """Make an image over a chain's source, and return the text of the chain that has it in the source's place.

    Args:
        chain: open, and perhaps written to at the moment.
        opener: makes the file.
        path: name of the new image; it never replaces another file. Only its owner may read it.
        image_format: vhd, qcow2 or qcow; by default the source's own, and over a raw one qcow2.

    Raises: ConfigError, if there cannot be such a child; OSError. Nothing is left at `path` then.
    """
    if any(isinstance(layer.driver, Filter) and layer.driver.keeps_writes for layer in chain.layers):
        raise ConfigError(
            "what the guest writes goes to a layer above the image, which is only read: a new image over it would "
            "receive nothing"
        )
    if any(isinstance(layer.driver, Filter) and layer.driver.may_answer_alone for layer in chain.layers):
        raise ConfigError(
            "a cache with mode=writeback may hold data that the image does not have, and that a snapshot would miss"
        )
    fd = opener.make()
    source = next(number for number, layer in enumerate(chain.layers) if not layer.driver.is_filter)
    try:
        leaf = leaf_over(chain.layers[source:], path, image_format)
        with naming(path):
            fill(fd, leaf.blank)
    finally:
        os.close(fd)
    text = leaf.text if opener.publish() else leaf.unmarked
    return "|".join([*(layer.text for layer in chain.layers[:source]), text])
