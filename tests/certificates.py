"""Certificates for tests, made by openssl: of an authority, of valid and invalid servers, of a client.

Must not be used for anything else: their keys are not protected.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
KINDS = ("EC", "RSA", "ED25519")  # of keys, besides the one that certificates here have


class Authority:
    """An authority that signs certificates, in a directory of its own."""

    def __init__(self, directory: Path, name: str = "ours") -> None:
        """Make its own certificate. Skips the test if this host has no openssl."""
        if shutil.which("openssl") is None:
            pytest.skip("there is no openssl here")
        directory.mkdir()
        self.directory = directory
        self.certificate, self._key = directory / "ca-cert.pem", directory / "ca-key.pem"
        _openssl(
            "req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate, "-days", "30", "-subj", f"/CN={name}"
        )

    def sign(self, stem: Path, host: str = "localhost", days: int = 30, key: Sequence[str] = _KEY) -> None:
        """Make ``STEM-key.pem``, and ``STEM-cert.pem`` for a host; that of localhost is also for 127.0.0.1."""
        request, names = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        addresses = ",IP:127.0.0.1" if host == "localhost" else ""
        names.write_text(f"subjectAltName=DNS:{host}{addresses}\n")
        _openssl("req", *key, "-keyout", f"{stem}-key.pem", "-out", request, "-subj", f"/CN={host}")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
            *_until(days), "-extfile", names, "-out", f"{stem}-cert.pem",
        )  # fmt: skip

    def server(self, name: str, host: str = "localhost", days: int = 30) -> Path:
        """Return a directory as a server of nbdkit or QEMU takes it; without DH parameters QEMU would take seconds."""
        directory = self.directory / name
        directory.mkdir()
        parameters = ("-algorithm", "DH", "-pkeyopt", "group:ffdhe2048")
        _openssl("genpkey", "-genparam", *parameters, "-out", directory / "dh-params.pem")
        self.sign(directory / "server", host, days)
        shutil.copy(self.certificate, directory)
        return directory

    def client(self, name: str, *, shows_itself: bool) -> Path:
        """Return a directory as `certificates=` takes it."""
        directory = self.directory / name
        directory.mkdir()
        if shows_itself:
            self.sign(directory / "client", "client")
        shutil.copy(self.certificate, directory)
        return directory


def make_key(kind: str) -> str:
    """Return a new private key of one of KINDS, as PEM."""
    more = ("-pkeyopt", "ec_paramgen_curve:P-256") if kind == "EC" else ()
    return _openssl("genpkey", "-algorithm", kind, *more).decode()


def _until(days: int) -> tuple[str, ...]:
    """Return the options for so many days from now; for the past, OpenSSL 3.4 and later want dates."""
    shown = subprocess.run(["openssl", "x509", "-help"], capture_output=True, text=True, check=True).stderr
    if days < 0 and "-not_after" in shown:
        return ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z")
    return ("-days", str(days))


def _openssl(*words: object) -> bytes:
    return subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=20).stdout
