"""Installing below a root, and uninstalling."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.errors import ConfigError
from xenbackend.host import manifest
from xenbackend.host.files import Item, items
from xenbackend.host.install import install, stage, uninstall
from xenbackend.host.program import PACKAGED, Program
from xenbackend.host.tree import Tree

ITEMS = items(Program("/opt/x/bin/xenbackend", "/opt/x/bin/python3"))
CONFIG = "etc/xenbackend.toml"
UNIT = "etc/systemd/system/xenbackend.service"
Said = list[tuple[str, str]]


def put(root: Path, wanted: list[Item] = ITEMS, *, is_dry: bool = False) -> Said:
    """Install, and return what was reported."""
    said: Said = []
    install(Tree(root), wanted, lambda done, path: said.append((done, path)), is_dry=is_dry)
    return said


def take(root: Path, *, is_dry: bool = False, is_purge: bool = False) -> Said:
    """Uninstall, and return what was reported."""
    said: Said = []
    uninstall(Tree(root), lambda done, path: said.append((done, path)), is_dry=is_dry, is_purge=is_purge)
    return said


def picture(root: Path) -> dict[str, object]:
    """Return everything below a root: contents, link targets, modes and modification times."""
    return {
        str(each.relative_to(root)): (each.lstat().st_mode, each.lstat().st_mtime_ns, each.lstat().st_ino)
        for each in sorted(root.rglob("*"))
    }


def test_all_comes_and_all_goes(tmp_path: Path) -> None:
    """Uninstall removes exactly what was installed, including the directories that were created."""
    (tmp_path / "etc/xen").mkdir(parents=True)
    made = put(tmp_path)
    tree = Tree(tmp_path)
    were_there = [tree.has(item) for item in ITEMS]
    removed = take(tmp_path)

    assert [("made", item.path) for item in ITEMS] == made
    assert [True] * len(ITEMS) == were_there
    assert [("removed", item.path) for item in ITEMS] == removed
    assert ["etc", "etc/xen"] == list(picture(tmp_path))


def test_twice_is_once(tmp_path: Path) -> None:
    """A second install reports that everything was kept, and changes nothing, not even the manifest."""
    put(tmp_path)
    before = picture(tmp_path)

    assert [("kept", item.path) for item in ITEMS] == put(tmp_path)
    assert before == picture(tmp_path)


def test_a_dry_run_says_the_same_and_touches_nothing(tmp_path: Path) -> None:
    """Dry runs of install and uninstall report what would be done, and change nothing."""
    assert [("made", item.path) for item in ITEMS] == put(tmp_path, is_dry=True)
    assert {} == picture(tmp_path)
    put(tmp_path)
    before = picture(tmp_path)

    assert [("removed", item.path) for item in ITEMS] == take(tmp_path, is_dry=True)
    assert before == picture(tmp_path)


def test_an_older_versions_files_are_replaced(tmp_path: Path) -> None:
    """Files of an older version are replaced, unmodified settings included; those no longer shipped are removed."""
    old = [Item(item.path, b"old", item.mode, is_config=item.is_config) for item in ITEMS]
    put(tmp_path, [*old, Item("/etc/tmpfiles.d/xenbackend.conf", b"old")])
    said = put(tmp_path)

    assert {("replaced", item.path) for item in ITEMS} | {("removed", "/etc/tmpfiles.d/xenbackend.conf")} == set(said)
    assert all(Tree(tmp_path).has(item) for item in ITEMS)
    take(tmp_path)
    assert {} == picture(tmp_path)


@pytest.mark.parametrize("is_ours", [True, False], ids=["edited", "there before"])
def test_an_admins_settings_stay(tmp_path: Path, *, is_ours: bool) -> None:
    """Settings that the admin wrote or edited survive install and uninstall; a purge removes them."""
    if is_ours:
        put(tmp_path)
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / CONFIG).write_text('serve = "all"\n')
    said = put(tmp_path)
    take(tmp_path)

    assert ("kept your", "/" + CONFIG) in said
    assert 'serve = "all"\n' == (tmp_path / CONFIG).read_text()
    assert {"etc", CONFIG} == set(picture(tmp_path))
    take(tmp_path, is_purge=True)
    assert not (tmp_path / CONFIG).exists()


def test_what_somebody_changed_is_not_taken_away(tmp_path: Path) -> None:
    """Uninstall keeps a file that was changed and says so; a purge removes it."""
    put(tmp_path)
    (tmp_path / UNIT).write_text("another's")

    assert ("kept your", "/" + UNIT) in take(tmp_path, is_dry=True)
    assert ("removed", "/" + UNIT) in take(tmp_path, is_dry=True, is_purge=True)
    take(tmp_path)
    assert ["another's"] == [each.read_text() for each in tmp_path.rglob("*") if each.is_file()]


def test_what_is_gone_already_is_no_fault(tmp_path: Path) -> None:
    """A file that the admin removed is created again by install, and ignored by uninstall."""
    put(tmp_path)
    (tmp_path / UNIT).unlink()
    assert [("made", "/" + UNIT)] == [each for each in put(tmp_path) if each[0] != "kept"]
    (tmp_path / UNIT).unlink()
    take(tmp_path)

    assert {} == picture(tmp_path)


def test_another_ones_file_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    """A script of the same name that belongs to somebody else is named, and nothing is written."""
    (tmp_path / "etc/xen/scripts").mkdir(parents=True)
    (tmp_path / "etc/xen/scripts/tap2").write_text("blktap2's")
    before = picture(tmp_path)
    with pytest.raises(ConfigError, match="scripts/tap2: was not installed by"):
        put(tmp_path)

    assert before == picture(tmp_path)


def test_beside_a_package_nothing_is_installed(tmp_path: Path) -> None:
    """A host with the distribution's package is refused, and uninstall does not remove the package."""
    stage(Tree(tmp_path), items(PACKAGED), lambda _done, _path: None)
    before = picture(tmp_path)
    with pytest.raises(ConfigError, match="a package has installed xenbackend"):
        put(tmp_path)
    for is_purge in (False, True):
        with pytest.raises(ConfigError, match="nothing was installed here"):
            take(tmp_path, is_purge=is_purge)

    assert before == picture(tmp_path)


def test_after_a_cut_everything_can_be_taken_away(tmp_path: Path) -> None:
    """The manifest is written first, so that an interrupted install can be removed completely."""
    (tmp_path / "etc/udev/rules.d/60-xenbackend.rules").parent.mkdir(parents=True)
    before = picture(tmp_path)

    def cut(_done: str, path: str) -> None:
        if "sysusers" in path:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(Tree(tmp_path), ITEMS, cut)
    assert (tmp_path / "etc/xen/scripts/tap2").is_symlink()
    assert manifest.load(Tree(tmp_path)).files.keys() == {item.path for item in ITEMS}
    take(tmp_path)
    assert before.keys() == picture(tmp_path).keys()
