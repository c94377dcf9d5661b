"""The host's side of the test bed for a real Xen (`tests/xen/bed`): what it needs, and what it shows."""

from __future__ import annotations

import fcntl
import io
import json
import lzma
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from rich.console import Console

from tests.ci import flaky
from tests.interruption import INTERRUPTED
from tests.until import until
from tests.xen.bed import machine, parcel, portions, recipe
from tests.xen.bed.__main__ import BROKEN, main
from tests.xen.bed.again import FAILED, PASSED, repeat
from tests.xen.bed.boot import Machine, command
from tests.xen.bed.progress import Progress
from tests.xen.bed.release import DECOMPRESS, NEWEST, RELEASES
from tests.xen.bed.report import Failure, Report
from tests.xen.bed.session import DIED, NO_TESTS, together
from tests.xen.bed.share import Given, Watch
from tests.xen.tools.counts import GRANT_TABLE_OP, HYPERCALL, LOST, SUBCALL, hypercalls, notifications, system_calls


def test_each_release_has_an_image_of_its_own() -> None:
    """Each release has its own image in the cache, and a changed line in the table gives another image."""
    names = [recipe.name_of(each) for each in RELEASES.values()]
    names.append(recipe.name_of(replace(NEWEST, packages=(*NEWEST.packages, "ssh"))))

    assert len(RELEASES) + 1 == len({*names})
    assert names[0].rpartition("-")[0] == names[-1].rpartition("-")[0] == f"image-{NEWEST.xen}"


@pytest.mark.parametrize(("how", "compress"), [("", bytes), ("xz", lzma.compress), ("zstd", zstandard.compress)])
def test_the_kernel_in_a_bzimage(how: str, compress: Callable[[bytes], bytes]) -> None:
    """The payload is found by the fields of the header, and bytes behind the stream do no harm."""
    elf, sectors = b"\x7fELF" + bytes(range(256)), 2
    stored = compress(elf) + (struct.pack("<I", len(elf)) if how else b"")
    image = bytearray(512 * (sectors + 1) + 64)
    image[0x1F1] = sectors
    struct.pack_into("<II", image, 0x248, 64, len(stored))

    assert elf == DECOMPRESS[how](recipe.payload(bytes(image) + stored + b"rest"))


def test_every_release_can_be_unpacked() -> None:
    """There is a function for every compression in the table, and the newest release comes first."""
    assert {word for each in RELEASES.values() for word in (each.kernel, each.modules)} <= DECOMPRESS.keys()
    assert NEWEST == max(RELEASES.values(), key=lambda each: [*map(int, each.xen.split("."))])


@pytest.mark.parametrize(
    ("lacks", "uid", "builds", "says"),
    [
        ("debugfs", 0, False, "not installed: e2fsprogs; try: apt-get install"),
        ("mmdebstrap", 0, True, "not installed: mmdebstrap; try: apt-get install"),
        ("", 1000, True, "only root can build one"),
    ],
)
def test_what_is_missing_is_named(lacks: str, uid: int, says: str, *, builds: bool) -> None:
    """A missing tool is named with its Debian package; root is needed to build an image, not to boot one."""
    assert says in machine.missing(builds=builds, which=lambda tool: None if tool == lacks else tool, uid=uid)


@pytest.mark.parametrize(("uid", "builds", "lacks"), [(0, True, ""), (1000, False, "mmdebstrap")])
def test_nothing_is_missing(uid: int, lacks: str, *, builds: bool) -> None:
    """With an image, nothing that is needed for building is missed."""
    assert "" == machine.missing(builds=builds, which=lambda tool: None if tool == lacks else tool, uid=uid)


