"""What is masked in a text that leaves the host, and what is not."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager

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
        f'{{"key": "{PLANTED}"}}',
        f'{{\\"key\\": \\"{PLANTED}\\"}}',
        f"luks:key={PLANTED}|aio:/img",
        f"MYSQL_PASSWORD={PLANTED} and more",
        f"password: {PLANTED}",
        f"Authorization: Bearer {PLANTED}",
        f"x\n{PEM}\ny",
        f"-----BEGIN PRIVATE KEY-----\n{PLANTED}",
        f"passwd='{PLANTED} {PLANTED}'",
        f"password='it\\'s {PLANTED}'",
        f'password="no end {PLANTED}',
        f"password=b'x {PLANTED}'",
        f'"{{\\"password\\": \\"{PLANTED}\\"}}"',
        f'{{\\"token\\": \\"a \\\\\\" {PLANTED}\\"}}',
        f"passphrase=/etc/key,password={PLANTED}",
        f"nbd://me:a@{PLANTED}@host/x",
        f"pwd={PLANTED}",
        f"Server=x;Pwd={PLANTED};Timeout=5",
        f"curl --password {PLANTED} http://host",
        f"curl --proxy-password '{PLANTED} {PLANTED}'",
        f"openssl -passin pass:{PLANTED}",
        f"--key {PLANTED}",
        f"['--password', '{PLANTED}']",
        f'{{"command": "tool --db.token {PLANTED}"}}',
        f"password=a;{PLANTED}",
        f"password=;{PLANTED}",
        f"password: a;;b;{PLANTED}; and more",
        f"{PLANTED}\n-----END PRIVATE KEY-----\nlater",
        f"-----BEGIN PRIVATE KEY-----\n12:00 host xenbackend[1]: {PLANTED}\n12:00 host -----END PRIVATE KEY-----",
    ],
)
def test_secrets_are_masked(text: str) -> None:
    """Secrets in addresses, options, settings, logs and JSON are masked."""
    assert PLANTED not in scrub(text)
    assert MASK in scrub(text)


def test_a_key_of_ceph_is_masked() -> None:
    """A key of Ceph is recognised by its form, without a name before it."""
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
        "its passphrase opens no key slot of it", '"tokens": 4', "password=''", "-----END CERTIFICATE-----",
        "PWD=/root", "--passphrase /etc/key", "--key", "--password --verbose", "the pass is made", "a-token is left",
        "'--password' is needed",
        "-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----",
    ],
)  # fmt: skip
def test_what_a_reader_needs_stays(text: str) -> None:
    """Names of files and credentials are kept, and so are sentences about keys."""
    assert text == scrub(text)


AROUND = [f"tool --password {PLANTED} /dev/sda", f"['--token', '{PLANTED}', '-v']", f"password={PLANTED}; then (more)"]


@pytest.mark.parametrize(
    "text", [f'{{"password": "{PLANTED}"}}', f"a = 'key={PLANTED}'", f"x://{PLANTED}@h/ y", *AROUND]
)
def test_what_is_around_a_secret_stays(text: str) -> None:
    """Quotes, brackets and following text are kept, so that a program can still read the text."""
    assert scrub(text) == text.replace(PLANTED, MASK)


def test_a_guest_hides_nothing_but_its_own_words() -> None:
    """A beginning of a key or quote without an end masks no line of anybody else."""
    lines = ["/5/data = '-----BEGIN PRIVATE KEY-----'", "/5/data = 'password=\"'", "/6/state = '4'"]

    assert "/6/state = '4'" == scrub("\n".join(lines)).splitlines()[-1]


BEGINNINGS = ["", "password='", 'password=\\"', "-----BEGIN PRIVATE KEY-----", "a://", "authorization:"]
REPEATED = [
    "a", "a.", "-", " ", "\n", "\\", "'", '"', "\\'", "=", ":", "a://", "://", "a://x@", "AQ", f"AQ{'A' * 36}", "api_",
    "key", "key=", "password", "password=", "password ", "password: ", "pass.", "token\\", 'token"', "secret= ", "b'",
    "password='\\", 'password="\\', "password='\"\\'", "password='\\'x\\\\\\'", "password=/", "password=credential:",
    "password='/", "password=;", "password=a;", ";", "pwd=", "-pwd ", "--password", "--password ", "--password '",
    "--password', ", "--password --", "--password /", "--a", "- ",
    "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----a", "-----END ",
    "-----END PRIVATE KEY-----", "PRIVATE KEY", "authorization:", "authorization:\n",
]  # fmt: skip


@contextmanager
def limited(cpu_s: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes more CPU time than the limit."""

    def give_up(_number: int, _frame: object) -> None:
        raise TimeoutError(f"it took {cpu_s} s")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("repeated", REPEATED)
def test_no_text_takes_longer_than_its_length(repeated: str) -> None:
    """Scrubbing takes about as long as for plain text, even for 50,000 characters that look like beginnings of secrets.

    Guests can write what is scrubbed.
    """
    for beginning, last in itertools.product(BEGINNINGS, ("", "!")):
        with limited(0.5):
            scrub(beginning + repeated * (50_000 // len(repeated)) + last)
