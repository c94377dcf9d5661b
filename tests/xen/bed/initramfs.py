"""Makes an initramfs of what a Debian root has: busybox, kernel modules in the order they load, programs, an init.

Must not contain anything that runs in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.xen.bed.machine import PATH

MOUNT_POINTS = ("bin", "dev", "proc", "sys", "root", "tmp", "mnt", "modules", "etc", "run")


def make(
    archive: Path,
    root: Path,
    version: str,
    *,
    init: Path,
    modules: Sequence[str],
    scripts: Sequence[Path] = (),
    tools: Sequence[str] = (),
) -> None:
    """Write an archive (cpio, newc).

    Args:
        archive: the file to write.
        root: where busybox, modules and tools are taken from.
        version: the kernel's.
        init: what runs first.
        modules: their names; what they need comes along, and /modules/order lists all in order.
        scripts: further ones, which go to /bin.
        tools: paths of programs below `root`; they go to /bin, with the libraries they need.
    """
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place)
        for name in MOUNT_POINTS:
            (tree / name).mkdir()
        shutil.copy(root / "bin/busybox", tree / "bin/busybox")
        shutil.copy(init, tree / "init")
        for script in scripts:
            shutil.copy(script, tree / "bin")
        _add_modules(tree, module_files(root, version, modules))
        _add_tools(tree, root, tools)
        _pack(tree, archive)


def module_files(root: Path, version: str, modules: Iterable[str]) -> list[Path]:
    """Return the files of modules and of what they need, each once, in the order to load them."""
    files: dict[str, None] = {}
    for module in modules:
        listed = _output("modprobe", "-d", str(root), "-S", version, "--show-depends", module)
        files |= dict.fromkeys(re.findall(r"^insmod (\S+)", listed, re.MULTILINE))
    return [Path(file) for file in files if "pclmul" not in file]  # refuses to load on the emulated CPU


def libraries(root: Path, tool: str) -> Iterator[tuple[str, Path]]:
    """Yield the libraries that a program needs, the loader too: the path it looks at, and the file below `root`."""
    paths = re.findall(r"(/\S+) \(0x", _output("chroot", str(root), "ldd", f"/{tool}"))
    # Resolved inside: a symbolic link with an absolute target would lead to the host's own library.
    files = _output("chroot", str(root), "realpath", *paths).splitlines()
    yield from ((path, root / file.lstrip("/")) for path, file in zip(paths, files, strict=True))


def _add_modules(tree: Path, files: Sequence[Path]) -> None:
    for file in files:
        shutil.copy(file, tree / "modules")
    (tree / "modules/order").write_text("".join(f"{file.name}\n" for file in files))


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
