"""Tests of `xenbackend.opener.cluster`: ceph.conf and keyrings as Ceph reads them, and what the worker gets."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from xenbackend.block.servers import Account
from xenbackend.errors import DriverError
from xenbackend.opener import cluster
from xenbackend.opener.cluster import boot_id, parse, read_settings, resolve_monitors

# The text of each file, and client.x's `mon_host` in it; None if the file is refused.
FILES = {
    "[global]\nmon_host = 1.2.3.4\n": "1.2.3.4",
    "[global]\nmon host=a\nmon_host = b\n": "b",
    "[global]\n mon   host  =  a b  \n": "a b",
    "[client.x]\nmon host = x\n[client]\nmon host = c\n[global]\nmon host = g\n": "x",
    "[client]\nmon host = c\n[global]\nmon host = g\n[client.y]\nmon host = y\n": "c",
    "[client.x]\nmon host = 1\n[client.x]\nmon host = 2\n": "2",
    "# a\n; b\n\n[global] # c\nmon host = a # d\n": "a",
    "[global]\nmon host = a;b\n": "a",
    "[global]\nmon host = a\\;b\\#c \\\\ d\n": "a;b#c \\ d",
    "[global]\nmon host = a, \\\n b\n": "a,  b",
    "[global]\nmon host = a\\\n\\\nb\n": "ab",
    "[global]\n# a\\\nmon host = b\n": "b",
    '[global]\nmon host = "a b"  # c\n': "a b",
    "[global]\nmon host = 'a\"b'\n": 'a"b',
    '[global]\nmon host = "a\\"b"\n': 'a"b',
    '[global]\nmon host = a"b"c\n': 'a"b"c',
    "[global]\nmon host = a=b\n": "a=b",
    "[global]\nmon host = [v2:1.2.3.4:3300/0,v1:1.2.3.4:6789/0]\n": "[v2:1.2.3.4:3300/0,v1:1.2.3.4:6789/0]",
    "[global]\r\nmon host = a\r\n": "a",
    "[ global ]\nmon host = a\n": "",
    "[GLOBAL]\nmon host = a\n": "",
    "[global]\nmon host =\n": "",
    "": "",
    '[global]\nmon host = "a" b\n': None,
    '[global]\nmon host = "a\n': None,
    '[global]\nmon host = "a;b"\n': None,
    "[global]\nmon host\n": None,
    "[]\nmon host = a\n": None,
    "[global]\n= a\n": None,
    "[global]mon host = a\n": None,
}


def found(text: str) -> str | None:
    """Return client.x's `mon_host` in a file, or None if the file is refused."""
    try:
        sections = parse(text)
    except ValueError:
        return None
    known: dict[str, str] = {}
    for section in ("global", "client", "client.x"):
        known |= sections.get(section, {})
    return known.get("mon_host", "")


@pytest.mark.parametrize("text", FILES)
def test_files_are_understood(text: str) -> None:
    """A file is read by Ceph's grammar, and refused if it does not follow it."""
    assert FILES[text] == found(text)


