"""Opens layers in order, with their parents; tries again where that may help, and closes what is open on failure.

Must not wire layers together, except for what a layer may read while it is being opened.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from xenbackend.block.driver import Driver, Env, Filter, Geometry, Lookup
from xenbackend.block.looking import look
from xenbackend.block.options import files_of
from xenbackend.block.spec import LayerSpec, parse_chain
from xenbackend.block.wiring import wire_up
from xenbackend.errors import ChainError, DriverError, printable

MAX_PARENTS = 32
EIO_RETRIES = 10  # as in blktap2: storage that is just coming up answers EIO for a while
EIO_PAUSE = 1.0  # seconds
SECTOR_SIZES = (512, 1024, 2048, 4096)
MAX_SIZE = (1 << 63) - 512  # bytes: offsets in files and requests are signed 64-bit numbers
_SENTENCES = {
    errno.ENOENT: "there is no file or device {path}",
    errno.ENOTDIR: "{path} leads through something that is not a directory",
    errno.EISDIR: "{path} is a directory; name a file or a block device",
    errno.EACCES: "no permission for {path}",
    errno.EPERM: "no permission for {path}",
    errno.EROFS: "{path} is on a read-only file system; attach the disk read-only",
    errno.EBUSY: "{path} is in use",
    errno.ESTALE: "{path} is not known to its server any more: it has been removed or replaced there",
}


class MakeEnv(Protocol):
    """Makes the `Env` of a layer; `layer` is unique in the chain, and the same in a successor."""

    def __call__(self, layer: str, /, *, read_only: bool, shareable: bool) -> Env:
        """Return the layer's `Env`."""


@dataclass(frozen=True, slots=True)
class OpenLayer:
    """An open layer. `parent_of` is the text of the layer whose image names this one as its parent, or empty."""

    text: str
    driver: Driver
    geometry: Geometry
    parent_of: str = ""


class Opening:
    """The layers that have been opened so far, in order; `close` closes them again."""

    def __init__(self, make_env: MakeEnv, sleep: Callable[[float], None]) -> None:
        self._make_env = make_env
        self._sleep = sleep
        self.layers: list[OpenLayer] = []  # the source and its parents, as far as they could be opened
        self._opened: list[Driver] = []
        self._keys: set[str] = set()

    def source_and_parents(self, spec: LayerSpec, *, read_only: bool, shareable: bool) -> list[OpenLayer]:
        """Open a source, then its parents for reading, each after the child whose image names it."""
        layers = self.layers
        layers.append(self._open(spec, read_only=read_only, shareable=shareable))
        seen: set[str] = set()  # identities of all layers' files; only if there is a parent: each costs a question
        while (reference := layers[-1].driver.parent) is not None:
            child = layers[-1]
            if not seen:
                seen = _identities(child.driver.env.files, child.driver.options)
            parent = _parse_parent(child.text, reference.text)
            if seen & _identities(child.driver.env.files, parent.options):
                problem = "is the same file as the image or one of its children, or has their data"
                raise DriverError(f"its parent {parent.text} {problem}", layer=child.text)
            if len(layers) > MAX_PARENTS:
                raise DriverError(
                    f"there are more than {MAX_PARENTS} parents in a row; commit or convert some", layer=spec.text
                )
            layers.append(self._parent(parent, child, seen))
        return layers[:]

    def filter(self, spec: LayerSpec, layers: Sequence[OpenLayer], *, read_only: bool) -> OpenLayer:
        """Open a filter in front of `layers`, whose first one is the top."""
        layer = self._open(spec, below=layers[0], read_only=read_only, look_at=layers)
        if layer.driver.parent is not None:
            raise DriverError("a filter cannot have a parent: it has a layer below it", layer=spec.text)
        # It may have requests of its own from now on, while those above it are opened.
        wire_up([layer.driver, *(each.driver for each in layers)], layer.driver.complete)
        return layer

    def close(self) -> None:
        """Close what is open, the last one first."""
        for driver in reversed(self._opened):
            with suppress(Exception):  # the failure to report is the one because of which we close
                driver.close()

    def _parent(self, spec: LayerSpec, child: OpenLayer, seen: set[str]) -> OpenLayer:
        """Open a parent. None of its files may be in `seen`, those of its children; they are added to that."""
        try:
            parent = self._open(spec, read_only=True, parent_of=child.text)
        except DriverError as error:
            if error.errno == errno.EBUSY and seen & _identity(child.driver.env.files, error.path):
                raise _twice(spec, error.path) from error  # our own child has locked it
            raise
        own = {path: _identity(parent.driver.env.files, path) for path in files_of(parent.driver.options).values()}
        for path, identity in own.items():
            if seen & identity:
                raise _twice(spec, path)
        seen.update(*own.values())
        child.driver.next, child.driver.below = parent.driver, parent.geometry
        with explained(child.text, {}):
            child.driver.check_parent(parent.geometry)
        return parent

    def _open(
        self,
        spec: LayerSpec,
        *,
        read_only: bool,
        shareable: bool = False,
        below: OpenLayer | None = None,
        parent_of: str = "",
        look_at: Sequence[OpenLayer] = (),
    ) -> OpenLayer:
        shareable = shareable or getattr(spec.options, "share", False)
        env = self._make_env(self._key(spec), read_only=read_only, shareable=shareable)
        driver, geometry = self._try(spec, env, below, look_at)
        self._opened.append(driver)
        _check_geometry(spec.text, geometry)
        return OpenLayer(spec.text, driver, geometry, parent_of)

    def _try(
        self, spec: LayerSpec, env: Env, below: OpenLayer | None, look_at: Sequence[OpenLayer]
    ) -> tuple[Driver, Geometry]:
        """Open a fresh driver, again and again until it succeeds, fails with anything but EIO, or tries run out."""
        for _ in range(EIO_RETRIES):
            try:
                return _open_once(spec, env, below, look_at)
            except DriverError as error:
                if error.errno != errno.EIO:
                    raise
            self._sleep(EIO_PAUSE)
        return _open_once(spec, env, below, look_at)

    def _key(self, spec: LayerSpec) -> str:
        """Return a name for a layer that stays the same when other layers are put above or below it."""
        base = f"{spec.driver.name}-{zlib.crc32(spec.text.encode(errors='surrogateescape')):08x}"
        key, number = base, 1
        while key in self._keys:
            number += 1
            key = f"{base}.{number}"
        self._keys.add(key)
        return key


