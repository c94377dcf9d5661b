#!/usr/bin/python3 -IS
"""libxl's hotplug script for disks of xenbackend: asks the service to serve one, and tells the toolstack how it went.

Must not import anything but the standard library, and little of that: it runs once per disk while a guest is created.

libxl starts it with `add` once it has seen the backend in InitWait, and with `remove` after Closed; XENBUS_PATH names
the backend's directory. A failure is its exit status, with the sentence in ``hotplug-error``, which libxl prints.
Source: libxl `libxl__get_hotplug_script_info`, docs/misc/block-scripts.txt.
"""

import glob
import json
import os
import socket
import sys

SETTINGS = "/etc/xenbackend.toml"
SOCKET = "/run/xenbackend/control.sock"
TIMEOUT_S = 37  # libxl kills its scripts after 40 s, without a word
TOOLS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/lib/xen-*/bin")


def main() -> int:
    """Do what libxl asks for, and return the exit status."""
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    path = os.environ.get("XENBUS_PATH", "")
    if action == "remove":
        return 0  # Closed was written when the worker had ended: there is nothing left
    if action != "add" or not path:
        print("block-xenbackend: for a Xen toolstack: add or remove, with XENBUS_PATH set", file=sys.stderr)
        return 2
    try:
        ask({"verb": "hotplug", "action": "add", "path": path})
    except Refused as error:
        print(f"block-xenbackend: {error}", file=sys.stderr)
        return 1
    except NoService as error:
        print(f"block-xenbackend: {error}", file=sys.stderr)
        leave_word(path, str(error))
        return 1
    return 0


class Refused(Exception):
    """The service has said no, in xenstore too; the text is for the operator."""


class NoService(Exception):
    """The service has said nothing; the text is for the operator."""


def ask(request: dict[str, str]) -> None:
    """Send a request to the service and wait for its answer. Raises: Refused, NoService.

    A service that is just being replaced ends before it answers; the next one takes the request from the same socket.
    """
    path = service_socket()
    line = talk(path, request) or talk(path, request)
    if not line.endswith(b"\n"):
        raise NoService("the xenbackend service ended before it answered; see its log")
    answer = json.loads(line)
    if "error" in answer:
        raise Refused(str(answer["error"]))


def talk(path: str, request: dict[str, str]) -> bytes:
    """Return the service's answer, a line; nothing where it ended before. Raises: NoService."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as near:
        near.settimeout(TIMEOUT_S)
        try:
            near.connect(path)
            near.sendall(json.dumps(request).encode() + b"\n")
            return near.makefile("rb").readline()
        except ConnectionResetError:
            return b""
        except TimeoutError:
            raise NoService(f"the xenbackend service did not open the disk within {TIMEOUT_S} s; see its log") from None
        except OSError:
            raise NoService("the xenbackend service does not run; start it with: systemctl start xenbackend") from None


def service_socket() -> str:
    """Return the control socket that the settings name."""
    try:
        with open(SETTINGS, "rb") as file:  # noqa: PTH123 - pathlib costs as much as all the rest
            text = file.read()
    except OSError:
        return SOCKET
    if b"socket" not in text:
        return SOCKET
    import tomllib  # only where there may be something to read

    try:
        return str(tomllib.loads(text.decode()).get("socket", SOCKET))
    except ValueError:
        return SOCKET  # the service refuses such a file with a sentence


def leave_word(path: str, sentence: str) -> None:
    """Write a failure where the toolstack looks for it, as the service does when it runs."""
    tool = next((found for place in TOOLS for found in glob.glob(f"{place}/xenstore-write")), "")  # noqa: PTH207 - likewise
    if tool:
        words = [tool, f"{path}/hotplug-error", sentence[:1000], f"{path}/hotplug-status", "error"]
        pid = os.posix_spawn(tool, words, dict(os.environ))
        os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
