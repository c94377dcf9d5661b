"""Options of all tests, and fixtures that each of them may use."""

from __future__ import annotations

import gc
from zlib import crc32

import pytest

from tests import figures
from tests.part import Part
from xenbackend import settings_file
from xenbackend.image import session

_LONGEST_VALUE = 200  # characters or bytes of a parameter that become a part of its test's name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options that let random tests run longer, or repeat them."""
    parser.addoption("--requests", type=int, default=10_000, help="requests of tests against a model of the disk")
    parser.addoption("--long", action="store_true", help="run what takes minutes, too")
    parser.addoption("--part", type=Part.parse, metavar="K/N", help="only the K-th of N parts of what would be run")
    parser.addoption("--seed", type=int, default=1, help="start of random numbers")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a test by length and checksum of a long parameter: names are stored and sent many times."""
    if isinstance(val, str | bytes) and len(val) > _LONGEST_VALUE:
        content = val if isinstance(val, bytes) else val.encode(errors="surrogatepass")
        return f"{len(val)} {'bytes' if isinstance(val, bytes) else 'characters'} {crc32(content):08x}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a part: every N-th test, so that similar tests are spread over the parts."""
    part: Part | None = config.getoption("--part")
    if part:
        chosen = items[part.number - 1 :: part.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_collection_finish() -> None:
    """Spare each garbage collection the scan of thousands of collected tests, which stay anyway."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remove the figures that a test has left before."""
    figures.begin(item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Report failures at once if pytest itself would only report them at the end."""
    if config.pluginmanager.hasplugin("terminalreporter") and config.get_verbosity() <= 0:
        config.pluginmanager.register(TellsAtOnce(config))


class TellsAtOnce:
    """Names each test that fails when it fails, with its error."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a failure on lines of its own; the whole report follows at the end."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else report.longreprtext.strip()).partition("\n")[0]
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {reason}", red=True)


@pytest.fixture
def parents_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The settings of this host allow any file as a parent: for tests that are not about that."""
    path = tmp_path_factory.mktemp("settings") / "xenbackend.toml"
    path.write_text('parents = ["/"]\n')
    monkeypatch.setattr(settings_file, "PATH", path)


@pytest.fixture
def no_wait_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for locks: for tests that know who has an image."""
    monkeypatch.setattr(session, "LOCK_TIMEOUT_S", 0.0)
