#!/usr/bin/python3 -IS
"""libxl's hotplug script for disks of xenbackend: asks the service to serve a disk, and tells the toolstack the result.

Must not import anything but the standard library, and at its start only the modules that a successful attach needs. The
script runs once per disk while a guest is created, for all disks at the same time, and the start of the interpreter is
most of its cost. `socket` would double that, `json` and `glob` nearly so; `_socket` is the part of `socket` that is
needed.

libxl starts the script with `add` once it has seen the backend in InitWait, and with `remove` after Closed; XENBUS_PATH
names the backend's directory. After a failure, the exit status is not 0, and ``hotplug-error`` has a sentence that
libxl prints.
Source: libxl `libxl__get_hotplug_script_info`, docs/misc/block-scripts.txt.
"""

import _socket
import os
import sys

SETTINGS = "/etc/xenbackend.toml"
SOCKET = "/run/xenbackend/control.sock"
OPENED = b'"code": "ok"'  # part of every successful answer; no sentence can contain it
TIMEOUT_S = 37  # libxl kills its scripts after 40 s, without a message
TOOLS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/lib/xen-*/bin")


def main() -> int:
    """Carry out libxl's request, and return the exit status."""
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    path = os.environ.get("XENBUS_PATH", "")
    if action == "remove":
        return 0  # the worker had ended before Closed was written: there is nothing left to do
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
    """The service refused, and has written that to xenstore, too; the message is for the operator."""


class NoService(Exception):
    """The service did not answer; the message is for the operator."""


def ask(path: str) -> None:
    """Ask the service to serve the vbd of a backend directory, and wait. Raises: Refused, NoService.

    A service that is being replaced may end before it answers. The request is then sent once more, to the next one.
    """
    if '"' in path or "\\" in path or not path.isprintable():
        raise Refused(f"XENBUS_PATH={path!r} is not a path in xenstore")
    request = f'{{"verb": "hotplug", "action": "add", "path": "{path}"}}\n'.encode()
    place = service_socket()
    if not os.path.exists(place):  # noqa: PTH110 - pathlib costs as much as all the rest
        place = SOCKET  # a service that cannot use its settings uses former ones
    line = talk(place, request) or talk(place, request)
    if not line.endswith(b"\n"):
        raise NoService("the xenbackend service ended before it answered; see its log")
    if OPENED not in line:
        import json  # only if there is an answer to parse

        answer = json.loads(line)
        if "error" in answer:
            raise Refused(str(answer["error"]))


def talk(place: str, request: bytes) -> bytes:
    """Return the service's answer, one line; an incomplete one if the service has ended. Raises: NoService."""
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
        with open(SETTINGS, "rb") as file:  # noqa: PTH123 - as above
            text = file.read()
    except OSError:
        return SOCKET
    if not any(line.lstrip(b" \t\"'").startswith(b"socket") for line in text.splitlines()):
        return SOCKET  # as in the file that we install, where that line is a comment
    import tomllib  # only if the file may have this setting

    try:
        return str(tomllib.loads(text.decode()).get("socket", SOCKET))
    except ValueError:
        return SOCKET  # then a service uses its former settings, if it runs at all


def leave_word(path: str, sentence: str) -> None:
    """Write a failure to the node in which the toolstack looks for it, as a running service does."""
    import glob  # only if there is something to report

    tool = next((found for place in TOOLS for found in glob.glob(f"{place}/xenstore-write")), "")  # noqa: PTH207 - as above
    if tool:
        words = [tool, f"{path}/hotplug-error", sentence[:1000], f"{path}/hotplug-status", "error"]
        pid = os.posix_spawn(tool, words, dict(os.environ))
        os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
