"""The last thousand orders: who ordered what, and how it ended; in memory that no worker is given.

Must not carry out an order, nor decide who may give one.

The keeper keeps the memory, under a name with the version of this layout, until the service is stopped. So if a service
dies before an order has ended, the next one finds the order, which is under way until that service closes it. Numbers
continue.

    page 0, 1          words of 64 bits: 0 MAGIC, then one per slot, 0 = empty, else the order's number << 1 | which of
                       its two copies is valid
    from page 2 on     per slot two copies of RECORD bytes: JSON, padded with spaces

An order lies in slot number % ORDERS. It is written into the copy that is not valid, then made valid by one store, so
that SIGKILL between any two instructions leaves the former state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from xenbackend.errors import KernelError
from xenbackend.kernel import memfd
from xenbackend.log import get_logger
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.units import PAGE, format_duration

KEPT = "orders-1"  # the memory's name at the keeper: of this version of the layout
ORDERS = 1000  # remembered
RECORD = 1024  # bytes
TEXT_MAX = 2048  # characters of any text, as xenstore has it; what does not fit into a record is cut
MAGIC = 0x4A4B4C42_53524F  # "ORSBLKJ"

_RECORDS_AT = 2 * PAGE
_SIZE = _RECORDS_AT + ORDERS * 2 * RECORD
_LONG = ("to", "from", "error")  # what is cut first if a record is too long
_SHORTEST = 100  # characters of each that are kept


class Ledger:
    """The orders, and a line in the log for each that has ended."""

    def __init__(self, keeper: Keeper, wall_clock: Callable[[], float] = time.time) -> None:
        """Go on with the memory that an earlier service left at the keeper, or make one. Raises: KernelError."""
        self._keeper = keeper
        self._wall_clock = wall_clock
        self._log = get_logger("orders")
        fd = keeper.inherited.pop(KEPT, -1)
        is_new = fd < 0 or not memfd.is_sealed(fd, _SIZE)
        if is_new:
            if fd >= 0:  # not made by a service of ours
                os.close(fd)
            fd = memfd.make(KEPT, _SIZE)
        try:
            self._memory = memfd.map_sealed(fd, _SIZE)
            if is_new:
                self._keep(fd)
        finally:
            os.close(fd)
        self._words = self._memory[:_RECORDS_AT].cast("Q")
        if self._words[0] != MAGIC:
            self._words[0] = MAGIC
        self._last = max((word >> 1 for word in self._slots()), default=0)

    @property
    def last(self) -> int:
        """The number of the last order; 0 if there was none."""
        return self._last

    def open(self, verb: str, vbd: str, who: Mapping[str, Any], given: Mapping[str, Any]) -> int:
        """Note an order that begins, and return its number.

        Args:
            verb: such as ``set``.
            vbd: the disk as people call it, ``5/xvda``; empty for an order to the service.
            who: the peer's ``uid``, ``pid`` and ``command``.
            given: ``from`` and ``to``, if the order changes something, and the client's ``token``, if it gave one; each
                a text.
        """
        self._last += 1
        entry = {
            "number": self._last,
            "verb": verb,
            "vbd": vbd,
            "who": dict(who),
            "from": str(given.get("from", ""))[:TEXT_MAX],
            "to": str(given.get("to", ""))[:TEXT_MAX],
            "began": self._wall_clock(),
            "ended": None,
            "code": Code.UNDER_WAY.value,
            "error": "",
            "token": str(given.get("token", "")),
        }
        self._write(entry)
        return self._last

    def close(self, number: int, answer: Answer) -> None:
        """Note how an order ended, and log it. If the answer's data have a ``chain``, it becomes the order's ``to``.

        An order that is not known any more, or has ended already, stays as it is.
        """
        entry = self.entry(number)
        if entry is None or entry["ended"] is not None:
            return
        data = answer.data
        if answer.code is Code.OK and isinstance(data, Mapping) and isinstance(data.get("chain"), str):
            entry["to"] = data["chain"][:TEXT_MAX]
        entry |= {"ended": self._wall_clock(), "code": answer.code.value, "error": answer.sentence[:TEXT_MAX]}
        self._write(entry)
        self._say(entry)

    def entries(self) -> list[dict[str, Any]]:
        """Return the orders, the oldest first. One that has not ended has the code `under-way` and ``ended`` None."""
        found = (self.entry(number) for number in sorted(word >> 1 for word in self._slots()))
        return [each for each in found if each is not None]

    def entry(self, number: int) -> dict[str, Any] | None:
        """Return one order, None if it is not known (any more)."""
        word = self._words[1 + number % ORDERS]
        if number < 1 or word >> 1 != number:
            return None
        place = self._place(number, word & 1)
        try:
            entry = json.loads(bytes(self._memory[place : place + RECORD]))
        except ValueError:
            return None
        return entry if isinstance(entry, dict) else None

    def leave(self) -> None:
        """Leave the memory to the next service."""
        self._release()

    def forget(self) -> None:
        """Drop the memory, because the service was stopped."""
        with suppress(KernelError):
            self._keeper.forget(KEPT)
        self._release()

    def _keep(self, fd: int) -> None:
        try:
            self._keeper.replace(KEPT, fd)
        except KernelError as error:  # orders are remembered, but not beyond this service
            self._log.warning(str(error))

    def _release(self) -> None:
        self._words.release()
        self._memory.release()

    def _slots(self) -> Iterator[int]:
        return (word for word in self._words[1 : 1 + ORDERS].tolist() if word)

    def _write(self, entry: dict[str, Any]) -> None:
        number = int(entry["number"])
        word = self._words[1 + number % ORDERS]
        copy = 1 - (word & 1)
        place = self._place(number, copy)
        self._memory[place : place + RECORD] = _packed(entry)
        self._words[1 + number % ORDERS] = number << 1 | copy

    def _place(self, number: int, copy: int) -> int:
        return _RECORDS_AT + (number % ORDERS * 2 + copy) * RECORD

    def _say(self, entry: dict[str, Any]) -> None:
        fields = {key: entry[key] for key in ("vbd", "from", "to", "code", "error") if entry[key]}
        who = {key: value for key, value in entry["who"].items() if value not in ("", None)}
        took = format_duration(max(0.0, entry["ended"] - entry["began"]))
        self._log.info(entry["verb"], order=entry["number"], **fields, **who, took=took)


def _packed(entry: dict[str, Any]) -> bytes:
    """Return an order as a record; texts are cut if it would be too long."""
    text = json.dumps(entry).encode()
    for key in _LONG:
        if len(text) > RECORD:
            entry = {**entry, key: _cut(entry[key], len(entry[key]) - (len(text) - RECORD))}
            text = json.dumps(entry).encode()
    if len(text) > RECORD:  # of characters that take six bytes each
        entry |= dict.fromkeys(_LONG, "") | {"vbd": _cut(entry["vbd"], 40), "who": {}}
        text = json.dumps(entry).encode()
    return text.ljust(RECORD)


def _cut(text: str, length: int) -> str:
    """Return a text of at most about `length` characters: its beginning, and a mark that there was more."""
    return text if len(text) <= length else f"{text[: max(_SHORTEST, length - 12)]} [...]"
