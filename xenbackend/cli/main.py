"""The command line: finds the command, calls it, and turns an error into one sentence and an exit status.

Must not contain logic that a test would want to call. Exit statuses are those of `protocol.codes`, with and without a
service; 3 for a `bench` from which nothing can be concluded (`image check` and `compare` have their own); 130 if
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from xenbackend import __version__
from xenbackend.cli.arguments import Parser, UsageError, check_command
from xenbackend.errors import ChainError, ConfigError, XenbackendError, printable, sentence_of

MODULES = {  # by command, in the order of the help
    "run": "run", "config": "config", "status": "status", "top": "top", "latency": "latency", "metrics": "metrics",
    "doctor": "doctor", "report": "report",
    "attach": "attach", "detach": "attach", "check": "check",
    "pause": "disk", "resume": "disk", "set": "disk", "resize": "disk", "snapshot": "disk",
    "policy": "disk", "upgrade": "upgrade",
    "stop": "upgrade", "orders": "orders", "drivers": "drivers", "log": "log", "cow": "cow", "demo": "demo",
    "bench": "bench", "completion": "completion",
    "install": "install", "uninstall": "install", "xl": "xl", "convert": "convert", "image": "image",
}  # fmt: skip


APART = ("image", "convert")  # they wait for storage, which a shell must not have to


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; by default with the arguments of this program."""
    if arguments is None and (ended := _wait_apart(sys.argv[1:2])) is not None:
        return ended
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may not be printable there
    return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(words: list[str]) -> int:
    if words[:1] == ["__complete"]:  # a shell asks: see `completion`
        from xenbackend.cli import completion

        return completion.answer(words[1:], MODULES)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    as_json = "--json" in words and words[0] != "xl"
    try:
        given = _parse(words)
    except UsageError as mistake:
        if as_json:
            from xenbackend.cli import output  # late, as in `_fail`: only errors need it

            output.print_error(ConfigError(mistake.sentence))
        raise
    try:
        _check_python()
        status: int = given.run(given)
        sys.stdout.flush()
    except XenbackendError as problem:
        return _fail(problem, as_json=as_json and given.json)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        _flush_or_forget()
        return 0
    except OSError as problem:  # other refusals of the host: a full disk, a file that cannot be written
        _flush_or_forget()
        return _fail(XenbackendError(sentence_of(problem)), as_json=as_json and given.json)
    return status


def _check_python() -> None:
    """Raise ConfigError for a Python without its global lock (PEP 703): drivers' callbacks were not tried there."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ConfigError(
            "this Python runs without its global lock (free-threaded), which was never tested; use another one"
        )


def _wait_apart(command: Sequence[str]) -> int | None:
    """Run some commands in another process, and return the status; None in that process, and for other commands."""
    if not command or command[0] not in APART:
        return None
    from xenbackend.cli import apart

    return apart.split()


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="xenbackend",
        description="Disks for Xen guests, made of chains of block drivers: log:|aio:/img",
        epilog="Exit status: 0 done; 1 failed; 2 the request was invalid and nothing was changed; 75 an order is still "
        "under way. `xenbackend COMMAND --help` says more.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check_command(words, list(MODULES), parser)
    # Import only the command that is named: importing all takes half a second.
    wanted = {MODULES[words[0]]} if words and words[0] in MODULES else dict.fromkeys(MODULES.values())
    for module in wanted:
        importlib.import_module(f"xenbackend.cli.{module}").register(commands)
    return parser.parse_args(words)


def _flush_or_forget() -> None:
    """Write the rest of our output; if that fails, drop it, so that Python does not try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(problem: XenbackendError, *, as_json: bool) -> int:
    from xenbackend.cli import output
    from xenbackend.protocol.codes import EXIT_STATUS

    text = str(problem) if isinstance(problem, ChainError) else printable(str(problem))
    print(f"xenbackend: {text}", file=sys.stderr)
    if as_json:
        try:
            output.print_error(problem)
            sys.stdout.flush()
        except OSError:
            _flush_or_forget()
    return EXIT_STATUS[output.answer_of(problem).code]
