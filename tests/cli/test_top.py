"""`xenbackend top` in a terminal, which is a real one, and into a pipe."""

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
    """Says of two disks that they go on and on; of none that it can be asked, once `hangs`."""

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


# Without what says how large another terminal is, as each process of a parallel run is told.
_ENV = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


class Screen:
    """A terminal of some size, the program in it, and what it shows."""

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
        """Have another size."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.fd, keys.encode())

    @property
    def text(self) -> str:
        """The picture."""
        return "\n".join(self.rows[number].rstrip() for number in sorted(self.rows))

    def wait(self, is_there: Callable[[str], bool]) -> str:
        """Wait for a picture. Raises: AssertionError, with the last one."""
        end = time.monotonic() + PATIENCE_S
        while not is_there(self.text):
            assert time.monotonic() < end, f"{self.text}\n{self.said[-500:]!r}"
            if select.select([self.fd], [], [], 0.5)[0]:
                self._take(os.read(self.fd, 1 << 16).decode(errors="replace"))
        return self.text

    def frames(self, seconds: float) -> int:
        """Return how many pictures come within that time."""
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
    """What the service knows."""
    return Service()


@pytest.fixture
def control(tmp_path: Path, service: Service) -> Iterator[Control]:
    """Its control socket."""
    with answering(tmp_path / "x", service.answer) as made:
        yield made


@contextmanager
def screen(control: Control, size: tuple[int, int] = (160, 12), *words: str, **environment: str) -> Iterator[Screen]:
    """Have the program in a terminal, until it ends."""
    made = Screen(control.path, size, *words, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.fd)
        os.close(made.far)


def order(text: str) -> list[str]:
    """Return the disks of a picture in their order."""
    return re.findall(r"^(\d/xvd[ab])", text, re.MULTILINE)


def test_a_session(control: Control) -> None:
    """Rates come with the second look; keys sort, filter, show layers, and end it; the terminal is as it was before."""
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
    """It fits into 20 by 5, and into what that becomes, at once."""
    with screen(control, (20, 5)) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        assert max(shown.rows) <= 5
        assert all(len(row) <= 20 for row in shown.rows.values())
        shown.resize(130, 30)
        shown.process.send_signal(signal.SIGWINCH)
        shown.wait(lambda text: "log:|aio:/img" in text and "q quit" in text)
        assert 30 == max(shown.rows)
        assert shown.frames(1.0) < 10  # it does not go round and round


def test_a_service_that_hangs_takes_no_keys_away(control: Control, service: Service) -> None:
    """What was seen stays, it is said that nobody answers, and `q` ends it."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        service.hangs = True
        shown.wait(lambda text: "the service has not answered for" in text and "5/xvda" in text)
        shown.type("q")
        assert 0 == shown.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminal_gets_back_what_it_had(control: Control, number: signal.Signals) -> None:
    """However it is ended, the next prompt is echoed, and has its cursor."""
    with screen(control) as shown:
        shown.wait(lambda text: "5/xvda" in text)
        shown.process.send_signal(number)
        status = shown.end()
        after = termios.tcgetattr(shown.far)

    assert (0 if number == signal.SIGINT else 128 + number) == status
    assert shown.before == after
    assert "\x1b[?1049l" in shown.said[-60:]


def test_a_suspended_view_comes_back(control: Control) -> None:
    """Ctrl-Z gives the terminal back, and with `fg` the picture is there again."""
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
    """Without a terminal's kind the way for scripts is named."""
    with screen(control, TERM="dumb") as shown:
        assert 2 == shown.end()
        assert "nothing can be drawn there; use --once" in shown.said


def test_a_disk_that_is_not_there_is_told_at_once(control: Control) -> None:
    """Nobody watches an empty screen for it."""
    with screen(control, (160, 12), "9/xvda") as shown:
        assert 2 == shown.end()
        assert "there is no disk 9/xvda in service" in shown.said


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what was printed."""
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A world where nobody sleeps, and where a second has passed since."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(top.time, "monotonic", lambda: float(len(slept)))
    return slept


def test_once_for_scripts(control: Control, capsys: pytest.CaptureFixture[str], no_time: list[float]) -> None:
    """One interval, a line for each disk below the headings, its layers below it where they are wanted."""
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
    """One object for each interval, the disks in the order and with the filter that are wanted."""
    assert 0 == main(["top", "--json", "--count", "2", "--sort", "reads", "--socket", control.path])
    assert 0 == main(["top", "--json", "--once", "--filter", "web", "--socket", control.path])
    first, second, only = map(json.loads, lines(capsys))

    assert ["6/xvdb", "5/xvda"] == [each["vbd"] for each in first["vbds"]]
    assert [2000.0, 1000.0] == [each["reads_per_s"] for each in second["vbds"]]
    assert ["6/xvdb"] == [each["vbd"] for each in only["vbds"]]


def test_a_reader_who_has_seen_enough_ends_it(control: Control) -> None:
    """Into `head` it is written at once, and ends without a word when that has gone."""
    command = f"{' '.join(PROGRAM)} --interval 1 --socket {control.path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)

    assert ("disk", "") == (result.stdout.split()[0], result.stderr)


@pytest.mark.parametrize("word", ["0", "-1", "many"])
def test_a_number_of_intervals_is_one(word: str) -> None:
    """Nothing else is taken for it."""
    with pytest.raises(SystemExit) as end:
        main(["top", f"--count={word}"])

    assert 2 == end.value.code


def test_keys_change_the_interval() -> None:
    """By steps, within bounds; from one that is none of them to the next one."""
    assert [2.0, 1.0, 60.0, 10.0] == [
        top._other_interval(now, step) for now, step in ((1.0, 1), (1.0, -1), (60.0, 1), (4.0, 1))
    ]
