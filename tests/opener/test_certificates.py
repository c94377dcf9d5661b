"""Tests of `xenbackend.opener.certificates`: what is read from a directory, and which errors name the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xenbackend.errors import DriverError
from xenbackend.opener.certificates import MAX_FILE, read_certificates


def put(directory: Path, **files: str) -> str:
    """Write files, whose names have an underscore for a hyphen, and return the directory."""
    for name, text in files.items():
        (directory / f"{name.replace('_', '-')}.pem").write_text(text)
    return str(directory)


def test_what_is_there_is_read(tmp_path: Path) -> None:
    """The authorities' certificate is required, our own certificate and key are read if they exist, and nothing else
    is.
    """
    directory = put(tmp_path, ca_cert="ca", server_key="secret")
    assert {"ca-cert.pem": "ca"} == read_certificates(directory)
    put(tmp_path, client_cert="us", client_key="key")
    found = read_certificates(directory)
    assert {"ca-cert.pem": "ca", "client-cert.pem": "us", "client-key.pem": "key"} == found


def test_half_of_it_is_refused(tmp_path: Path) -> None:
    """A certificate without its key, a key without its certificate, and missing authorities are refused, by name."""
    with pytest.raises(FileNotFoundError, match=r"ca-cert\.pem"):
        read_certificates(put(tmp_path, client_cert="us", client_key="key"))
    (tmp_path / "client-key.pem").unlink()
    with pytest.raises(DriverError, match=r"one of client-cert\.pem and client-key\.pem"):
        read_certificates(put(tmp_path, ca_cert="ca"))


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    """A pipe, bytes that are not text, and a file that is too long are refused at once."""
    os.mkfifo(tmp_path / "ca-cert.pem")
    with pytest.raises(DriverError, match="is not a file"):
        read_certificates(str(tmp_path))
    (tmp_path / "ca-cert.pem").unlink()
    (tmp_path / "ca-cert.pem").write_bytes(b"\xff")
    with pytest.raises(DriverError, match="not a PEM file"):
        read_certificates(str(tmp_path))
    with pytest.raises(DriverError, match="more than"):
        read_certificates(put(tmp_path, ca_cert="x" * (MAX_FILE + 1)))
