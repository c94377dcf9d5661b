"""Fixtures for scenarios in a real dom0: the service, guests, images, and a check after each that nothing is left.

Tests are collected in a dom0 only (`make test-xen` boots one); on other machines this directory has none.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xen.bed.progress import NEEDS
from tests.xen.tools import leaks, service, xenstore
from tests.xen.tools.command import run, until, xl_has_waited
from tests.xen.tools.guest import Guest, names
from tests.xen.tools.logs import KernelLog, XenLog
from tests.xen.tools.service import Service

CAPABILITIES = Path("/proc/xen/capabilities")
if not CAPABILITIES.is_file() or "control_d" not in CAPABILITIES.read_text():
    collect_ignore_glob = ["test_*.py"]

NewGuest = Callable[..., Guest]
_began = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--times`, with which a failure that hardly ever happens is looked for."""
    parser.addoption("--times", type=int, default=1, help="run each test so many times")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Collect each test as often as it is to run."""
    times = metafunc.config.getoption("--times", default=1)
    if times > 1:
        metafunc.fixturenames.append("_repetition")
        metafunc.parametrize("_repetition", range(1, times + 1))


def pytest_configure(config: pytest.Config) -> None:
    """Name our markers."""
    config.addinivalue_line("markers", "kernel_says(*patterns): dom0's kernel may complain so in this test")
    config.addinivalue_line("markers", "xen_says(*patterns): the hypervisor may complain so in this test")
    config.addinivalue_line("markers", "xl_waits: no service runs in this test, so that xl may wait for a time-out")
    config.addinivalue_line("markers", "needs_host(share): the part of the CPU time that it wants which it must get")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record when a test begins, and what it needs of the host."""
    item.stash[_began] = service.now()
    item.user_properties += [(NEEDS, each.args[0]) for each in item.iter_markers(NEEDS)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failure what the service has logged since, what it says of its disks, and the backends; each guest
    prints where its tasks are, the blocked ones first, and its timers.
    """
    report = yield
    if report.failed and _began in item.stash:
        for name in names():
            for key in "8wtq":  # at this level also one that was started with "quiet"; all tasks, and timers
                run("xl", "sysrq", name, key, check=False)
        report.sections.append(("the service's journal", service.journal(item.stash[_began])))
        report.sections.append(("its disks", run("xenbackend", "status", "--json", check=False).out))
        nodes = xenstore.tree("/local/domain/0/backend")
        report.sections.append(("backends", "\n".join(f"{path} = {value}" for path, value in nodes.items())))
    return report


@pytest.fixture(scope="session", autouse=True)
def _suite_leaves_nothing() -> Iterator[None]:
    """At the end nothing is left of the fixtures that all tests share."""
    before = leaks.snapshot()
    assert before["descriptor of the service"], "the service's descriptors are not seen"
    yield
    _fail_if(leaks.wait_until_same(before))


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves the host as it found it, with no complaint in the kernel's or hypervisor's log; xl never waits.

    What a fixture of a wider scope made before the test is not counted.
    """
    kernel, xen, before = KernelLog(), XenLog(), leaks.snapshot()
    xl_has_waited.clear()
    yield
    waits = [] if request.node.get_closest_marker("xl_waits") else [f"waited: {each}" for each in xl_has_waited]
    left = leaks.wait_until_same(before)
    complaints = kernel.complaints(_patterns(request, "kernel_says")) + xen.complaints(_patterns(request, "xen_says"))
    kernel.close()
    _fail_if(left + waits + [f"complaint: {line}" for line in complaints])


def _fail_if(sentences: list[str]) -> None:
    if sentences:
        pytest.fail("\n".join(sentences), pytrace=False)


def _patterns(request: pytest.FixtureRequest, marker: str) -> list[str]:
    return [pattern for each in request.node.iter_markers(marker) for pattern in each.args]


@pytest.fixture
def the_service() -> Service:
    """The running service; a test that leaves it in a bad state does not make the next one fail."""
    the_service = Service()
    if not the_service.is_active():
        the_service.restart()
    return the_service


@pytest.fixture
def new_guest(on_tmpfs: Path, on_ext4: Path) -> Iterator[NewGuest]:
    """Return a function like `Guest`; the guests that it made are destroyed after the test.

    The images outlive them: xl's own script for `file:` releases a loop device only while its file is there.
    """
    made: list[Guest] = []

    def new(**configuration: object) -> Guest:
        made.append(Guest(**configuration))
        return made[-1]

    yield new
    for guest in made:
        _end(guest)


@pytest.fixture(scope="module")
def linux() -> Iterator[Guest]:
    """A running Linux guest without disks that the tests of a module share: they attach, use and detach."""
    guest = Guest().create().wait_until_ready()
    yield guest
    _end(guest)


def _end(guest: Guest) -> None:
    if guest.domid:
        guest.destroy()
        until(f"{guest.name} is gone", lambda: not guest.is_there())


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    """A directory in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


@pytest.fixture
def on_ext4() -> Iterator[Path]:
    """A directory on dom0's disk, where O_DIRECT works."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield place
    shutil.rmtree(place)
