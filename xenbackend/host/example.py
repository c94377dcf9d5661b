"""The example settings file: every setting with its default, commented out, generated from the settings themselves.

Must not contain a default; the settings have them.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from xenbackend.supervisor.service.settings import Settings

_HEAD = """\
# Settings of xenbackend. All are optional: a line that begins with # shows a default.
# They are read when the service starts: systemctl restart xenbackend (guests do not notice).
"""
_ABOUT = {
    "store": "Xenstore's socket or device; empty: found as xenstore's own tools do.",
    "host": "The Python module that grants and event channels come from.",
    "socket": "The control socket, for: xenbackend status.",
    "group": "Its members may use commands that change nothing, such as `xenbackend status`; empty: only root may.",
    "serve": 'Which vbds are served: "ours" are those whose script is named in `scripts`, "all" are all of them.',
    "scripts": "Hotplug scripts that are ours, by the last part of their path.",
    "kinds": "Kinds of backend to look for, as xenstore's directories are named.",
    "poll_us": "How many microseconds a worker looks for the next request before it sleeps, up to 1000; 0 is never.",
    "on_error": "What happens to requests that the disk cannot do, see: xenbackend policy --help.",
    "walls": 'Whether workers first give up all rights: "on", "off", or "require": serve no disk without all walls.',
    "log": 'How the log is written: "console", "journal" or "json". The systemd unit overrides it by "journal".',
    "log_level": 'The lowest level that is logged: "debug", "info", "warning" or "error".',
    "parents": "Directories below which an image's parent may be, for each image; else see: xenbackend image trust.",
    "scratch": "The directory for the unnamed files of cow:, which hold what guests write to throw-away disks.",
    "limits": "The most that is offered to a guest.",
    "limits.max_queues": "Rings of a vbd, from 1 to 8.",
    "limits.max_ring_order": "A ring's pages as a power of two, from 0 (one page) to 4 (sixteen).",
    "limits.max_segments": "Pages of one request, from 11 to 256.",
}


def example() -> str:
    """Return the text of the file. Removing the ``#`` before each setting does not change its meaning."""
    defaults = Settings()
    blocks = [_HEAD]
    blocks += [_setting(each.name, getattr(defaults, each.name)) for each in fields(Settings) if each.name != "limits"]
    blocks.append(f"# {_ABOUT['limits']}\n[limits]\n")
    for each in fields(defaults.limits):
        blocks.append(_setting(each.name, getattr(defaults.limits, each.name), table="limits."))
    return "\n".join(blocks)


def _setting(name: str, default: Any, table: str = "") -> str:
    return f"# {_ABOUT[table + name]}\n#{name} = {json.dumps(default)}\n"  # such JSON values are valid TOML
