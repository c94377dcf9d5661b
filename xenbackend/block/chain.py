"""An open chain: opened from the bottom up, wired together, closed from the top down.

Must not do I/O of its own, nor know a driver by name.

    text ── parse_chain ── ChainSpec ── open_chain ── Chain
            nothing opened              source, its parents, then the filters upward

Wiring: completions bypass a layer that has no `on_complete`, and requests bypass a filter that does not override
`submit`. So a layer costs nothing in a direction in which it does nothing.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

from xenbackend.block.checked import Checked
from xenbackend.block.driver import Complete, Driver, Filter, Geometry
from xenbackend.block.opening import MakeEnv, Opening, OpenLayer
from xenbackend.block.request import Request
from xenbackend.block.spec import ChainSpec, LayerSpec, only_read_from, parse_chain
from xenbackend.block.timed import Timed
from xenbackend.block.wiring import wire_up
from xenbackend.errors import DriverError

__all__ = ["Chain", "ChainSpec", "LayerSpec", "MakeEnv", "OpenLayer", "open_chain", "parse_chain"]

Contain = Callable[[Exception, list[Request]], None]  # takes a layer's exception, and the batch it had been given


class Chain:
    """An open chain: requests are submitted to its top layer, and come back by `complete`.

    `layers` begins with the guest's end and ends with the source's parents. `geometry` is that of the guest's end.
    A caller may keep a reference to `submit`: only `time` and `untime` change it.
    """

    def __init__(self, layers: Sequence[OpenLayer], *, read_only: bool, checked: bool = False) -> None:
        self.layers = tuple(layers)
        self.geometry = _announced(self.layers[0].geometry, read_only=read_only)
        self._plain = self._stack = _with_checks(self.layers) if checked else [each.driver for each in self.layers]
        self._shortened: list[Driver] = []  # filters whose `submit` was replaced by that of the layer below
        self._wire_down()
        self.contain: Contain | None = None  # D8; must be set before `complete` is
        self.complete = self._stack[0].complete  # a layer may have requests of its own before anybody is served
        self.submit: Callable[[list[Request]], None] = self._stack[0].submit

    @property
    def complete(self) -> Complete:
        """The function that finished requests are given to; must be set before the first `submit`."""
        return self._stack[0].complete

    @complete.setter
    def complete(self, complete: Complete) -> None:
        wire_up(self._stack, complete, partial(_guarded, self.contain) if self.contain else None)

    def time(self) -> list[Timed]:
        """Measure each layer until `untime`, and return the timers, the top layer's first.

        Requests that are in flight go on undisturbed.
        """
        timers = [Timed(each.text) for each in self.layers]
        above = {id(each.driver): timer for each, timer in zip(self.layers, timers, strict=True)}
        self._rewire([each for driver in self._plain for each in (above.get(id(driver)), driver) if each is not None])
        return timers

    def untime(self) -> None:
        """Take the timers out of the chain. A timer still passes on the requests that come back to it."""
        self._rewire(self._plain)

    def control(self, layer: str, verb: str, arguments: Sequence[str]) -> bytes:
        """Execute an operator's verb on a layer, named by its driver or its index from the top. Raises: DriverError."""
        return self._find(layer).control(verb, arguments)

    def figures(self) -> list[int]:
        """Return the layers' figures in one list: by layer from the top, then in the order of `Driver.figures`."""
        return [value for each in self.layers for value in each.driver.figures().values()]

    def release(self) -> None:
        """Have every layer pass on the requests that it holds back: somebody waits until nothing is in flight."""
        for each in self.layers:
            each.driver.release()

    def blame(self, error: BaseException) -> str:
        """Return the text of the layer that raised an exception (D8), or an empty text if none of them did."""
        owners: dict[int, str] = {}
        for each in self.layers:  # downward: an object that several layers forward to belongs to the lowest of them
            owners[id(getattr(each.driver.submit, "__self__", None))] = each.text
            owners[id(each.driver)] = each.text
        found = ""
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            found = owners.get(id(trace.tb_frame.f_locals.get("self")), found)
            trace = trace.tb_next
        return found

    def close(self) -> None:
        """Close every layer, the top one first; nothing is in flight. Raises: the first exception of a layer."""
        failure: Exception | None = None
        for driver in self._stack:
            try:
                driver.close()
            except Exception as error:  # the layers below must be closed nevertheless
                failure = failure or error
        if failure:
            raise failure

    def _rewire(self, stack: list[Driver]) -> None:
        complete = self.complete
        for driver in self._shortened:
            del driver.submit
        self._shortened = []
        self._stack = stack
        self._wire_down()
        self.complete = complete
        self.submit = stack[0].submit

    def _wire_down(self) -> None:
        """Set `next` from the bottom up, so that the `submit` of each lower layer is already the shortest way down."""
        for upper, lower in reversed(list(zip(self._stack, self._stack[1:], strict=False))):
            upper.next = lower
            if type(upper).submit is Filter.submit and "submit" not in vars(upper):
                upper.submit = lower.submit  # type: ignore[method-assign]  # one call less
                self._shortened.append(upper)

    def _find(self, layer: str) -> Driver:
        named = [each.driver for each in self.layers if each.driver.name == layer]
        if len(named) == 1:
            return named[0]
        if layer.isdecimal() and int(layer) < len(self.layers):
            return self.layers[int(layer)].driver
        known = ", ".join(f"{index} is {each.text}" for index, each in enumerate(self.layers))
        problem = "several layers" if named else "no layer"
        hint = "choose one by its number" if named else "its layers are"
        raise DriverError(f"the chain has {problem} {layer!r}; {hint}: {known}", errno=errno.ENOENT)