@pytest.mark.parametrize(("ci", "options", "status"), [("", [], 0), ("true", [], 1), ("", ["--must"], 1)])
def test_a_machine_that_cannot_is_skipped_or_an_error(
    ci: str, options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Without its tools the bed says why and succeeds; in CI, or with --must, it fails."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "PATH", str(tmp_path))

    assert status == main([*options, "--results", str(tmp_path / "results")])
    assert "no Xen to test on: not installed:" in capsys.readouterr().out


# It fills the pipe before it interrupts, so that its first line has been read by then.
_EMULATOR = """#!/bin/sh
echo '{"event": "start", "test": "test_a"}'
head -c 300000 /dev/zero | tr '\\0' .
kill -INT $PPID
sleep 0.1
kill -INT $PPID
exec sleep 600
"""


def test_an_interruption_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, however often, the bed switches its machines off, keeps their logs, and says so."""
    loader = tmp_path / "xenbackend-xen" / recipe.name_of(NEWEST) / "emulator/usr/lib/x86_64-linux-gnu"
    loader.mkdir(parents=True)
    (loader / "ld-linux-x86-64.so.2").write_text(_EMULATOR)
    (loader / "ld-linux-x86-64.so.2").chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parcel, "pack", _pack_a_log)
    handler = signal.getsignal(signal.SIGINT)

    assert INTERRUPTED == main(["--results", str(tmp_path / "results"), "tests/xen/test_a.py"])
    said = capsys.readouterr().out.splitlines()
    assert ("switched off in test_a" in said[-2], said[-1].split(":")[0]) == (True, "interrupted"), said
    assert "all that it said" == (tmp_path / "results/suite.txt").read_text()
    assert handler is signal.getsignal(signal.SIGINT)


def test_two_runs_have_results_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run does not empty the directory of results that another run is using, and says what to do."""
    (tmp_path / "xenbackend-xen" / recipe.name_of(NEWEST)).mkdir(parents=True)
    (results := tmp_path / "results").mkdir()
    (results / "suite.txt").write_text("of the other one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = os.open(results, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    status = main(["--results", str(results)])
    os.close(other)

    assert (BROKEN, "of the other one") == (status, (results / "suite.txt").read_text())
    assert "error: another run puts its results into" in capsys.readouterr().out


def _pack_a_log(directory: Path, _arguments: Sequence[str]) -> Path:
    """Make the disk on which a machine has left its log."""
    tree, image = directory / "tree/out", directory / "parcel.img"
    tree.mkdir(parents=True)
    (tree / "suite.txt").write_text("all that it said")
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext2", "-d", str(tree.parent), str(image), "1M"],
        env={**os.environ, "PATH": machine.PATH},
        check=True,
        capture_output=True,
    )
    return image


def test_the_image_is_never_written(tmp_path: Path) -> None:
    """Dom0 writes only to snapshots of the images of its root and a driver domain's, and to the parcel."""
    drives = [each for each in command(Machine(tmp_path, tmp_path / "p.img", tmp_path / "c", 1)) if "if=none" in each]

    assert [True, True, False] == ["snapshot=on" in drive for drive in drives]


def shown(*events: dict[str, object] | str, given: Given = Given()) -> tuple[str, Report]:
    """Return what a report prints for these events, and the report; the host gave `given` by the last one."""
    text = io.StringIO()
    console = Console(file=text, width=120)
    report = Report(console, console.status("running"))
    for number, event in enumerate(events, 1):
        so_far = given if number == len(events) else Given()
        report.take(event if isinstance(event, str) else json.dumps(event), so_far)
    return text.getvalue(), report


def ended(outcome: str, text: str = "", needs: float = 0.5) -> dict[str, object]:
    """Return the event of a test that ended."""
    head = {"event": "end", "test": "tests/xen/test_a.py::test[1]", "outcome": outcome, "seconds": 1.5}
    return {**head, "text": text, "reason": text, "needs": needs}


def test_each_test_has_a_line() -> None:
    """A passed test is a line, a skipped one gives its reason, and a failed one everything."""
    text, _ = shown(ended("passed"), ended("skipped", "no device"), ended("failed", "assert [1] == [2]"))

    assert [
        "ok      1.5 s  tests/xen/test_a.py::test[1]",
        "skip    1.5 s  tests/xen/test_a.py::test[1]  no device",
        "FAIL    1.5 s  tests/xen/test_a.py::test[1]",
        "the host gave 100% of the CPU time; 50% are needed",
        "assert [1] == [2]",
    ] == text.splitlines()


def test_the_status_is_what_dom0_says() -> None:
    """Without a status from dom0 there is none, and the running test is named; noise is ignored."""
    began = {"event": "start", "test": "test_a"}

    assert (None, "test_a") == (shown(began, "[ 12.0] Oops [0]\n")[1].status, shown(began)[1].running)
    assert (1, "") == (shown(began, ended("failed"), {"event": "exit", "status": 1})[1].status, "")


def test_a_failure_says_what_the_host_gave() -> None:
    """A failure has the share of the CPU time wanted that the machine got in the test, and whether it was enough."""
    began = {"event": "start", "test": "test_a"}
    _, report = shown(began, ended("failed", "timed out", needs=0.8), given=Given(9.0, ran_s=6.0, waited_s=4.0))

    assert [Failure("tests/xen/test_a.py::test[1]", "timed out", 0.6, 0.8)] == report.failures
    assert report.failures[0].is_the_hosts


_LOOP = """
import os
os.sched_setaffinity(0, [{cpu}])
print(flush=True)
while True:
    pass
"""


def test_what_a_test_needs_is_told(tmp_path: Path) -> None:
    """Dom0 reports the share that a test needs, by its mark or one half, and the first line of its error."""
    for marked, needs in (([("needs_host", 0.7)], 0.7), ([], 0.5)):
        file = tmp_path / "channel"
        with file.open("wb") as channel:
            progress = Progress(channel.fileno())
            failed = pytest.TestReport(
                "test_a", ("a.py", 1, "test_a"), {}, "failed", "boom\nmore", "call", user_properties=marked
            )
            progress.pytest_runtest_logreport(failed)
            progress.pytest_runtest_logfinish("test_a")
        _, report = shown(*file.read_text().splitlines(), given=Given(9.0, ran_s=6.0, waited_s=4.0))

        assert [Failure("test_a", "boom", 0.6, needs)] == report.failures
        assert (needs > 0.6) == report.failures[0].is_the_hosts


def test_time_that_a_neighbour_took_does_not_pass() -> None:
    """A process's own time stands still while it waits for a CPU that others use, but passes while it sleeps."""
    program = _LOOP.format(cpu=min(os.sched_getaffinity(0)))
    loops = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(4)]
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.read(1)
        until(lambda: _does(sleeper.pid) == ("sleep", "S"), "it does not sleep")
        began, watches = time.monotonic(), [Watch(each.pid) for each in (loops[0], sleeper)]
        before, within = [watch.look() for watch in watches], time.monotonic()
        select.select([], [], [], 1.0)
        slept_s, slept = time.monotonic() - within, watches[1].look()
        # The kernel counts waiting time when it is over; on a busy host the current wait can be long.
        until(lambda: watches[0].look().own_s - before[0].own_s < 0.6 * (time.monotonic() - began), "it never waited")
        share = watches[0].look().share_since(before[0])
    finally:
        for each in (*loops, sleeper):
            each.kill()
            each.communicate()

    assert slept.own_s - before[1].own_s > 0.9 * slept_s
    assert share < 0.6
    assert Given().share_since(Given()) == 1.0


