"""R18: whatever an image names as its parent or its data, only what is allowed is opened. An audit hook watches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.foreign_images import MIB, descriptor, vdi, vhdx, vmdk
from tests.qcow_images import qcow, qcow2
from tests.vhd_images import UUID, image

SIZE = 4 * MIB
ROOT = Path(__file__).parent.parent.parent
NAMES = [
    "{secret}", "../secret/canary", "./../images/../secret/canary", "sub/../../secret/canary", "link",
    "link-dir/canary", "//{secret}", "/proc/self/fd/{fd}", "/dev/fd/{fd}", "/dev/stdin", "/proc/self/root{secret}",
    "/proc/self/cwd/{secret}", "/dev/zero", "/dev/null", "/dev/mem", "/etc/passwd", "nbd://127.0.0.1:10809/x",
    "nbd:unix:{secret}", "file:{secret}", "file://{secret}", "http://127.0.0.1/x", "fat:rw:{directory}", "json:{{}}",
    'json:{{"driver":"file","filename":"{secret}"}}', "fd:{fd}", "|aio:{secret}", "base|aio:{secret}",
    "x,file={secret}", "\\\\?\\C:\\secret", "..\\secret\\canary", "%2e%2e/secret/canary", "a" * 1000, ".", "", "\n",
]  # fmt: skip
LOCATORS: dict[bytes, Callable[[str], bytes]] = {
    b"W2ru": lambda name: name.encode("utf-16-le"),
    b"W2ku": lambda name: name.encode("utf-16-le"),
    b"MacX": lambda name: b"file://" + name.encode(),
    b"Mac ": lambda name: name.encode(),
    b"Wi2r": lambda name: name.encode(),
    b"Wi2k": lambda name: name.encode(),
}


def images_of(name: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield images that name `name` as their parent or data in every way that a format has: driver, options, bytes."""
    raw = name.encode()
    for kind in ("raw", "qcow", "qcow2", "vpc", "vmdk", "vhdx", "vdi"):
        yield "qcow2", f",parent_format={kind}", qcow2(SIZE, backing=raw)
    yield "qcow2", "", qcow2(SIZE, backing=raw, backing_format=b"raw")
    yield "qcow2", ",cache=on", qcow2(SIZE, backing=b"base", backing_format=raw[:200])
    yield "qcow2", "", qcow2(SIZE, {0: b""}, data_name=raw)
    yield "qcow2", ",parents=", qcow2(SIZE, {0: b""}, data_name=raw, backing=b"base", backing_format=b"raw")
    yield "qcow", ",parent_format=raw", qcow(SIZE, backing=raw)
    yield "qcow", ",parent_format=qcow2", qcow(SIZE, backing=raw)
    for code, encode in LOCATORS.items():
        for parent_uuid in (UUID, bytes(16)):  # the second UUID is that of a raw parent
            names = [(code, encode(name))]
            yield "vhd", ",changed=accept", image(SIZE, uuid=b"c" * 16, parent_uuid=parent_uuid, names=names)
    yield "vmdk", ",changed=accept", vmdk(SIZE, {}, parent_cid=1, parent=name)
    yield "vmdk", "", vmdk(SIZE, {}, extents=f'RW 8192 FLAT "{name}" 0')
    for kind in ("FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE", "VMFSRDM"):
        yield "vmdk", "", descriptor(f'RW 8 {kind} "{name}"{" 0" if kind == "FLAT" else ""}')


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory for images. Beside it is a directory with a secret, which no image may lead to."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "canary").write_bytes(b"secret".ljust(SIZE, b"!"))
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "link").symlink_to(tmp_path / "secret" / "canary")
    (images / "link-dir").symlink_to(tmp_path / "secret")
    (images / "base").write_bytes(bytes(SIZE))
    return images


def watch(directory: Path, chains: list[str], *places: Path) -> list[dict[str, Any]]:
    """Return each chain's answer and events, from a process that has loaded all drivers before it is watched.

    `places` are the directories in which the settings allow parents.
    """
    sound = {"qcow2": qcow2(SIZE), "qcow": qcow(SIZE), "vhd": image(SIZE), "vmdk": vmdk(SIZE, {}),
             "vhdx": vhdx(SIZE, {}), "vdi": vdi(SIZE, {}), "aio": bytes(SIZE)}  # fmt: skip
    for driver, data in sound.items():
        (directory.parent / driver).write_bytes(data)
    warm_up = "\n".join(f"{driver}:{directory.parent / driver}" for driver in sound)
    with (directory.parent / "secret" / "canary").open() as secret:
        done = subprocess.run(
            [sys.executable, "-m", "tests.tools.watched", warm_up, *map(str, places)], input="\0".join(chains),
            cwd=ROOT, capture_output=True, text=True, check=False, pass_fds=[secret.fileno()],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.rows("D9", "R18")
@pytest.mark.parametrize("is_allowed", [False, True])
def test_nothing_outside_is_ever_opened(directory: Path, *, is_allowed: bool) -> None:
    """Absolute, relative, linked, /proc, /dev, URL, json, every locator: only files in an allowed directory are opened.

    If no directory is allowed, only the image itself is opened.
    """
    chains = []
    with (directory.parent / "secret" / "canary").open() as secret:
        words = {"secret": secret.name, "directory": directory, "fd": secret.fileno()}
    for name in [each.format(**words) for each in NAMES]:
        for driver, options, data in images_of(name):
            path = directory / f"{len(chains)}"
            path.write_bytes(data)
            chains.append(f"{driver}:{path}{options}")
    answers = watch(directory, chains, *([directory] if is_allowed else []))

    assert len(chains) == len(answers)
    for chain, answer in zip(chains, answers, strict=True):
        own = chain.split(":")[1].split(",")[0]
        assert ["open", own] == answer["events"][0], chain
        for event, what in answer["events"]:
            assert "open" == event, (chain, answer)
            assert Path(what).is_relative_to(directory if is_allowed else own), (chain, answer)
        assert "secret!" not in str(answer)


@pytest.mark.slow
def test_the_watch_sees(directory: Path) -> None:
    """The test above can fail: a parent that the operator allowed is seen to be opened, and is read."""
    (directory / "a").write_bytes(qcow2(SIZE, backing=b"link", backing_format=b"raw"))
    (answer,) = watch(directory, [f"qcow2:{directory / 'a'},parents={directory.parent}"])

    assert "opened: [0]" == answer["said"]
    assert [["open", str(directory / "a")], ["open", str(directory.parent / "secret" / "canary")]] == answer["events"]
