"""`xenbackend metrics --listen`: serves figures by HTTP.

Must not be part of the service: the HTTP server is another process, which must be allowed to ask for `status`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from xenbackend.cli import metrics_text
from xenbackend.cli.metrics_text import Family
from xenbackend.errors import ConfigError, XenbackendError

Look = Callable[[], list[Family]]

PATIENCE_S = 10.0  # for a client that sends nothing


def serve(address: tuple[str, int], look: Look) -> None:
    """Answer requests for /metrics with what `look` returns until the process ends. Raises: ConfigError."""

    class Handler(_Handler):
        families = staticmethod(look)

    try:
        server = _server(address, Handler)
    except OSError as error:
        raise ConfigError(f"{address[0]}:{address[1]} cannot be listened on: {error.strerror}") from None
    with server:
        print(f"metrics are served at http://{address[0]}:{server.server_port}/metrics", flush=True)
        server.serve_forever()


def _server(address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET

        def handle_error(self, _request: object, client_address: object) -> None:
            """Print one line about a client that went away, or another error over it."""
            print(f"xenbackend: {client_address}: {sys.exception()}", file=sys.stderr)

    return Server(address, handler)


class _Handler(BaseHTTPRequestHandler):
    """One client, which gets the present figures, or, if the service does not answer, the one that says so."""

    timeout = PATIENCE_S
    server_version = "xenbackend"
    sys_version = ""
    families: Look

    def do_GET(self) -> None:
        """Answer a request."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, explain="figures are at /metrics")
            return
        is_openmetrics = "application/openmetrics-text" in self.headers.get("Accept", "")
        try:
            families = self.families()
        except XenbackendError as problem:
            self.log_error("%s", problem)
            families = metrics_text.of_nobody()
        data = metrics_text.text(families, is_openmetrics=is_openmetrics).encode()
        self.send_response(200)
        self.send_header("Content-Type", metrics_text.OPENMETRICS_TYPE if is_openmetrics else metrics_text.CONTENT_TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Do not log successes, which there are several times a minute."""
