"""`xenbackend top` on a real terminal, and into a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, Control, answering, working
from xenbackend.cli import top
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

pytestmark = pytest.mark.slow
PATIENCE_S = 30.0
PROGRAM = (sys.executable, "-m", "xenbackend", "top")
_PLACE = re.compile(r"\x1b\[(\d+);(\d+)H")
_STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
DISKS = [
    {**deepcopy(DISK), "layers": [{"layer": "throttle:iops=1", "figures": {"held": 7}}]},
    {**deepcopy(DISK), "vbd": "6/xvdb", "node": "vbd/6/51728", "domid": 6, "guest": "web", "chain": "ram:1G"},
]


class Service:
    """A service whose two disks count up with each look; once `hangs` is set, it does not answer."""

    def __init__(self) -> None:
        self.hangs = False
        self.looks = 0
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> Answer | None:
        """Answer as the service does."""
        if self.hangs:
            return None
        if request["verb"] != "status":
            return working(request)
        with self._lock:
            self.looks += 1
            disks = deepcopy(DISKS)
            for number, disk in enumerate(disks, 1):
                disk["counters"]["reads"] += 1000 * number * self.looks
                disk["counters"]["latency_samples"] += self.looks
                disk["counters"]["latency_ns"] += 100_000 * self.looks
                disk["latency_histogram"][17] += self.looks
        return Answer(Code.OK, disks)


# Without the size of another terminal, which each process of a parallel run finds in its environment.
_ENV = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


class Screen:
    """A terminal of some size with the program in it, and what it shows."""

    def __init__(self, control: str, size: tuple[int, int], *words: str, **environment: str) -> None:
        self.rows: dict[int, str] = {}
        self.said = ""
        self.fd, far = os.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(far)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *PROGRAM, "--interval", "1", "--socket", control, *words],
            stdin=far, stdout=far, stderr=far,
            env={**_ENV, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8", **environment},
        )  # fmt: skip
        self.far = far

    def resize(self, columns: int, lines: int) -> None:
        """Change the terminal's size."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.fd, keys.encode())

    @property
    def text(self) -> str:
        """The text on the screen."""
        return "\n".join(self.rows[number].rstrip() for number in sorted(self.rows))

    def wait(self, is_there: Callable[[str], bool]) -> str:
        """Wait until the screen matches. Raises: AssertionError, with the last screen."""
        end = time.monotonic() + PATIENCE_S
        while not is_there(self.text):
            assert time.monotonic() < end, f"{self.text}\n{self.said[-500:]!r}"
            if select.select([self.fd], [], [], 0.5)[0]:
                self._take(os.read(self.fd, 1 << 16).decode(errors="replace"))
        return self.text

    def frames(self, seconds: float) -> int:
        """Return how many frames are drawn within that time."""
        end = time.monotonic() + seconds
        count = 0
        while (left_s := end - time.monotonic()) > 0:
            if select.select([self.fd], [], [], left_s)[0]:
                count += os.read(self.fd, 1 << 16).count(b"\x1b[1;1H")
        return count

    def end(self) -> int:
        """Wait for the program's end, and return its exit status."""
        while self.process.poll() is None:
            if select.select([self.fd], [], [], 0.1)[0]:
                self._take(os.read(self.fd, 1 << 16).decode(errors="replace"))
        while select.select([self.fd], [], [], 0)[0]:
            self._take(os.read(self.fd, 1 << 16).decode(errors="replace"))
        return self.process.returncode

    def _take(self, text: str) -> None:
        self.said += text
        whole, self.said = self.said, self.said[-4096:]
        places = list(_PLACE.finditer(whole))
        for here, following in zip(places, [*places[1:], None], strict=False):
            line = whole[here.end() : following.start() if following else len(whole)]
            self.rows[int(here[1])] = _STYLE.sub("", line)


@pytest.fixture
def service() -> Service:
    """The service that answers."""
    return Service()


@pytest.fixture
def control(tmp_path: Path, service: Service) -> Iterator[Control]:
    """Its control socket."""
    with answering(tmp_path / "x", service.answer) as made:
        yield made


@contextmanager
def screen(control: Control, size: tuple[int, int] = (160, 12), *words: str, **environment: str) -> Iterator[Screen]:
    """Run the program in a terminal until the block ends."""
    made = Screen(control.path, size, *words, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.fd)
        os.close(made.far)


def order(text: str) -> list[str]:
    """Return the disks of a screen in their order."""
    return re.findall(r"^(\d/xvd[ab])", text, re.MULTILINE)


