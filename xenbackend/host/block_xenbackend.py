#!/usr/bin/python3 -IS
"""libxl's hotplug script for disks of xenbackend: asks the service to serve one, and tells the toolstack the result.

Must not import anything but the standard library, and of that only the modules that a successful attach needs. It runs
once per disk while a guest is created, for all disks at once, and most of its cost is the start of the interpreter.
`socket` would double that, `json` and `glob` each nearly so; `_socket` is the part of `socket` that is needed.

libxl starts it with `add` once it has seen the backend in InitWait, and with `remove` after Closed; XENBUS_PATH names
the backend's directory. A failure is its exit status, with the sentence in ``hotplug-error``, which libxl prints.
Source: libxl `libxl__get_hotplug_script_info`, docs/misc/block-scripts.txt.
"""

import _socket
import os
import sys

SETTINGS = "/etc/xenbackend.toml"
SOCKET = "/run/xenbackend/control.sock"
OPENED = b'"code": "ok"'  # is in the service's answer where all is well, and as it stands in no sentence
TIMEOUT_S = 37  # libxl kills its scripts after 40 s, without a word
TOOLS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/lib/xen-*/bin")


def main() -> int:
    """Carry out libxl's request, and return the exit status."""
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    path = os.environ.get("XENBUS_PATH", "")
    if action == "remove":
        return 0  # Closed was written when the worker had ended: there is nothing left
    if action != "add" or not path:
        print("block-xenbackend: for a Xen toolstack: add or remove, with XENBUS_PATH set", file=sys.stderr)
        return 2
    try:
        ask(path)
    except Refused as error:
        print(f"block-xenbackend: {error}", file=sys.stderr)
        return 1
    except NoService as error:
        print(f"block-xenbackend: {error}", file=sys.stderr)
        leave_word(path, str(error))
        return 1
    return 0


class Refused(Exception):
    """The service refused, and said so in xenstore too; the text is for the operator."""


class NoService(Exception):
    """The service did not answer; the text is for the operator."""


def ask(path: str) -> None:
    """Ask the service to serve the vbd of a backend directory, and wait. Raises: Refused, NoService.

    A service that is being replaced ends before it answers; the next one takes the request from the same socket.
    """
    if '"' in path or "\\" in path or not path.isprintable():
        raise Refused(f"XENBUS_PATH={path!r} is no path in xenstore")
    request = f'{{"verb": "hotplug", "action": "add", "path": "{path}"}}\n'.encode()
    place = service_socket()
    if not os.path.exists(place):  # noqa: PTH110 - pathlib costs as much as all the rest
        place = SOCKET  # a service that cannot use its settings goes by former ones
    line = talk(place, request) or talk(place, request)
    if not line.endswith(b"\n"):
        raise NoService("the xenbackend service ended before it answered; see its log")
    if OPENED not in line:
        import json  # only where there is something to read

        answer = json.loads(line)
        if "error" in answer:
            raise Refused(str(answer["error"]))


def talk(place: str, request: bytes) -> bytes:
    """Return the service's answer, a line; less if the service ended before. Raises: NoService."""
    near = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        near.settimeout(TIMEOUT_S)
        near.connect(place)
        near.sendall(request)
        line = b""
        while not line.endswith(b"\n") and (piece := near.recv(4096)):
            line += piece
        return line
    except ConnectionResetError:
        return b""
    except TimeoutError:
        raise NoService(f"the xenbackend service did not open the disk within {TIMEOUT_S} s; see its log") from None
    except OSError:
        raise NoService("the xenbackend service does not run; start it with: systemctl start xenbackend") from None
    finally:
        near.close()


def service_socket() -> str:
    """Return the control socket that the settings name."""
    try:
        with open(SETTINGS, "rb") as file:  # noqa: PTH123 - likewise
            text = file.read()
    except OSError:
        return SOCKET
    if not any(line.lstrip(b" \t\"'").startswith(b"socket") for line in text.splitlines()):
        return SOCKET  # as the file that we install has it, where the line is a comment
    import tomllib  # only where there may be something to read

    try:
        return str(tomllib.loads(text.decode()).get("socket", SOCKET))
    except ValueError:
        return SOCKET  # a service goes by its former settings then, if it runs at all


def leave_word(path: str, sentence: str) -> None:
    """Write a failure into the node where the toolstack looks for it, as a running service does."""
    import glob  # only where there is something to tell

    tool = next((found for place in TOOLS for found in glob.glob(f"{place}/xenstore-write")), "")  # noqa: PTH207 - likewise
    if tool:
        words = [tool, f"{path}/hotplug-error", sentence[:1000], f"{path}/hotplug-status", "error"]
        pid = os.posix_spawn(tool, words, dict(os.environ))
        os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
