"""The rules of imports: the layers of the code, and the few places for modules that are dangerous or expensive."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.sources import FILES, PACKAGE, in_one_process, nodes_of

ROOT = PACKAGE
pytestmark = in_one_process

# Bottom up. What a part may import of ours besides itself, as dotted beginnings: "block" is all of block/.
GROUND = {"units", "errors", "disks", "log", "counters", "budget", "note", "settings_file"}
STRANGERS = {
    "kernel",
    "blkif",
    "ceph",
    "nbd",
    "block",
    "protocol",
    "journal",
    "loop",
}  # which do not know each other
LAYERS = {
    "units": set(),
    "errors": set(),
    "disks": {"errors"},
    "counters": set(),
    "budget": set(),
    "note": set(),
    "settings_file": {"errors"},
    "log": {"errors", "units"},
    **{part: GROUND - {"log"} for part in STRANGERS},
    "block": GROUND - {"log"} | {"ceph", "loop.steps", "nbd"},
    "ceph": GROUND - {"log"} | {"kernel.memory"},
    "client": GROUND - {"log"} | {"protocol"},
    "walls": GROUND - {"log"} | {"kernel"},
    "opener": GROUND - {"log"} | {"kernel", "block", "protocol"},
    "worker": GROUND - {"log"} | STRANGERS - {"ceph"} | {"opener", "walls"},  # a worker logs by messages
    "supervisor": GROUND
    | {"protocol", "journal", "loop", "blkif.features", "blkif.handshake", "block"}
    | {"kernel.blkback", "kernel.identity", "kernel.memfd", "kernel.ports", "kernel.process", "walls.raising"},
    "rig": GROUND | {"kernel.ports", "kernel.fence", "kernel.fixed", "kernel.memory", "blkif"},
    "bench": GROUND | {"rig", "protocol", "kernel", "journal", "blkif", "block.formats.table"},
    "embedded": GROUND | {"rig", "supervisor", "protocol", "blkif"},
    "host": GROUND | {"protocol.client", "supervisor.service.settings", "xl.shim"},
    "xl": GROUND - {"log"} | {"block"},
    "doctor": GROUND
    | {"protocol", "block", "blkif.handshake", "host", "opener.cluster"}
    | {"kernel.locks", "kernel.process", "kernel.users"}
    | {"supervisor.service.settings", "supervisor.vbd.reasons", "supervisor.vbd.spec", "supervisor.xenstore"},
    # commands on images: the drivers, and from the worker what opens files and waits for them
    "image": GROUND - {"log"} | {"block", "kernel.inuse", "opener", "worker.env", "worker.files", "loop"},
    "cli": {""},
    "__main__": {"cli.main"},
    "__init__": set(),
}

# The only places where a module may be imported: "block/recorder" is one file, "kernel/" a whole package.
HOMES = {
    "compression": ("block/formats/zstd",),  # of Python 3.14
    "asyncio": (),  # 3 us for each task and request, where a layer costs 30 ns
    "multiprocessing": (),  # threads, grants and locks do not survive a fork
    "argon2": ("opener/deriving",),  # up to 4 GiB and minutes: no worker, no service
    "datetime": ("cli/log", "cli/report", "units"),  # times for people: `units.format_time`
    "ctypes": ("bench/blkif_native", "block/luks/cipher", "block/remote/tls", "ceph/", "kernel/"),
    "fcntl": ("kernel/", "rig/", "supervisor/service/listening", "walls/calls"),
    "importlib": (
        "block/drivers/__init__",
        "block/formats/table",
        "cli/complete",
        "cli/image",
        "cli/main",
        "doctor/pieces",
        "kernel/ports",
    ),  # imports of modules that a text names: drivers, formats, commands, hosts
    "matplotlib": ("bench/plot", "cli/latency_plot"),
    "mmap": (
        "block/mapped/parts",
        "kernel/",
        "rig/",
        "bench/",
        "worker/image",
    ),
    "pyxs": ("supervisor/xenstore/store",),
    "rich": ("bench/report", "cli/"),
    "select": (
        "bench/",
        "block/remote/deadline",
        "cli/top_terminal",
        "doctor/probes",
        "embedded/",
        "rig/",
        "supervisor/service/fleet",
        "supervisor/service/opener",
        "supervisor/service/zygote",
        "supervisor/xenstore/store",
        "supervisor/xenstore/toolstack",
        "worker/export_client",
        "loop/reactor",
    ),
    "selectors": ("rig/store",),
    "signal": (
        "bench/calls",
        "bench/native",
        "cli/",
        "doctor/probes",
        "embedded/machine",
        "kernel/process",
        "loop/signals",
        "rig/",
        "supervisor/",
    ),
    "structlog": ("log",),
    "daemon": ("supervisor/service/detached",),
    "zstandard": ("block/formats/zstd",),
    "subprocess": (
        "bench/",
        "doctor/pieces",
        "embedded/",
        "host/activate",
        "host/program",
        "supervisor/service/process",
    ),
    "threading": (
        "block/recorder",
        "ceph/",
        "cli/demo",
        "kernel/fence",
        "rig/",
        "loop/threads",
        "opener/watch",
        "worker/extent",
    ),
    # attributes
    # XENBACKEND_SOCKET, of clients
    # XENSTORED_PATH, as libxenstore has it; XENBUS_PATH, as libxl gives it to its scripts; TMPDIR, for a compiler;
    # CREDENTIALS_DIRECTORY, as systemd gives it to the service
    "os.environ": (
        "bench/native",
        "cli/",
        "embedded/machine",
        "host/block_xenbackend",
        "opener/deriving",
        "protocol/client",
        "supervisor/service/process",
        "supervisor/xenstore/store",
        "walls/raising",
    ),
    "os.getenv": (),
    "os.fork": ("cli/apart", "doctor/probes", "kernel/namespaces", "worker/zygote"),
    "os.system": (),
    "sys.argv": (
        "cli/",
        "host/block_xenbackend",
        "opener/main",
        "rig/store",
        "rig/xen",
        "worker/main",
        "worker/zygote",
    ),  # processes of their own
    # the chain and the store take it as an argument; a file and the control socket wait for their lock before anything
    # is served, and a service that may serve nothing before it ends
    "time.sleep": (
        "bench/",
        "block/chain",
        "cli/",
        "client/following",
        "embedded/",
        "opener/connecting",
        "rig/",
        "supervisor/service/listening",
        "supervisor/service/main",
        "supervisor/xenstore/store",
        "worker/files",
    ),
}
THIRD_PARTY = {"argon2", "daemon", "matplotlib", "pyxs", "rich", "structlog", "zstandard"}
NEWER = {"compression"}  # modules of the standard library that older Pythons lack
DEAR = (
    "argon2",
    "structlog",
    "rich",
    "pyxs",
    "daemon",
    "asyncio",
    "multiprocessing",
    "subprocess",
    "logging",
    "zstandard",
)


def part_of(file: Path) -> str:
    """Return the first part of a file's dotted name below the package."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def place_of(file: Path) -> str:
    """Return a file's place as `HOMES` writes it."""
    return file.relative_to(ROOT).with_suffix("").as_posix()