def _does(pid: int) -> tuple[str, str]:
    """Return a process's name and what it is doing (proc_pid_stat(5))."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    return name, rest.split()[0]


def failure(test: str, share: float = 1.0) -> Failure:
    """Return a failure; it is the host's if the share is below one half."""
    return Failure(test, "no", share, 0.5)


HOSTS = "repeated, as the host gave"


@pytest.mark.parametrize(
    ("first", "then", "status", "left", "says"),
    [
        ([failure("a")], [(PASSED, [])], PASSED, [], ["passed again: a: no", "  known"]),
        ([failure("b")], [(PASSED, [])], PASSED, [], ["failed once and passed again: b: no", "  it is not in"]),
        (
            [failure("a"), failure("b")],
            [(PASSED, [])],
            FAILED,
            [],
            ["a", "known", "b", "not in", "2 such tests"],
        ),
        ([failure("a")], [(FAILED, [failure("a")])], FAILED, ["a"], []),
        ([failure("a"), failure("b", 0.3)], [(FAILED, [failure("a")])], FAILED, ["a"], [f"{HOSTS} 30%"]),
        ([failure("b", 0.3)], [(FAILED, [failure("b", 0.2)]), (PASSED, [])], PASSED, [], [f"{HOSTS} 20%"]),
        ([failure("b", 0.3)], [(FAILED, [failure("b", 0.2)])] * 2, FAILED, ["b"], []),
        ([failure("b", 0.3)], [(DIED, [])], DIED, ["b"], []),
    ],
    ids=["known", "unknown", "two", "fails again", "one of each", "the host's, twice", "always", "the machine died"],
)
def test_what_failed_is_run_again(
    first: list[Failure], then: list[tuple[int, list[Failure]]], status: int, left: list[str], says: list[str]
) -> None:
    """A test that passes when repeated is reported, and one is forgiven; one without CPU time gets two more tries."""
    asked: list[list[str]] = []
    answers = iter(then)

    def boot(tests: Sequence[str], _number: int) -> tuple[int, list[Failure]]:
        asked.append(list(tests))
        return next(answers)

    outcome = repeat(first, boot, {"a": "known"})

    assert (status, left) == (outcome.status, [each.test for each in outcome.failures])
    assert [] == [said for said, line in zip(says, outcome.lines, strict=True) if said not in line]
    assert [each.test for each in first] == asked[0]
    assert next(answers, None) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_make_a_whole(count: int) -> None:
    """Each file is in one part, and the core in each; no part takes 1.5 times as long as another."""
    root = Path(__file__).parents[1]
    files = {f"tests/xen/{file.name}" for file in (root / "tests/xen").glob("test_*.py")}
    whole_files = {each for each in portions.CORE if "::" not in each}
    times = [sum(portions.SECONDS[file] for file in share) for share in portions.shares(count)]

    assert sorted(files - whole_files) == sorted(file for share in portions.shares(count) for file in share)
    for number in range(1, count + 1):
        part = portions.part(number, count)
        assert len(part) == len(set(part))
        assert set() == {each for each in portions.CORE if not {each, each.partition("::")[0]} & set(part)}
    assert max(times) < 1.5 * min(times)