def _open_once(
    spec: LayerSpec, env: Env, below: OpenLayer | None, look_at: Sequence[OpenLayer]
) -> tuple[Driver, Geometry]:
    with explained(spec.text, files_of(spec.options)):
        driver = spec.driver(spec.options)
        driver.env = env
        if below is not None:
            driver.next, driver.below = below.driver, below.geometry
        if isinstance(driver, Filter):
            driver.look = partial(look, [each.driver for each in look_at], env)
        return driver, driver.open(env)


@contextmanager
def explained(layer: str, files: dict[str, str]) -> Iterator[None]:
    """Turn any exception of a driver into a DriverError that names the layer, the option and the file."""
    try:
        yield
    except DriverError as error:
        error.layer = error.layer or layer
        error.option = error.option or _option_of(files, error.path)
        raise
    except OSError as error:
        path = str(error.filename or next(iter(files.values()), ""))
        number = error.errno or errno.EIO
        sentence = _SENTENCES.get(number, "{path}: " + os.strerror(number)) if path else str(error)
        problem = sentence.replace("{path}", path)
        raise DriverError(problem, layer=layer, option=_option_of(files, path), path=path, errno=number) from error
    except Exception as error:
        problem = f"its driver failed unexpectedly: {type(error).__name__}: {error}"
        raise DriverError(problem, layer=layer) from error


def _option_of(files: dict[str, str], path: str) -> str:
    return next((option for option, file in files.items() if file == path), "")


def _parse_parent(child: str, text: str) -> LayerSpec:
    """Return the layer that an image names as its parent: a single one, since an image is not trusted."""
    try:
        spec = parse_chain(text)
    except ChainError as error:
        raise DriverError(f"its parent {text!r} cannot be opened: {error.problem}", layer=child) from error
    if len(spec.layers) > 1:
        raise DriverError(f"its parent {text!r} is a chain and not an image", layer=child)
    return spec.layers[0]


def _twice(spec: LayerSpec, path: str) -> DriverError:
    problem = f"{printable(path)} has the data of one of its children; each image needs its own files"
    return DriverError(problem, layer=spec.text, path=path)


def _identities(files: Lookup, options: Any) -> set[str]:
    """Return the identities of the files that a layer's options name."""
    return {each for path in files_of(options).values() for each in _identity(files, path)}


def _identity(files: Lookup, path: str) -> set[str]:
    """Return the identity of a file as a set of one, or an empty set if it cannot be looked at."""
    with suppress(OSError, DriverError):  # opening the file reports what is wrong
        return {files.look(path).identity}
    return set()


def _check_geometry(layer: str, geometry: Geometry) -> None:
    size, sector_size = geometry.size, geometry.sector_size
    if sector_size not in SECTOR_SIZES:
        raise DriverError(f"its sector size is {sector_size} bytes; 512 to 4096 are possible", layer=layer)
    if geometry.physical_sector_size & geometry.physical_sector_size - 1:
        raise DriverError(
            f"its physical sector of {geometry.physical_sector_size} bytes is not a power of two", layer=layer
        )
    if size <= 0:
        raise DriverError("it is empty; a disk needs at least one sector", layer=layer)
    if size > MAX_SIZE:
        raise DriverError(f"it has {size} bytes; a disk must have less than 8192 PiB", layer=layer)
    if size % sector_size:
        raise DriverError(f"its size, {size} bytes, is not a multiple of its sector, {sector_size} bytes", layer=layer)
