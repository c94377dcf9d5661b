"""What is masked in a text that leaves the host, and what is not."""

from __future__ import annotations

import pytest

from xenbackend.doctor.scrub import MASK, scrub

PLANTED = "hunter2hunter2"
CEPH = "AQBvaSNlAAAAABAAqM7m4o1g0rQO0Q3p0qk9xw=="
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{PLANTED}\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"nbd://admin:{PLANTED}@host:10809/export",
        f"s3:bucket,password={PLANTED}",
        f"log:|vault:token={PLANTED}|aio:/img",
        f"secret_key = {PLANTED}",
        f'"api_key": "{PLANTED}"',
        f"{{'passphrase': '{PLANTED}'}}",
        f"luks:key={PLANTED}|aio:/img",
        f"MYSQL_PASSWORD={PLANTED} and more",
        f"password: {PLANTED}",
        f"Authorization: Bearer {PLANTED}",
        f"x\n{PEM}\ny",
        f"-----BEGIN PRIVATE KEY-----\n{PLANTED}",
        f"passwd='{PLANTED} {PLANTED}'",
    ],
)
def test_secrets_are_masked(text: str) -> None:
    """Wherever somebody has written them: in addresses, options, settings, logs, JSON."""
    assert PLANTED not in scrub(text)
    assert MASK in scrub(text)


def test_a_key_of_ceph_is_masked() -> None:
    """It has a form of its own, and needs no name before it."""
    assert CEPH not in scrub(f"key: {CEPH}, or {CEPH}")


@pytest.mark.parametrize(
    "text",
    [
        "luks:key=/etc/xenbackend/guest1.key|aio:/dev/vg/guest1",
        "luks:key=credential:guest1|aio:/dev/vg/guest1",
        "aes-xts-plain64, key of 512 bits",
        "the key is being made of /etc/key, which takes seconds",
        "the key frontend is missing in the backend's directory",
        "rbd:pool/image,id=xen", "http://host/path", "passes 3", "monkey=5", '"reason": "key"', "4 tokens are left",
        "its passphrase opens no key slot of it",
    ],
)  # fmt: skip
def test_what_a_reader_needs_stays(text: str) -> None:
    """Names of files and credentials are no secrets, and neither are sentences about keys."""
    assert text == scrub(text)
