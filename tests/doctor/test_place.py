"""Where a look is made, and which commands help there."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.doctor import place
from xenbackend.doctor.place import Place


@pytest.mark.parametrize(("text", "is_guest"), [("control_d\n", False), ("\n", True), ("", True), (None, False)])
def test_which_domain_this_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, *, is_guest: bool
) -> None:
    """Xen's own file tells whether this is a guest; a system without Xen is none."""
    monkeypatch.setattr(place.activate, "is_possible", lambda: False)
    if text is not None:
        (tmp_path / "proc/xen").mkdir(parents=True)
        (tmp_path / place.CAPABILITIES).write_text(text)

    assert Place(is_guest=is_guest, has_systemd=False) == place.here(tmp_path)


def test_commands_for_where_it_is() -> None:
    """Commands use systemd where it runs; those for xenstored and for what only dom0's xl knows are for dom0."""
    dom0, other, guest = Place(), Place(has_systemd=False), Place(is_guest=True)

    assert ("journalctl -u xenbackend.service -n 50", "systemctl status xenstored") == (dom0.log, dom0.xenstored)
    assert ("tail -n 50 /var/log/xenbackend.log", "pgrep -a xenstored") == (other.log, other.xenstored)
    assert "systemctl status xenstored  # in dom0" == guest.xenstored
    assert ("xl list", "xl list  # in dom0") == (dom0.in_dom0("xl list"), guest.in_dom0("xl list"))
