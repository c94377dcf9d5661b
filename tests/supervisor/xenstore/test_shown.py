"""What xenstore-ls shows beside the backend's directory."""

from __future__ import annotations

import pytest

from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.shown import Shown
from xenbackend.supervisor.xenstore.store import Store

ONE, OTHER = VbdPath("vbd", 0, 5, 51712), VbdPath("vbd", 0, 6, 51712)
HOME = "/local/domain/0"


def test_only_what_changes_is_written(toolstack: Store) -> None:
    """A value that stands there is not written again, unless xenstore was away."""
    shown = Shown(toolstack, ONE)
    shown.status({"phase": "open", "error": ""})
    toolstack.remove(f"{HOME}/xenbackend")
    shown.status({"phase": "serving", "error": ""})
    assert {"phase": "serving"} == toolstack.dictionary(f"{HOME}/xenbackend/{ONE}")
    shown.doubt()
    shown.status({"phase": "serving", "error": ""})

    assert {"phase": "serving", "error": ""} == toolstack.dictionary(f"{HOME}/xenbackend/{ONE}")


def test_an_error_is_shown_as_the_kernel_shows_it(toolstack: Store) -> None:
    """The errno stands before the sentence, and an error that is over leaves no node behind."""
    shown = Shown(toolstack, ONE)
    shown.error("it broke")
    text = toolstack.read(f"{HOME}/error/backend/{ONE}/error")
    shown.error("")

    assert "22 it broke" == text
    assert [] == toolstack.directory(f"{HOME}/error")


def test_no_error_costs_one_question(toolstack: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that is well nothing is removed: every new disk would do so."""
    monkeypatch.setattr(toolstack, "remove", pytest.fail)
    Shown(toolstack, ONE).error("")


def test_an_error_of_an_earlier_service_is_over(toolstack: Store) -> None:
    """What a service left that had no time to tidy up goes away with the first word that all is well."""
    Shown(toolstack, ONE).error("it broke")
    Shown(toolstack, ONE).error("")

    assert [] == toolstack.directory(f"{HOME}/error")


def test_the_last_vbd_takes_the_directories_along(toolstack: Store) -> None:
    """Removing one vbd leaves the other ones' nodes; removing the last leaves nothing of ours."""
    one, other = Shown(toolstack, ONE), Shown(toolstack, OTHER)
    one.status({"phase": "open"})
    other.status({"phase": "open"})
    other.error("it broke")
    one.remove()
    assert ["6"] == toolstack.directory(f"{HOME}/xenbackend/vbd")
    other.remove()

    assert not {"xenbackend", "error"} & set(toolstack.directory(HOME))
