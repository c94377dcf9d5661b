"""The caller's side of the control socket, against servers that misbehave."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from xenbackend.errors import XenbackendError
from xenbackend.protocol.client import call


def _call_one_that_says(path: Path, answer: bytes | None, timeout_s: float = 5.0) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            near, _ = server.accept()
            with near:
                near.recv(1000)
                if answer is None:
                    near.recv(1)  # until the caller gives up
                else:
                    near.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            call(str(path), {"verb": "ping"}, timeout_s)
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b'{"error": "there is no vbd 5/xvdz"}\n', "there is no vbd 5/xvdz"),
        (b"", "closed the connection"),
        (b'{"data": 1', "closed the connection"),
        (None, r"did not answer within 0\.05 s"),
    ],
)
def test_every_failure_is_a_sentence(tmp_path: Path, answer: bytes | None, sentence: str) -> None:
    """The service's own sentence, a hang-up and silence each reach the caller as one XenbackendError."""
    with pytest.raises(XenbackendError, match=sentence):
        _call_one_that_says(tmp_path / "x", answer, timeout_s=0.05 if answer is None else 5.0)
