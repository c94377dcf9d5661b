"""The host's xl and Xen, searched in real directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.xl.host import EVERY_XEN, find_xl, parse_version, running_xen
from xenbackend.xl.shim import shim_text


def put_xl(folder: Path, text: str = "#!/bin/sh\n", mode: int = 0o755) -> Path:
    """Put an xl into a folder."""
    folder.mkdir(parents=True)
    (folder / "xl").write_text(text)
    (folder / "xl").chmod(mode)
    return folder / "xl"


def test_the_running_xen_is_read_from_sysfs(tmp_path: Path) -> None:
    """The version is the hypervisor's; without a readable one, the oldest for which we write lines."""
    assert running_xen(tmp_path) == EVERY_XEN
    (tmp_path / "sys/hypervisor/version").mkdir(parents=True)
    for part, text in (("major", "4\n"), ("minor", "20\n")):
        assert running_xen(tmp_path) == EVERY_XEN
        (tmp_path / "sys/hypervisor/version" / part).write_text(text)

    assert running_xen(tmp_path) == (4, 20)


@pytest.mark.parametrize(("text", "version"), [("4.19", (4, 19)), ("4.20.1", (4, 20)), ("10.0", (10, 0))])
def test_versions(text: str, version: tuple[int, int]) -> None:
    """A version is its first two numbers, compared as numbers."""
    assert version == parse_version(text)


@pytest.mark.parametrize("text", ["", "4", "4.x", "-4.19", "xen-4.19", "4.19-rc1", "4.19\n"])
def test_what_is_no_version(text: str) -> None:
    """Anything else is not a version."""
    with pytest.raises(ConfigError, match="not a version of Xen"):
        parse_version(text)


def test_the_first_on_path_is_xl_but_never_the_shim(tmp_path: Path) -> None:
    """PATH decides, as in a shell, except for the shim, directories, non-executable files and the working directory."""
    put_xl(tmp_path / "shim", shim_text("/usr/sbin/xl", "/usr/bin/xenbackend"))
    put_xl(tmp_path / "data", mode=0o644)
    (tmp_path / "folder/xl").mkdir(parents=True)
    real = put_xl(tmp_path / "real")
    put_xl(tmp_path / "usr/sbin")
    path = ":".join(["", ".", *(str(tmp_path / name) for name in ("shim", "data", "folder", "real"))])

    assert real == find_xl(path, (4, 17), tmp_path)


def test_without_path_it_is_where_distributions_put_it(tmp_path: Path) -> None:
    """If xl is not on PATH, it is in /usr/sbin, else with the tools of the running Xen, else with any Xen's."""
    other = put_xl(tmp_path / "usr/lib/xen-4.20/bin")
    assert other == find_xl("", (4, 17), tmp_path)
    running = put_xl(tmp_path / "usr/lib/xen-4.17/bin")
    assert running == find_xl("", (4, 17), tmp_path)
    wrapper = put_xl(tmp_path / "usr/sbin")
    assert wrapper == find_xl("", (4, 17), tmp_path)


def test_no_xl_is_a_sentence(tmp_path: Path) -> None:
    """Without xl the error says where it was looked for."""
    put_xl(tmp_path / "usr/sbin", shim_text("/usr/sbin/xl", "/usr/bin/xenbackend"))
    with pytest.raises(XenbackendError, match="there is no xl: not on PATH, in /usr/sbin"):
        find_xl(str(tmp_path / "usr/sbin"), (4, 17), tmp_path)
