"""What the service answers over its control socket: one line of JSON for each request.

Must not open a socket.

    {"version": 1, "code": "ok", "data": …}                            and "order": N if the request was an order
    {"version": 1, "code": "busy", "error": "sentence", "data": …}     `data` if something is known all the same

Release 0.1.0 had neither versions nor codes. Its answers are understood, as a host may still run it:

    {"data": …}    {"error": "sentence"}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xenbackend.errors import ConfigError, DriverError
from xenbackend.protocol.codes import Code, known

VERSION = 1

Reply = Callable[["Answer"], None]  # takes the one answer to a request, now or later


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended; `sentence` is for people if the code is not `Code.OK`."""

    code: Code
    data: Any = None
    sentence: str = ""
    order: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the plain values of the line."""
        found: dict[str, Any] = {"version": VERSION, "code": self.code.value, "data": self.data}
        if self.order is not None:
            found["order"] = self.order
        if self.code is not Code.OK:
            found["error"] = self.sentence
        return found

    @classmethod
    def from_json(cls, values: Any) -> Answer:
        """Return the answer of a line of `as_json`, or of release 0.1.0. Raises: ValueError, if it is neither."""
        if isinstance(values, dict) and values.keys() in ({"data"}, {"error"}):
            code = Code.FAILED if "error" in values else Code.OK
            return cls(code, values.get("data"), str(values.get("error", "")))
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ValueError(f"not an answer of version {VERSION}: {str(values)[:80]}")
        order, code = values.get("order"), known(values["code"])
        if code is not Code.OK and "error" not in values:
            raise ValueError(f"not an answer, as it gives no reason: {str(values)[:80]}")
        return cls(
            code,
            values.get("data"),
            str(values.get("error", "")),
            order if type(order) is int else None,
        )


def of_bug(bug: Exception) -> Answer:
    """Return the answer to a request that met a fault of the program."""
    return Answer(Code.BUG, None, f"the service failed to do that, see its log: {type(bug).__name__}: {bug}")


def code_of(problem: Exception) -> Code:
    """Return the code of an error that has none: INVALID if it is the caller's mistake, else FAILED."""
    return Code.INVALID if isinstance(problem, ConfigError | DriverError) else Code.FAILED