def _guarded(contain: Contain, on_complete: Complete) -> Complete:
    """Return `on_complete`, wrapped so that `contain` gets its exceptions together with the batch it was given."""

    def guarded(batch: list[Request]) -> None:
        given = batch[:]  # the list itself belongs to the layer from now on (D2)
        try:
            on_complete(batch)
        except Exception as bug:
            contain(bug, given)

    return guarded


def open_chain(
    spec: ChainSpec,
    make_env: MakeEnv,
    *,
    read_only: bool,
    shareable: bool = False,
    checked: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Chain:
    """Open a chain. If anything fails, close everything that was opened, in reverse order.

    Args:
        spec: the chain to open.
        make_env: called once for each layer and each parent.
        read_only: no layer may alter anything.
        shareable: others may write to the source's image, too.
        checked: put the asserting layer (`block.checked`) between all layers; never in production.
        sleep: waits for so many seconds before a layer that could not be opened because of EIO is tried again.

    Raises: DriverError, which names layer, option and file.
    """
    opening = Opening(make_env, sleep)
    try:
        *filters, source = spec.layers
        first = only_read_from([each.driver for each in spec.layers])
        is_only_read = [read_only or place >= first for place in range(len(spec.layers))]
        layers = opening.source_and_parents(source, read_only=is_only_read[-1], shareable=shareable)
        for place, filter_spec in reversed(list(enumerate(filters))):
            layers.insert(0, opening.filter(filter_spec, layers, read_only=is_only_read[place]))
        if layers[0].geometry.read_only and not read_only:
            raise DriverError("it can only be read; attach the disk read-only", layer=spec.text, errno=errno.EROFS)
        return Chain(layers, read_only=read_only, checked=checked)
    except BaseException:
        opening.close()
        raise


def _announced(top: Geometry, *, read_only: bool) -> Geometry:
    """Return the geometry for the guest: if the disk is read-only, without discards, whatever its layers can do."""
    if not (read_only or top.read_only):
        return top
    return replace(top, read_only=True, can_discard=False, discard_granularity=0, discard_alignment=0)


def _with_checks(layers: Sequence[OpenLayer]) -> list[Driver]:
    """Return the drivers, with an asserting layer above each one."""
    stack: list[Driver] = []
    above = "the caller"
    for each in layers:
        stack += [Checked(above, each.text, each.geometry), each.driver]
        above = each.text
    return stack
