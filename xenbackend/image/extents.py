"""Which ranges of a chain's disk have data, which are zeros, and which of its images has them.

Must not read a disk's data, nor know a format: the drivers report the extents of their images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from xenbackend.block.chain import OpenLayer
from xenbackend.block.driver import Filter
from xenbackend.block.extents import Extent, Kind, cut, merged
from xenbackend.errors import DriverError


def map_chain(layers: Sequence[OpenLayer], *, all_holes: bool = False) -> Iterator[Extent]:
    """Yield the extents of a chain's disk; ABSENT ranges are in none of its images, and read as zeros.

    Args:
        layers: the open chain, with nothing in flight.
        all_holes: as in `Driver.extents`.

    Raises: DriverError if a table is damaged; OSError.
    """
    places = [place for place, each in enumerate(layers) if not each.driver.is_filter]
    found: Iterator[Extent] = iter(())
    for place in reversed(places):
        found = _over(extents_of(layers[place], all_holes=all_holes), found)
    filters = [each.driver for each in layers[: places[0]]]
    if not all(isinstance(each, Filter) and each.is_transparent for each in filters):
        found = iter([Extent(0, layers[0].geometry.size, Kind.DATA)])  # only reading shows what a filter makes of zeros
    return merged(found)


def changes_of(layers: Sequence[OpenLayer], since: str) -> Iterator[Extent]:
    """Yield what has changed on a chain's disk since a snapshot of its source; ABSENT ranges have not changed.

    Raises: DriverError if that is not known, or if a filter shows another disk than the source has; OSError.
    """
    place = next(place for place, each in enumerate(layers) if not each.driver.is_filter)
    filters = [each.driver for each in layers[:place]]
    if not all(isinstance(each, Filter) and each.is_transparent for each in filters):
        raise DriverError("a layer above it shows a different disk", layer=layers[place].text)
    try:
        yield from merged(layers[place].driver.changes(since, layers[place].geometry.size))
    except DriverError as error:
        error.layer = error.layer or layers[place].text
        raise


def extents_of(layer: OpenLayer, *, all_holes: bool = False) -> Iterator[Extent]:
    """Yield the extents of an image without its parents; all is data if the driver cannot tell.

    Raises: as `map_chain`.
    """
    try:
        yield from merged(layer.driver.extents(layer.geometry.size, all_holes=all_holes))
    except DriverError as error:
        error.layer = error.layer or layer.text
        raise


def _over(child: Iterable[Extent], parent: Iterator[Extent]) -> Iterator[Extent]:
    """Yield a child's extents, with those of its parent in place of its ABSENT ones."""
    current = next(parent, None)
    for extent in child:
        if extent.kind is not Kind.ABSENT:
            yield extent
            continue
        place = extent.start
        while place < extent.end:
            while current is not None and current.end <= place:
                current = next(parent, None)
            if current is None:  # beyond the end of the parent
                yield Extent(place, extent.end - place, Kind.ABSENT)
                break
            end = min(extent.end, current.end)
            below = cut(current, place, end - place)
            yield replace(below, depth=below.depth + 1)
            place = end
