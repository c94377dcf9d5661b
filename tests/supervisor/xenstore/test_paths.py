"""The paths of a vbd in xenstore, composed and parsed."""

import pytest

from xenbackend.supervisor.xenstore.paths import VbdPath, parse_backend_path, parse_domain_directory


def test_a_vbd_knows_its_paths() -> None:
    """A vbd's backend lies under the backend domain, its frontend under the guest."""
    vbd = VbdPath("vbd3", 0, 5, 51712)

    assert vbd.backend == "/local/domain/0/backend/vbd3/5/51712"
    assert vbd.frontend == "/local/domain/5/device/vbd/51712"
    assert str(vbd) == "vbd3/5/51712"
    assert vbd.disk == "5/xvda"


def test_paths_lead_back_to_the_vbd() -> None:
    """A path in a vbd's directory gives the vbd and the rest; a relative one belongs to our own domain."""
    vbd = VbdPath("vbd", 3, 5, 51712)

    assert (vbd, "") == parse_backend_path(vbd.backend, 0)
    assert (vbd, "state") == parse_backend_path(f"{vbd.backend}/state", 0)
    assert (vbd, "a/b") == parse_backend_path("backend/vbd/5/51712/a/b", 3)


@pytest.mark.parametrize(
    "path",
    ["", "backend", "backend/vbd", "backend/vbd/5", "backend/vbd/5/", "backend/vbd/05/1", "backend/vbd/5/xvda",
     "backend/vbd/32752/1", "backend/vbd/5/536870912", "/local/domain/5/device/vbd/51712", "/backend/vbd/5/1",
     "/local/domain/0/backend/vbd/5/-1", "/local/domain/x/backend/vbd/5/1", "backend/vbd/5/1\n",
     "backend/vbd/99999999999/1"],
)  # fmt: skip
def test_paths_of_no_vbd_are_nobodys(path: str) -> None:
    """A path that is too short, elsewhere or misspelt belongs to no vbd."""
    assert parse_backend_path(path, 0) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/local/domain/0/backend/vbd/5", ("vbd", 5)),
        ("backend/vbd3/12", ("vbd3", 12)),
        ("/local/domain/0/backend/vbd", None),
        ("/local/domain/0/backend/vbd/5/51712", None),
        ("/local/domain/0/backend/vbd/05", None),
        ("/local/domain/0/backend/vbd/5/", None),
        ("/local/domain/0/backend/VBD/5", None),
    ],
)
def test_a_domains_directory(path: str, expected: tuple[str, int] | None) -> None:
    """Only the directory of one domain's vbds, as toolstacks make it, is recognised; nothing similar is."""
    assert expected == parse_domain_directory(path)