def test_a_session(control: Control) -> None:
    """Rates appear with the second look; keys sort, filter, show layers and quit; then the terminal is restored."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        shown.wait(lambda text: "█" in text and re.search(r"5/xvda .* 1\d{3} |5/xvda .* \d{3,4} ", text) is not None)
        shown.type("sss")  # guest, state, reads
        shown.wait(lambda text: "by reads" in text and order(text) == ["6/xvdb", "5/xvda"])
        shown.type("r")
        shown.wait(lambda text: "by reads, reversed" in text and order(text) == ["5/xvda", "6/xvdb"])
        shown.type("l")
        shown.wait(lambda text: "throttle:iops=1  [held 7]" in text)
        shown.type("/we")
        shown.wait(lambda text: "filter: we_" in text and order(text) == ["6/xvdb"])
        shown.type("\x1b")
        shown.wait(lambda text: len(order(text)) == 2 and "filter" not in text.splitlines()[-1].partition("quit")[0])
        shown.type("q")
        status = shown.end()
        after = termios.tcgetattr(shown.far)

    assert 0 == status
    assert shown.before == after
    assert shown.said.endswith(("\x1b[?25h\x1b[?1049l", "\x1b[?1049l\x1b[?25h")), shown.said[-60:]


def test_any_size_and_another_one_meanwhile(control: Control) -> None:
    """The screen fits into 20 by 5, and into another size as soon as the terminal has it."""
    with screen(control, (20, 5)) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        assert max(shown.rows) <= 5
        assert all(len(row) <= 20 for row in shown.rows.values())
        shown.resize(130, 30)
        shown.process.send_signal(signal.SIGWINCH)
        shown.wait(lambda text: "log:|aio:/img" in text and "q quit" in text)
        assert 30 == max(shown.rows)
        assert shown.frames(1.0) < 10  # it does not redraw all the time


def test_a_service_that_hangs_takes_no_keys_away(control: Control, service: Service) -> None:
    """If the service hangs, the last picture stays with a note, and `q` still quits."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        service.hangs = True
        shown.wait(lambda text: "the service has not answered for" in text and "5/xvda" in text)
        shown.type("q")
        assert 0 == shown.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminal_gets_back_what_it_had(control: Control, number: signal.Signals) -> None:
    """Whichever signal ends the program, the terminal is restored."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        shown.process.send_signal(number)
        status = shown.end()
        after = termios.tcgetattr(shown.far)

    assert (0 if number == signal.SIGINT else 128 + number) == status
    assert shown.before == after
    assert "\x1b[?1049l" in shown.said[-60:]


def test_a_suspended_view_comes_back(control: Control) -> None:
    """Ctrl-Z restores the terminal; `fg` draws the screen again."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        shown.process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, shown.process.pid, os.WSTOPPED | os.WNOWAIT)
        stopped = termios.tcgetattr(shown.far)
        shown.rows.clear()
        while select.select([shown.fd], [], [], 0.1)[0]:
            os.read(shown.fd, 1 << 16)
        shown.process.send_signal(signal.SIGCONT)
        shown.wait(lambda text: "5/xvda" in text)
        shown.type("q")
        assert (0, shown.before) == (shown.end(), stopped)


def test_where_nothing_can_be_drawn(control: Control) -> None:
    """Without a known kind of terminal, the error names the way for scripts."""
    with screen(control, TERM="dumb") as shown:
        assert 2 == shown.end()
        assert "nothing can be drawn there; use --once" in shown.said


def test_a_disk_that_is_not_there_is_told_at_once(control: Control) -> None:
    """An unknown disk ends the program at once, with status 2."""
    with screen(control, (160, 12), "9/xvda") as shown:
        assert 2 == shown.end()
        assert "there is no disk 9/xvda in service" in shown.said


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that were printed."""
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace sleeping by a clock that moves on by a second."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(top.time, "monotonic", lambda: float(len(slept)))
    return slept


def test_once_for_scripts(control: Control, capsys: pytest.CaptureFixture[str], no_time: list[float]) -> None:
    """`--once` prints one interval: a line for each disk below the headings, and its layers below it on request."""
    assert 0 == main(["top", "--once", "--layers", "--interval", "3", "--socket", control.path])
    heading, first, layer, second = lines(capsys)

    assert [3.0] == no_time
    assert list(top.COLUMNS) == heading.split()
    assert [
        "5/xvda",
        "mail",
        "Connected",
        "1000",
        "0",
        "0",
        "0",
        "0",
        "100",
        "131",
        "3",
        "log:|aio:/img",
    ] == first.split()
    assert "0  throttle:iops=1  [held 7]" == layer.strip()
    assert "2000" == second.split()[3]


def test_json_has_the_rates_worked_out(
    control: Control, capsys: pytest.CaptureFixture[str], no_time: list[float]
) -> None:
    """JSON has one object for each interval, with the disks in the requested order and filtered as requested."""
    assert 0 == main(["top", "--json", "--count", "2", "--sort", "reads", "--socket", control.path])
    assert 0 == main(["top", "--json", "--once", "--filter", "web", "--socket", control.path])
    first, second, only = map(json.loads, lines(capsys))

    assert ["6/xvdb", "5/xvda"] == [each["vbd"] for each in first["vbds"]]
    assert [2000.0, 1000.0] == [each["reads_per_s"] for each in second["vbds"]]
    assert ["6/xvdb"] == [each["vbd"] for each in only["vbds"]]


def test_a_reader_who_has_seen_enough_ends_it(control: Control) -> None:
    """Output into `head` is written at once, and ends silently when `head` has gone."""
    command = f"{' '.join(PROGRAM)} --interval 1 --socket {control.path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)

    assert ("disk", "") == (result.stdout.split()[0], result.stderr)


@pytest.mark.parametrize("word", ["0", "-1", "many"])
def test_a_number_of_intervals_is_one(word: str) -> None:
    """A number of intervals that is not a positive integer is refused."""
    with pytest.raises(SystemExit) as end:
        main(["top", f"--count={word}"])

    assert 2 == end.value.code


def test_keys_change_the_interval() -> None:
    """Keys change the interval by fixed steps within bounds; from a value between two steps to the next step."""
    assert [2.0, 1.0, 60.0, 10.0] == [
        top._other_interval(now, step) for now, step in ((1.0, 1), (1.0, -1), (60.0, 1), (4.0, 1))
    ]
