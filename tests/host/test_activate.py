"""The steps by which a host activates what was installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from xenbackend.errors import XenbackendError
from xenbackend.host import activate


def programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **endings: str) -> None:
    """Make only these programs available; each records how it was called, and ends as given."""
    for name, ending in endings.items():
        path = directory / name.replace("_", "-")
        path.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {directory}/calls\n{ending}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_the_steps_are_taken_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is made before the rules that name it, the unit loaded before it is enabled; each step is reported."""
    programs(tmp_path, monkeypatch, systemd_sysusers="", udevadm="", systemctl="")
    told: list[activate.Command] = []
    activate.run(activate.starting(starts=True), told.append)
    calls = (tmp_path / "calls").read_text().splitlines()

    assert calls == [" ".join(step) for step in told]
    assert "systemd-sysusers xenbackend.conf" == calls[0]
    assert ["systemctl daemon-reload", "systemctl enable --now xenbackend.service"] == calls[-2:]


def test_without_a_start_the_service_is_enabled_only() -> None:
    """With `--no-start` the service is enabled, so that it starts at the next boot, but not started."""
    assert ("systemctl", "enable", "xenbackend.service") == activate.starting(starts=False)[-1]


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("echo 'Job failed.' >&2; echo more >&2; exit 1", "failed: Job failed; see: journalctl -u xenbackend.service"),
        ("exit 3", "failed: exit status 3; see: journalctl -u xenbackend.service"),
    ],
)
def test_a_step_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, sentence: str
) -> None:
    """The first step that fails ends the run with the first line of its output and a command that shows more."""
    programs(tmp_path, monkeypatch, systemctl=ending)
    with pytest.raises(XenbackendError) as error:
        activate.run(activate.stopping(), lambda _step: None)

    assert f"systemctl disable --now xenbackend.service {sentence}" == str(error.value)


def test_a_program_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing program is named in a sentence."""
    programs(tmp_path, monkeypatch)
    with pytest.raises(XenbackendError, match="udevadm is not installed"):
        activate.run(activate.forgetting(), lambda _step: None)


def test_whether_it_serves_is_systemds_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service counts as active if systemctl says so."""
    programs(tmp_path, monkeypatch, systemctl="exit 3")
    assert not activate.is_serving()
    programs(tmp_path, monkeypatch, systemctl="exit 0")
    assert activate.is_serving()


@pytest.mark.skipif(not activate.is_possible(), reason="systemd does not run here")
def test_the_programs_are_there() -> None:
    """Where systemd runs, every program of the steps exists and answers --version."""
    for name in {step[0] for step in [*activate.starting(starts=True), *activate.forgetting()]}:
        assert 0 == subprocess.run([name, "--version"], capture_output=True, check=False).returncode


def test_what_systemd_says_of_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit's properties by name; none if systemd does not run, is missing, or does not answer in time."""
    monkeypatch.setattr(activate, "is_possible", lambda: True)
    programs(tmp_path, monkeypatch, systemctl="printf 'ActiveState=active\\nStatusText=a=b\\n\\n'")
    known = activate.unit_facts(10)
    programs(tmp_path, monkeypatch, systemctl="exec /bin/sleep 60")
    hangs = activate.unit_facts(0.2)
    (tmp_path / "systemctl").unlink()
    missing = activate.unit_facts(10)
    monkeypatch.setattr(activate, "is_possible", lambda: False)

    assert ({"ActiveState": "active", "StatusText": "a=b"}, {}, {}) == (known, hangs, missing)
    assert {} == activate.unit_facts(10)
