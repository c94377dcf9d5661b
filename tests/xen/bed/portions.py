"""Which tests a part of the suite has: a core that is always run, and a share of the rest.

Must not name a test that does not exist, nor omit a file: `tests/test_xen_bed.py` checks that.

A file is the unit, as its tests share a guest. The core has what has found faults: xl's whole way with a disk, twelve
disks at once, kills under load, a guest that is saved, and what must hold with each kernel and Python: the contracts
that the simulated Xen is held to as well, and the walls around a worker that has been taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CORE = (
    "tests/contract/test_ports.py",
    "tests/contract/test_store.py",
    "tests/system/test_canary.py",
    "tests/walls/test_raising.py",
    "tests/xen/test_whole_story.py",
    "tests/xen/test_dom0_disk.py",
    "tests/xen/test_kills.py::test_both_die_at_once",
    "tests/xen/test_migration.py::test_save_and_restore",
    "tests/xen/test_xl_life.py::test_twelve_disks",
)
SECONDS = {  # of the rest; only their proportions count
    "tests/xen/test_blkback.py": 50,
    "tests/xen/test_canary.py": 110,
    "tests/xen/test_cdrom.py": 45,
    "tests/xen/test_chains.py": 200,
    "tests/xen/test_config_line.py": 90,
    "tests/xen/test_debian_package.py": 160,
    "tests/xen/test_driver_domain.py": 280,
    "tests/xen/test_driver_domain_death.py": 375,
    "tests/xen/test_grub.py": 18,
    "tests/xen/test_guest_ends.py": 110,
    "tests/xen/test_hvm.py": 25,
    "tests/xen/test_images.py": 64,
    "tests/xen/test_in_use.py": 125,
    "tests/xen/test_kills.py": 204,
    "tests/xen/test_linux_guest.py": 49,
    "tests/xen/test_migration.py": 140,
    "tests/xen/test_sectors.py": 120,
    "tests/xen/test_settings.py": 20,
    "tests/xen/test_walls.py": 40,
    "tests/xen/test_xl_block.py": 200,
    "tests/xen/test_xl_dom0.py": 50,
    "tests/xen/test_xl_life.py": 100,
}
_OTHERWISE = 30  # seconds of a single test, as in the core
WHOLE = (*(each for each in CORE if "::" not in each), *SECONDS)


def halves(tests: Sequence[str]) -> list[list[str]]:
    """Return two shares of files and tests that take about as long."""
    return _spread({test: SECONDS.get(test, _OTHERWISE) for test in tests}, 2)


def part(number: int, count: int) -> list[str]:
    """Return pytest's arguments for the `number`-th of `count` parts: the core, and the part's own files."""
    files = shares(count)[number - 1]
    return [*files, *(each for each in CORE if each.partition("::")[0] not in files)]


def shares(count: int) -> list[list[str]]:
    """Return the files of each part without the core: the longest first, each added to the shortest part."""
    return _spread(SECONDS, count)


def _spread(seconds: Mapping[str, int], count: int) -> list[list[str]]:
    parts: list[list[str]] = [[] for _ in range(count)]
    for test, _ in sorted(seconds.items(), key=lambda each: (-each[1], each[0])):
        min(parts, key=lambda tests: sum(seconds[each] for each in tests)).append(test)
    return parts
