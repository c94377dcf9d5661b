"""The limits that keep files readable: sizes, head docstrings, and a test file beside each module."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from statistics import median, quantiles

import pytest

from tests.sources import FILES, PACKAGE, TESTS, in_one_process, nodes_of, tree_of

ROOT = PACKAGE
pytestmark = in_one_process
MAX_LINES, MEDIAN_LINES = 420, 150
MAX_FUNCTION, MEDIAN_FUNCTION, NINE_OF_TEN = 50, 8, 30
DRIVERS = ROOT / "block" / "drivers"  # their head docstrings are manual pages, which test_docs.py looks after

TESTED_ELSEWHERE = {
    "block/remote/disk.py": "block/drivers/test_nbd.py",
    "protocol/opening.py": "protocol/test_codec.py sends each of its messages; test_jobs.py tests the largest",
    "block/servers.py": "block/remote/test_target.py",
    "__main__.py": "a line that calls cli/main.py",
    "bench/blkif_native.py": "bench/test_blkif.py holds both generators to the same tests",
    "bench/target.py": "bench/test_session.py starts every target and ends it",
    "bench/vhost_user.py": "bench/test_virtqueue.py speaks it to a real qemu-storage-daemon",
    "bench/worker.py": "bench/test_session.py runs every workload on one",
    "block/back_reads.py": "block/test_write_back.py has each of its reads, killed and without power",
    "block/cache_parts.py": "block/drivers/test_cache.py has each size, mode and request",
    "block/env.py": "words only; worker/test_env.py holds what implements it to them",
    "block/formats/luks1.py": "block/formats/test_luks.py has every header of both",
    "block/formats/luks2.py": "so it does of LUKS2",
    "block/formats/luks_volume.py": "values of both, which that test looks at",
    "block/formats/common.py": "words only; every format's tests use them",
    "block/mapped/foreign.py": "block/drivers/test_vdi.py opens images by it, sound and damaged ones",
    "block/mapped/inflated.py": "block/drivers/test_qcow2.py and test_vmdk.py read compressed clusters by it",
    "block/qcow/copyup.py": "block/qcow/test_kills.py kills it at every write",
    "block/files.py": "shapes only; worker/test_files.py and opener/test_main.py have what is of them",
    "block/qcow/disk.py": "block/drivers/test_qcow2.py and test_qcow.py open images by it",
    "block/qcow/level2.py": "block/qcow/test_kills.py kills it at every write",
    "cli/image_check.py": "cli/test_image.py runs it",
    "cli/image_progress.py": "cli/test_image.py stops a real process, and looks at a terminal",
    "cli/image_show.py": "cli/test_image.py runs it",
    "cli/image_verbs.py": "cli/test_image.py runs each of them",
    "image/formats/qcow.py": "image/test_check.py, test_resize.py, test_measure.py and test_facts.py use all of it",
    "image/formats/qcow2.py": "so do they, and test_rebase.py and test_data_files.py",
    "image/formats/raw.py": "image/test_resize.py grows by it",
    "image/formats/vhd.py": "the tests that qcow2.py has use all of it",
    "image/tools.py": "block/formats/test_table.py looks at what each subclass has",
    "image/writing.py": "image/test_behind.py and test_resize.py kill it at every write",
    "image/faults.py": "values only; image/test_check.py counts them",
    "image/session.py": "image/test_transfer.py and everything else there runs in one",
    "kernel/inuse.py": "worker/test_in_use.py has each of its sentences",
    "kernel/ports.py": "contract/test_ports.py holds each implementation to it",
    "supervisor/service/detached.py": "supervisor/service/test_main.py starts the daemon",
    "supervisor/vbd/aims.py": "supervisor/vbd/test_device.py has each aim, test_device_is_total.py all at once",
    "opener/access.py": "opener/test_main.py asks it everything",
    "supervisor/vbd/arrival.py": "supervisor/vbd/test_vbd.py and service/test_registry.py have scripts that wait",
    "supervisor/vbd/events.py": "values only; test_device.py is made of them",
    "supervisor/vbd/context.py": "values only; supervisor/service/test_registry.py hands them to each vbd",
}


def is_package_head(file: Path) -> bool:
    """Return whether a file only says what its package is."""
    return file.name == "__init__.py" and file.parent != DRIVERS


def place_of(file: Path) -> str:
    """Return a file's path below the package."""
    return file.relative_to(ROOT).as_posix()


def head_of(file: Path) -> str:
    """Return a module's docstring, or nothing."""
    return ast.get_docstring(tree_of(file)) or ""


