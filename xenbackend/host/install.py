"""Installs items below a root and removes them again, and reports each step.

Must not start or stop anything.

Once changed, the settings file belongs to the admin. Everything else is ours: installing overwrites it, and
uninstalling removes it unless it was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xenbackend import settings_file
from xenbackend.errors import ConfigError
from xenbackend.host import manifest as manifests
from xenbackend.host.files import UNIT, Item
from xenbackend.host.manifest import Manifest
from xenbackend.host.tree import Tree

Say = Callable[[str, str], None]  # gets what is done (a word below), and to which path
MADE, REPLACED, KEPT, YOURS, REMOVED = "made", "replaced", "kept", "kept your", "removed"
_WRITTEN = (MADE, REPLACED)
_PACKAGES_UNITS = (f"/lib/systemd/system/{UNIT}", f"/usr/lib/systemd/system/{UNIT}")


def install(tree: Tree, items: Sequence[Item], say: Say, *, is_dry: bool = False) -> set[str]:
    """Install the items below the root, remove files of an older version, and return the paths that have changed.

    The manifest is written first, so that after a power cut `uninstall` knows every file that may exist.

    Raises: ConfigError, before anything is touched, if a file that is not ours is in the way.
    """
    _refuse_package(tree)
    before = manifests.load(tree)
    verdicts = [(item, _judge(tree, item, before.files.get(item.path))) for item in items]
    wanted = {item.path for item in items}
    obsolete = [path for path in before.files if path not in wanted and tree.fingerprint(path)]
    after = _manifest(tree, verdicts, before)
    if not is_dry:
        manifests.save(tree, Manifest(before.files | after.files, after.directories))
    for item, verdict in verdicts:
        if verdict in _WRITTEN and not is_dry:
            tree.put(item)
        say(verdict, item.path)
    for path in obsolete:
        if not is_dry:
            tree.remove(path)
        say(REMOVED, path)
    if not is_dry:
        manifests.save(tree, after)
    return {item.path for item, verdict in verdicts if verdict in _WRITTEN} | set(obsolete)


def stage(tree: Tree, items: Sequence[Item], say: Say) -> None:
    """Put the items below the root of a package that is being built; the package manager keeps its own manifest."""
    for item in items:
        tree.put(item)
        say(MADE, item.path)


def uninstall(tree: Tree, say: Say, *, is_dry: bool = False, is_purge: bool = False) -> None:
    """Remove the installed files; with `is_purge`, also those that were changed since then.

    Raises: ConfigError if nothing was installed.
    """
    manifest = manifests.load(tree)
    config = str(settings_file.PATH)
    if is_purge and not _is_packaged(tree) and tree.fingerprint(config):
        manifest.files.setdefault(config, "")  # one from before the installation is removed as well
    if not manifest.files:
        raise ConfigError(
            "nothing was installed here by: xenbackend install; a package is removed by its package manager"
        )
    for path, fingerprint in manifest.files.items():
        found = tree.fingerprint(path)
        if found not in (None, fingerprint) and not is_purge:
            say(YOURS, path)
        elif found is not None:
            if not is_dry:
                tree.remove(path)
            say(REMOVED, path)
    if not is_dry:
        manifests.remove(tree)
        tree.remove_directories(manifest.directories)


def _judge(tree: Tree, item: Item, installed: str | None) -> str:
    """Return what to do with an item; `installed` is the fingerprint of the file that we installed last, if any.

    Raises: ConfigError if a file that is not ours is in the way.
    """
    found = tree.fingerprint(item.path)
    if found is None:
        return MADE
    if tree.has(item):
        return KEPT
    if item.is_config:
        return REPLACED if found == installed else YOURS
    if installed is None:
        raise ConfigError(f"{tree.at(item.path)}: was not installed by: xenbackend install; move it away first")
    return REPLACED


def _manifest(tree: Tree, verdicts: Sequence[tuple[Item, str]], before: Manifest) -> Manifest:
    """Return the manifest after the installation. A file that the admin has changed keeps its former fingerprint."""
    files = {item.path: item.fingerprint for item, verdict in verdicts if verdict != YOURS}
    former = {
        item.path: before.files[item.path]
        for item, verdict in verdicts
        if verdict == YOURS and item.path in before.files
    }
    missing = tree.missing_directories([*(item.path for item, _ in verdicts), manifests.PATH])
    return Manifest(files | former, sorted({*before.directories, *missing}))


def _refuse_package(tree: Tree) -> None:
    if _is_packaged(tree):
        raise ConfigError("a package has installed xenbackend here already; remove that first, or use it as it is")


def _is_packaged(tree: Tree) -> bool:
    return any(tree.fingerprint(path) for path in _PACKAGES_UNITS)
