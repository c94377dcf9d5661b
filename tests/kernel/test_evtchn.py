"""Tests of `xenbackend.kernel.evtchn`; a named pipe stands for the device: what is written can be read again."""

import errno
import json
import os
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import evtchn
from xenbackend.kernel.evtchn import Evtchn

HEADERS = json.loads((Path(__file__).parent.parent / "data" / "xen_devices.json").read_text())


@pytest.fixture
def events(tmp_path: Path) -> Evtchn:
    """Return event channels whose device is a pipe, with the ports 3 and 70 bound."""
    os.mkfifo(tmp_path / "evtchn")
    device = Evtchn(0, evtchn.open_device(0, str(tmp_path / "evtchn")))
    device._ports = {port: evtchn.PORT.pack(port) for port in (3, 70)}
    return device


def test_numbers_and_layout() -> None:
    """The ioctl numbers and the argument of BIND_INTERDOMAIN are those of the header."""
    bind = evtchn.INTERDOMAIN.pack(5, 9)

    assert HEADERS["IOCTL_EVTCHN_BIND_INTERDOMAIN"] == evtchn.BIND_INTERDOMAIN
    assert HEADERS["IOCTL_EVTCHN_UNBIND"] == evtchn.UNBIND
    assert HEADERS["IOCTL_EVTCHN_NOTIFY"] == evtchn.NOTIFY
    assert HEADERS["IOCTL_EVTCHN_RESET"] == evtchn.RESET
    assert HEADERS["IOCTL_EVTCHN_RESTRICT_DOMID"] == evtchn.RESTRICT_DOMID
    assert bind[HEADERS["ioctl_evtchn_bind_interdomain.remote_domain"]] == 5
    assert bind[HEADERS["ioctl_evtchn_bind_interdomain.remote_port"]] == 9
    assert HEADERS["sizeof ioctl_evtchn_bind_interdomain"] == len(bind)


def test_ports_are_read_and_written_back(events: Evtchn) -> None:
    """Unmasking writes the port as a native 32-bit number; pending reads such numbers, and never blocks."""
    events.unmask(3)
    events.unmask(70)

    assert events.pending() == [3, 70]
    assert events.pending() == []
    events.close()


def test_a_port_that_was_unbound_is_not_told_of(events: Evtchn) -> None:
    """An event of a port that was unbound meanwhile is ignored."""
    events.unmask(70)
    del events._ports[70]

    assert events.pending() == []
    events.close()


def test_overflow_means_any_port(events: Evtchn, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an overflow the kernel's list is reset, and every bound port counts as pending."""
    calls = []

    def overflow(_fd: int, _size: int) -> bytes:
        raise OSError(errno.EFBIG, "overflow")

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", overflow)
        patch.setattr(evtchn.ioctl, "call", lambda _fd, request, *_: calls.append(request))
        ports = events.pending()

    assert (ports, calls) == ([3, 70], [evtchn.RESET])
    events.close()


def test_notify_never_fails(events: Evtchn) -> None:
    """Notifying a peer that has gone is not an error."""
    events.notify(3)
    events.close()


def test_refusals_are_kernel_errors(tmp_path: Path, events: Evtchn) -> None:
    """Opening and binding raise KernelError with the operation in words."""
    with pytest.raises(KernelError, match="bind port 9 of domain 0"):
        events.bind(9)
    with pytest.raises(KernelError, match="No such file"):
        evtchn.open_device(1, str(tmp_path / "nothing"))
    events.close()


def test_restriction_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is restricted to its domain, but not to domain 0; a kernel without restrictions is accepted."""
    os.mkfifo(tmp_path / "evtchn")
    asked = []

    def old_kernel(_fd: int, request: int, argument: bytes, operation: str) -> int:
        asked.append((request, argument))
        raise KernelError(operation, errno.ENOTTY)

    monkeypatch.setattr(evtchn.ioctl, "call", old_kernel)
    for domid in (0, 258):
        os.close(evtchn.open_device(domid, str(tmp_path / "evtchn")))

    assert asked == [(evtchn.RESTRICT_DOMID, b"\x02\x01")]