def lines_of(file: Path) -> int:
    """Return how many lines a file has."""
    return len(file.read_text().splitlines())


def functions() -> dict[str, int]:
    """Return the lines of each function and method, by file, name and place."""
    found = {}
    for file in FILES:
        for node in nodes_of(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{place_of(file)}:{node.lineno} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    return found


def test_a_group_stays_in_one_process(request: pytest.FixtureRequest) -> None:
    """Tests that share work run in one process: pytest-xdist groups them by a suffix of their names."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not shared out by groups")

    assert request.node.nodeid.endswith("@sources")


def test_names_of_tests_are_short(request: pytest.FixtureRequest) -> None:
    """No test's name contains an image: pytest-xdist sends and keeps all names."""
    names = [item.nodeid for item in request.session.items]

    assert [] == [name[:100] for name in names if len(name) > 1000]


def test_whoever_silences_a_checker_says_why() -> None:
    """A comment that silences the type checker or the linter ends with a reason, or a comment above it has the reason.

    Tests silence no type checker, as none looks at them.
    """
    bare = re.compile(r"# (type: ignore(\[[^]]*\])?|noqa(: [A-Z0-9, ]+)?)\s*$")
    found = []
    for file in [*FILES, *TESTS.rglob("*.py")]:
        lines = ["", *file.read_text().split("\n")]
        bad = [n for n, line in enumerate(lines) if bare.search(line) and not lines[n - 1].lstrip().startswith("#")]
        found += [f"{file.relative_to(ROOT.parent)}:{number}" for number in bad]

    assert [] == found


def test_files_are_short() -> None:
    """No file has over 420 lines, and half of them have fewer than 150."""
    lines = {place_of(file): lines_of(file) for file in FILES if not is_package_head(file)}

    assert {} == {place: count for place, count in lines.items() if count > MAX_LINES}
    assert median(lines.values()) <= MEDIAN_LINES


@pytest.mark.slow
def test_functions_are_short() -> None:
    """No function has over 50 lines, nine of ten have fewer than 30, and half of them fewer than 8."""
    lines = functions()

    assert {} == {place: count for place, count in lines.items() if count > MAX_FUNCTION}
    assert quantiles(lines.values(), n=10)[-1] <= NINE_OF_TEN
    assert median(lines.values()) <= MEDIAN_FUNCTION


def test_modules_say_what_they_hold() -> None:
    """Each file begins with what it holds, and what it must never do if it does anything."""
    heads = {file: head_of(file) for file in FILES}
    does_something = [
        file
        for file in FILES
        if not is_package_head(file) and file.parent != DRIVERS and file.name not in {"__init__.py", "__main__.py"}
    ]

    assert [] == [place_of(file) for file, head in heads.items() if not head.split("\n")[0].endswith((".", ":"))]
    assert [] == [place_of(file) for file in does_something if "ust not " not in heads[file]]


def test_modules_have_their_tests() -> None:
    """Each module has its tests at the same path, or a reason why they are elsewhere, never both."""
    wrong = []
    for file in FILES:
        name = file.parent.name if file.name == "__init__.py" else file.stem
        tests = TESTS / file.relative_to(ROOT).with_name(f"test_{name}.py")
        if not is_package_head(file) and tests.exists() == (place_of(file) in TESTED_ELSEWHERE):
            wrong.append(place_of(file))

    assert [] == wrong


@pytest.mark.slow
def test_every_test_says_its_rule() -> None:
    """Each test has a docstring that begins with a full sentence."""
    silent = []
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in nodes_of(file):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                rule = ast.get_docstring(node) or ""
                if not rule.split("\n\n")[0].endswith((".", "?")):
                    silent.append(f"{file.relative_to(TESTS)}:{node.lineno} {node.name}")

    assert [] == silent


@pytest.mark.slow
def test_no_test_sleeps() -> None:
    """No test sleeps, and none replaces anything of ours by a mock.

    The model replaces functions by ones that do the same in one process.
    """
    found = []
    for file in sorted(TESTS.rglob("*.py")):
        for node in nodes_of(file):
            if isinstance(node, ast.Attribute) and node.attr == "sleep" and ast.unparse(node) == "time.sleep":
                found.append(f"{file.relative_to(TESTS)}:{node.lineno} sleeps")
            elif (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("unittest")
                and file.parent.name != "model"
            ):
                found.append(f"{file.relative_to(TESTS)}:{node.lineno} imports {node.module}")

    assert [] == found