@pytest.mark.skipif(not shutil.which("ceph-conf"), reason="there is no ceph-conf here")
@pytest.mark.parametrize("text", FILES)
def test_ceph_understands_them_likewise(text: str, tmp_path: Path) -> None:
    """`ceph-conf` reads each of these files in the same way."""
    (tmp_path / "ceph.conf").write_bytes(text.encode())
    command = ["ceph-conf", "-c", "ceph.conf", "--name", "client.x", "--lookup", "mon_host"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    theirs = None if "error reading config file" in done.stderr else done.stdout.removesuffix("\n")
    assert FILES[text] == theirs


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Return a configuration with a keyring."""
    (tmp_path / "site.client.x.keyring").write_text('[client.x]\n\tkey = SECRET==\n\tcaps mon = "profile rbd"\n')
    path = tmp_path / "site.conf"
    path.write_text(
        f"[global]\nfsid = 7\nmon host = 10.0.0.1\nlog file = /var/log/x\nkeyring = {tmp_path}/none,"
        f"{tmp_path}/$cluster.$name.keyring\nms type = async\ncrush location hook = /bin/evil\nrbd cache = true\n"
    )
    return path


def test_what_is_handed_over(conf: Path) -> None:
    """The worker gets the settings that concern the cluster, with the key of the first keyring that exists, and none
    that name files or programs.
    """
    expected = {"fsid": "7", "mon_host": "10.0.0.1", "ms_type": "async", "rbd_cache": "true", "key": "SECRET=="}
    assert expected == read_settings(Account(str(conf), "x"))


def test_keys_from_elsewhere(conf: Path, tmp_path: Path) -> None:
    """The key may also be in the configuration, or alone in a file; without authentication there need be none."""
    text = conf.read_text()
    (tmp_path / "key").write_text("ALONE==\n")
    for more, key in ((f"keyfile = {tmp_path}/key\n", "ALONE=="), ("key = HERE==\n", "HERE==")):
        conf.write_text(text + more)
        assert key == read_settings(Account(str(conf), "x"))["key"]
    conf.write_text("[global]\nmon host = 10.0.0.1\nauth client required = none\nkeyring = /nonesuch\n")
    assert "key" not in read_settings(Account(str(conf), "x"))


def test_the_first_keyring_that_is_there_counts(conf: Path, tmp_path: Path) -> None:
    """As in librados, only the first keyring that exists is read: a key in a later one is not found."""
    (tmp_path / "none").write_text("[client.other]\nkey = OTHER==\n")
    with pytest.raises(DriverError, match=r"no key for client\.x"):
        read_settings(Account(str(conf), "x"))


def test_what_is_wrong_is_a_sentence(conf: Path, tmp_path: Path) -> None:
    """A missing key or monitor, an invalid line, a directory, and too large a file are refused with a sentence that
    names the file.
    """
    other = tmp_path / "other.conf"
    big = b"#" * (cluster.MAX_FILE + 1)
    for data, match, code in (
        (conf.read_bytes(), "no key for client.y in .*/other.client.y.keyring", errno.EACCES),
        (b"[global]\n", "names no monitor", errno.ENODATA),
        (b"[client]\nkey = k\nmon host = 1.1.1.1\nrbd x = " + 70000 * b"x" + b"\n", "more settings than", errno.EINVAL),
        (
            b"[client]\nkey = k\nmon host = 1.1.1.1\n" + b"".join(b"rbd_%d = 1\n" % n for n in range(1001)),
            "more set",
            22,
        ),
        (b"[global]\nx\n", r"other\.conf cannot be parsed: line 2", errno.EINVAL),
        (big, "more than", errno.EINVAL),
    ):
        other.write_bytes(data)
        with pytest.raises(DriverError, match=match) as caught:
            read_settings(Account(str(other), "y"))
        assert code == caught.value.errno
    with pytest.raises(FileNotFoundError):
        read_settings(Account(str(tmp_path / "nonesuch"), "x"))
    with pytest.raises(IsADirectoryError):
        read_settings(Account(str(tmp_path), "x"))


def test_names_of_monitors_are_resolved() -> None:
    """Addresses of monitors are kept as they are; a name is replaced by its addresses, or refused."""
    for text in ("10.0.0.1,10.0.0.2:6789", "[v2:10.0.0.1:3300/0,v1:10.0.0.1:6789/0] [::1]:6789", "v2:10.0.0.1:3300/0"):
        assert text == resolve_monitors(text)
    assert {"127.0.0.1:6789", "[::1]:6789"} & set(resolve_monitors("localhost:6789").split(","))
    with pytest.raises(DriverError, match=r"nonesuch\.invalid cannot be found"):
        resolve_monitors("10.0.0.1,nonesuch.invalid")


def test_a_host_is_told_from_any_other() -> None:
    """The id of this host's boot is a UUID, the same each time."""
    assert boot_id() == boot_id()
    assert 36 == len(boot_id())
