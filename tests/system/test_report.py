"""`xenbackend report` on a host full of secrets contains none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.luks_images import Made, key_file, luks2
from xenbackend.embedded.machine import Machine
from xenbackend.protocol.client import ServiceError
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
SIZE = 1 << 20
PASSPHRASE = b"passphrase-SECRET-1"
ENVIRONMENT = "environment-SECRET-2"
GUESTS_DATA = b"guests-data-SECRET-3"
IN_LOG = "in-the-log-SECRET-4"
IN_STORE = "in-xenstore-SECRET-5"
IN_ADDRESS = "in-an-address-SECRET-6"
CEPH = "AQBvaSNlAAAAABAAqM7m4o1g0rQO0Q3p0qk9xw=="
IN_SETTINGS = "in-a-comment-SECRET-7"
FORMS = [bytes, lambda data: data.hex().encode()]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory with the secrets, one of which is in the environment too."""
    monkeypatch.setenv("XENBACKEND_TEST_NOTE", ENVIRONMENT)
    return tmp_path


def pieces_of(path: Path) -> dict[str, bytes]:
    """Return the files of an archive, by name."""
    with tarfile.open(path) as archive:
        files = {each.name: archive.extractfile(each) for each in archive.getmembers()}
        return {name.partition("/")[2]: file.read() for name, file in files.items() if file is not None}


def test_no_secret_is_in_it(directory: Path) -> None:
    """The report contains no passphrase, key, guest data, environment, foreign part of xenstore, nor a secret from a
    log, order or comment; it contains what helps.
    """
    made = Made(os.urandom(SIZE), passphrases=[PASSPHRASE])
    image, key, config, log = (directory / each for each in ("img", "key", "x.toml", "service.log"))
    image.write_bytes(luks2(made))
    key_file(key, PASSPHRASE)
    config.write_text(f'# {IN_SETTINGS}\nparents = ["/img/templates"]\n')
    chain = f"log:|luks:key={key}|aio:{image}"
    with Machine(config=config, log=log) as machine:
        guest = machine.create_guest(5)
        path = machine.attach(5, "xvda", chain)
        frontend = guest.connect(path, Wishes())
        frontend.write(0, GUESTS_DATA.ljust(4096, b"."))
        frontend.flush()
        machine.store.write("/local/domain/5/console/vnc-pass", IN_STORE)
        machine.store.write("/local/domain/5/data/note", IN_STORE)  # its name does not look like a secret's
        with pytest.raises(ServiceError, match=IN_ADDRESS):
            machine.ask({"verb": "set", "vbd": "5/xvda", "chain": f"nbd:nbd://me:{IN_ADDRESS}@127.0.0.1:1/x"})
        with log.open("a") as file:
            file.write(f"a driver said: password={IN_LOG}, key = {CEPH}\n")
        result = subprocess.run(
            [sys.executable, "-m", "xenbackend", "report", "--json", "--socket", machine.control, "--log", str(log),
             "--config", str(config), "--output", str(directory / "r.tar.gz")],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        frontend.close()
        machine.detach(path)
        guest.close()
    pieces = pieces_of(directory / "r.tar.gz")
    everything = b"".join(pieces.values()) + result.stdout.encode()

    for secret in (PASSPHRASE, GUESTS_DATA, made.key, made.plain[4096:4160], *(
        each.encode() for each in (ENVIRONMENT, IN_LOG, IN_STORE, IN_ADDRESS, CEPH, IN_SETTINGS))):  # fmt: skip
        for form in FORMS:
            assert form(secret) not in everything, secret
    assert f"luks:key={key}" in pieces["status.json"].decode()
    assert "a driver said: password=(masked)" in pieces["service.log"].decode()
    assert "backend/vbd/5/51712/params" in pieces["xenstore.txt"].decode()
    assert ["/img/templates"] == json.loads(pieces["settings.json"])["parents"]
    assert "5/xvda, process" in pieces["processes.txt"].decode()
    assert "set" in {each["verb"] for each in json.loads(pieces["orders.json"])}