@pytest.mark.parametrize("test", [*[each for each in portions.CORE if "::" in each], *flaky.known()])
def test_tests_that_are_named_are_there(test: str) -> None:
    """The core and the list of tests that failed by chance name existing tests."""
    file, _, name = test.partition("::")

    assert f"\ndef {name.partition('[')[0]}(" in (Path(__file__).parents[1] / file).read_text()


def test_two_machines_share_what_is_run() -> None:
    """Every test is on one of the two machines, which take about equally long."""
    for tests in (list(portions.WHOLE), *(portions.part(number, 8) for number in range(1, 9))):
        first, second = portions.halves(tests)
        times = [sum(portions.SECONDS.get(test, 30) for test in half) for half in (first, second)]

        assert sorted(tests) == sorted(first + second)
        assert max(times) - min(times) <= max(portions.SECONDS.get(test, 30) for test in tests)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([PASSED, PASSED], PASSED),
        ([PASSED, FAILED], FAILED),
        ([FAILED, DIED], DIED),
        ([PASSED, NO_TESTS], PASSED),
        ([FAILED, NO_TESTS], FAILED),
        ([NO_TESTS, NO_TESTS], NO_TESTS),
    ],
)
def test_the_worst_machine_counts(statuses: list[int], status: int) -> None:
    """All machines have to pass; one without tests counts only if no other has any."""
    assert status == together(statuses)


def _record(event: int, *words: int, time: int | None = None) -> bytes:
    """Return a record of xentrace: `event`, `time` if it has one, and other words."""
    head = event | len(words) << 28 | (time is not None) << 31
    return (
        struct.pack("<I", head)
        + (b"" if time is None else struct.pack("<Q", time))
        + struct.pack(f"<{len(words)}I", *words)
    )


def test_hypercalls_are_counted() -> None:
    """Each record of a hypercall counts, by its number, with a time or without; other records do not."""
    argument = 1 << 20  # above the number: which arguments follow
    trace = (
        _record(HYPERCALL, GRANT_TABLE_OP | argument, 5, 6, time=1 << 40)
        + _record(0x0020_1001, HYPERCALL, GRANT_TABLE_OP, time=2)
        + _record(SUBCALL, GRANT_TABLE_OP)
        + _record(HYPERCALL, 29, time=3)
        + _record(0x0001_F003)
    )

    assert {GRANT_TABLE_OP: 2, 29: 1} == hypercalls(trace)
    assert {} == hypercalls(b"")


def test_lost_records_are_an_error() -> None:
    """A trace with lost records is refused, since it would count too few."""
    trace = _record(HYPERCALL, GRANT_TABLE_OP, time=1) + _record(LOST, 7, 0, 0, 0, time=2)
    with pytest.raises(AssertionError, match="lost records"):
        hypercalls(trace)


_INTERRUPTS = """\
            CPU0       CPU1
  24:       100          1  xen-dyn    -event     xenbus
  25:         7          3  xen-dyn    -event     evtchn:xb 5/xvda
  26:        20          0  xen-dyn    -event     evtchn:qemu-system-i38
  27:        30          0  xen-dyn    -event     evtchn:xenstored
  28:        40          0  xen-dyn    -event     evtchn:oxenstored
  29:         0          5  xen-dyn    -event     blkif-backend
  30:         6          0  xen-dyn-lateeoi -event     blkif
 NMI:         9          9   Non-maskable interrupts
 ERR:         2
"""


def test_notifications_are_counted() -> None:
    """Those of blkfront, blkback and programs count, also of a program whose name has a space; xenstored's do not."""
    assert 7 + 3 + 20 + 5 + 6 == notifications(_INTERRUPTS)


_HISTOGRAM = """\
# event histogram
#
# trigger info: hist:keys=common_pid,id.syscall:vals=hitcount:sort=hitcount:size=8192 [active]
#

{ common_pid:        412, id: sys_preadv2                   [327] } hitcount:         56
{ common_pid:        413, id: sys_preadv2                   [327] } hitcount:          4
{ common_pid:        412, id: sys_epoll_wait                [232] } hitcount:          3
{ common_pid:       4120, id: sys_write                     [  1] } hitcount:          9

Totals:
    Hits: 72
"""


def test_system_calls_are_counted() -> None:
    """Those of the threads that were asked for count, by the name of the call."""
    assert {"preadv2": 60, "epoll_wait": 3} == system_calls(_HISTOGRAM, {"412", "413"})
