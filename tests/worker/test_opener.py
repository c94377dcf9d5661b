"""The worker's side of an opener: invalid answers. Valid ones are tested in `tests/opener/test_main.py`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

import pytest

from tests.descriptors import open_descriptors
from xenbackend.errors import ConfigError, DriverError
from xenbackend.protocol import datagrams, opening
from xenbackend.protocol.opening import Given
from xenbackend.worker.opener import NoOpener, OpenerGone, RemoteOpener

_answering: list[threading.Thread] = []


def answered(data: bytes, fds: Sequence[int] = ()) -> RemoteOpener:
    """Return an opener that gives one answer and ends."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer() -> None:
        with far:
            far.recv(opening.MAX_MESSAGE)
            datagrams.send(far, data, fds)

    _answering.append(threading.Thread(target=answer, daemon=True))
    _answering[-1].start()
    return RemoteOpener(near)


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (b"", []),
        (b"nonsense", []),
        (opening.encode(Given()), []),
        (opening.encode(Given()), [0, 1]),
        (opening.encode(Given()), [0]),
        (opening.encode(Given(2, "", "/img")), [0]),
        (opening.encode(opening.Opened("/img", "", 0)), [0]),
    ],
)
def test_an_answer_that_is_none_is_an_opener_that_is_gone(data: bytes, fds: list[int]) -> None:
    """An invalid answer counts as an opener that is gone, and leaves no descriptor open."""
    before = open_descriptors()
    opener = answered(data, fds)
    with pytest.raises(OpenerGone):
        opener.open("/img", write=True)
    opener.close()
    _answering.pop().join()

    assert before == open_descriptors()


def test_errors_are_as_of_the_call_itself() -> None:
    """An answer with an errno alone becomes an OSError about the file, one with a sentence a ConfigError."""
    gone = answered(opening.encode(Given(2, "", "/img")))
    with pytest.raises(FileNotFoundError) as caught:
        gone.look("/img")
    gone.close()
    _answering.pop().join()
    assert "/img" == caught.value.filename
    for function in ("make", "publish"):
        taken = answered(opening.encode(Given(17, "it is taken")))
        with pytest.raises(ConfigError, match="it is taken"):
            getattr(taken, function)()
        taken.close()
        _answering.pop().join()


def test_between_two_orders_nothing_is_opened() -> None:
    """Without an order under way nothing can be opened, and the error says so."""
    nobody = NoOpener()
    for function in (
        lambda: nobody.open("/img", write=False),
        lambda: nobody.open_record("/img"),
        lambda: nobody.look("/img"),
        lambda: nobody.find("parent", "/img", ["base"]),
        lambda: nobody.resolve("/img"),
    ):
        with pytest.raises(DriverError, match="while no order under way may open files"):
            function()