def is_module(dotted: str) -> bool:
    """Return whether a dotted name below the package is a module, not something in one."""
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the dotted name of each module that a file with these nodes imports, wherever in it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole.removeprefix("xenbackend.")) else node.module


@cache
def imports_of(file: Path) -> list[str]:
    """Return what a file imports."""
    return list(imports(nodes_of(file)))


def uses(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield `module.name` for each attribute of a plain name, and for each name that is imported from a module."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def begins(dotted: str, beginnings: set[str]) -> bool:
    """Return whether a dotted name is one of `beginnings` or below it."""
    return any(not each or dotted == each or dotted.startswith(each + ".") for each in beginnings)


def layer_faults(file: Path, imported: Iterable[str]) -> list[str]:
    """Return a sentence for each import of a part that this file's part may not import."""
    part = part_of(file)
    ours = [name.partition(".")[2] for name in imported if name.split(".")[0] == "xenbackend"]
    foreign = [name for name in ours if name and name.split(".")[0] != part]
    return [f"{place_of(file)} imports {name}" for name in foreign if not begins(name, LAYERS[part])]


def home_faults(file: Path, imported: Iterable[str], used: Iterable[str]) -> list[str]:
    """Return a sentence for each use of something outside its home."""
    place = place_of(file)
    used = {name.split(".")[0] for name in imported} | set(used)
    return [
        f"{place} uses {name}"
        for name in sorted(used & HOMES.keys())
        if not any(place == home or (home.endswith("/") and place.startswith(home)) for home in HOMES[name])
    ]


def test_every_part_has_a_layer() -> None:
    """Each package and module of ours is in the table, and the table has no other."""
    assert set(LAYERS) == {part_of(file) for file in FILES}


def documented_layers() -> dict[str, set[str]]:
    """Return ARCHITECTURE.md's table of rooms in the form of `LAYERS`; "ground" is short for the lowest rooms."""
    text = (ROOT.parent / "ARCHITECTURE.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    phrases = {"ground": GROUND - {"log"}, "everything": {""}, "nothing": set()}
    found = {}
    for rooms, uses in re.findall(r"^\| (`.*`) \| [^|]* \| (.*) \|$", text, re.MULTILINE):
        names = re.findall(r"`(.*?)`", uses)
        words = re.findall(r"\w+", re.sub(r"`.*?`", "", uses))
        allowed = set(names).union(*(phrases[word] for word in words))
        found.update({room.rstrip("/"): allowed for room in re.findall(r"`(.*?)`", rooms)})
    return found


def test_the_rooms_are_documented() -> None:
    """ARCHITECTURE.md has the same table: each room, and exactly what it may use."""
    assert documented_layers() == LAYERS


@pytest.mark.parametrize("part", sorted(LAYERS))
def test_nothing_is_allowed_in_vain(part: str) -> None:
    """A room uses everything that the table allows it beyond the ground."""
    files = [file for file in FILES if part_of(file) == part]
    used = {name.partition(".")[2] for file in files for name in imports_of(file) if name.startswith("xenbackend.")}

    assert [] == [each for each in sorted(LAYERS[part] - GROUND) if not any(begins(name, {each}) for name in used)]


def test_strangers_know_the_ground_only() -> None:
    """The rooms that a worker combines do not import each other, except that `block` imports `ceph` and `nbd`."""
    for part in STRANGERS:
        assert LAYERS[part] & STRANGERS <= ({"ceph", "nbd"} if part == "block" else set())  # drivers are clients


def test_layers() -> None:
    """A file imports only what its layer may."""
    assert [] == [fault for file in FILES for fault in layer_faults(file, imports_of(file))]


def test_homes() -> None:
    """Dangerous and expensive modules are imported only in their homes."""
    assert [] == [fault for file in FILES for fault in home_faults(file, imports_of(file), uses(nodes_of(file)))]


@pytest.mark.rows("C12")
def test_no_other_dependency() -> None:
    """Only the standard library and the packages of pyproject.toml are imported."""
    allowed = sys.stdlib_module_names | NEWER | THIRD_PARTY | {"xenbackend"}
    names = {(place_of(file), name) for file in FILES for name in imports_of(file)}

    assert [] == sorted(f"{place} imports {name}" for place, name in names if name.split(".")[0] not in allowed)


def test_homes_are_lived_in() -> None:
    """Every home in the table exists, so a file that moves takes its line along."""
    for homes in HOMES.values():
        for home in homes:
            assert (ROOT / home).is_dir() if home.endswith("/") else (ROOT / home).with_suffix(".py").exists(), home


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("block/chain", "from xenbackend.blkif import abi"),
        ("block/chain", "def late():\n    import xenbackend.kernel.gntdev"),
        ("blkif/ring", "from xenbackend import worker"),
        ("units", "from xenbackend.errors import ConfigError"),
        ("supervisor/vbd/vbd", "from xenbackend.blkif.ring import BackRing"),
        ("worker/engine", "from xenbackend.log import get_logger"),
        ("rig/xen", "from xenbackend.supervisor.xenstore.store import Store"),
    ],
)
def test_a_wrong_import_is_seen(place: str, text: str) -> None:
    """Every kind of forbidden import is found, even inside a function."""
    assert 1 == len(layer_faults((ROOT / place).with_suffix(".py"), imports(ast.walk(ast.parse(text)))))


@pytest.mark.parametrize(
    "text",
    [
        "import ctypes",
        "from multiprocessing import shared_memory",
        "import os\nwhere = os.environ['HOME']",
        "from os import environ",
        "from time import sleep",
        "import concurrent.futures, asyncio.events",
        "def late():\n    import structlog.types",
    ],
)
def test_a_guest_in_a_wrong_home_is_seen(text: str) -> None:
    """Every way to use something outside its home is found."""
    nodes = list(ast.walk(ast.parse(text)))

    assert 1 == len(home_faults(ROOT / "block" / "dirty.py", imports(nodes), uses(nodes)))


@pytest.mark.slow
def test_a_worker_stays_small() -> None:
    """No worker imports an expensive module: neither by its own modules, nor a driver's, nor either host's."""
    modules = ["xenbackend.worker.zygote", "xenbackend.kernel.xen", "xenbackend.rig.host"]
    modules += [f"xenbackend.block.drivers.{file.stem}" for file in (ROOT / "block/drivers").glob("[!_]*.py")]
    program = f"import sys, json, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)

    assert {"xenbackend.worker.engine", "xenbackend.worker.io_queue"} <= set(loaded)  # none is left for a worker
    assert [] == [name for name in DEAR if name in loaded]
