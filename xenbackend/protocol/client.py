"""Asks a running service: one request, one answer over its control socket.

Must not print.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from xenbackend.errors import XenbackendError

DEFAULT_SOCKET = "/run/xenbackend/control.sock"
TIMEOUT_S = 10.0


def call(path: str, request: dict[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Send a request such as ``{"verb": "ping"}`` and return the answer, which holds ``data``.

    Raises: XenbackendError, with the service's own sentence or one that says why it did not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as near:
        near.settimeout(timeout_s)
        try:
            near.connect(path)
            near.sendall(json.dumps(request).encode() + b"\n")
            with near.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError:
            raise XenbackendError(f"the service at {path} did not answer within {timeout_s:g} s") from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise XenbackendError(
                f"no service answers at {path}; start it with: systemctl start xenbackend (or: xenbackend run)"
            ) from None
        except OSError as error:
            raise XenbackendError(f"the service at {path} cannot be asked: {error.strerror or error}") from None
    if not line.endswith(b"\n"):
        raise XenbackendError(f"the service at {path} closed the connection; only root and its own user may ask it")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise XenbackendError(str(answer["error"]))
    return answer
