"""Makes an initramfs from a Debian root: busybox, kernel modules in the order in which they load, programs, an init.

Must not contain the scripts that run in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.xen.bed.machine import PATH

MOUNT_POINTS = ("bin", "dev", "proc", "sys", "root", "tmp", "mnt", "modules", "etc", "run")


@dataclass(frozen=True, slots=True)
class Source:
    """A Debian root.

    Attributes:
        root: where busybox, modules and tools are taken from.
        version: the kernel's.
        decompress: turns a module's file into one that insmod takes.
    """

    root: Path
    version: str
    decompress: Callable[[bytes], bytes]


def make(
    archive: Path,
    source: Source,
    *,
    init: Path,
    modules: Sequence[str],
    scripts: Sequence[Path] = (),
    tools: Sequence[str] = (),
) -> None:
    """Write an archive (cpio, newc).

    Args:
        archive: the file to write.
        source: the Debian root.
        init: the script that runs first.
        modules: their names; those that they depend on are added, and /modules/order lists all in order.
        scripts: further scripts, which go to /bin.
        tools: paths of programs below `root`; they go to /bin, with the libraries they need.
    """
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place)
        for name in MOUNT_POINTS:
            (tree / name).mkdir()
        shutil.copy(source.root / "bin/busybox", tree / "bin/busybox")
        shutil.copy(init, tree / "init")
        for script in scripts:
            shutil.copy(script, tree / "bin")
        _add_modules(tree, module_files(source, modules), source.decompress)
        _add_tools(tree, source.root, tools)
        _pack(tree, archive)


def module_files(source: Source, modules: Iterable[str]) -> list[Path]:
    """Return the files of modules and of what they need, each once, in the order to load them."""
    files: dict[str, None] = {}
    for module in modules:
        listed = _output("modprobe", "-d", str(source.root), "-S", source.version, "--show-depends", module)
        files |= dict.fromkeys(re.findall(r"^insmod (\S+)", listed, re.MULTILINE))
    return [Path(file) for file in files if "pclmul" not in file]  # refuses to load on the emulated CPU


def libraries(root: Path, tool: str) -> Iterator[tuple[str, Path]]:
    """Yield the libraries that a program needs, and the loader: the path that it uses, and the file below `root`."""
    paths = re.findall(r"(/\S+) \(0x", _output("chroot", str(root), "ldd", f"/{tool}"))
    # Resolved inside: a symbolic link with an absolute target would lead to the host's own library.
    files = _output("chroot", str(root), "realpath", *paths).splitlines()
    yield from ((path, root / file.lstrip("/")) for path, file in zip(paths, files, strict=True))


def _add_modules(tree: Path, files: Sequence[Path], decompress: Callable[[bytes], bytes]) -> None:
    for file in files:
        (tree / "modules" / _module(file)).write_bytes(decompress(file.read_bytes()))
    (tree / "modules/order").write_text("".join(f"{_module(file)}\n" for file in files))


def _module(file: Path) -> str:
    """Return the name of a module's file without compression."""
    return f"{file.name.partition('.')[0]}.ko"


def _add_tools(tree: Path, root: Path, tools: Sequence[str]) -> None:
    for tool in tools:
        shutil.copy(root / tool, tree / "bin")
        for path, file in libraries(root, tool):
            place = tree / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def _pack(tree: Path, archive: Path) -> None:
    names = "".join(f"{each.relative_to(tree)}\n" for each in sorted(tree.rglob("*")))
    with archive.open("wb") as file:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"], cwd=tree, input=names.encode(), stdout=file, check=True
        )


def _output(*command: str) -> str:
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
