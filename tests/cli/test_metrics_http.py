"""`xenbackend metrics --listen`, read by clients and by a real Prometheus with the rules of the documentation."""

from __future__ import annotations

import json
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.answering import answering, working

DOCS = Path(__file__).parents[2] / "docs/prometheus"
PATIENCE_S = 60.0
pytestmark = pytest.mark.slow


@contextmanager
def serving(control: str) -> Iterator[str]:
    """Serve the metrics of a service at the URL that is yielded, without its path."""
    command = [sys.executable, "-m", "xenbackend", "metrics", "--listen", "127.0.0.1:0", "--socket", control]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().rpartition(" ")[2].strip().removesuffix("/metrics")
        finally:
            server.terminate()
            _, err = server.communicate(timeout=PATIENCE_S)
            assert "Traceback" not in err


def get(url: str, **headers: str) -> tuple[str, str]:
    """Return the type and the text of what is at a URL. Raises: HTTPError."""
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - ours
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310 - to ourselves
        return answer.headers["Content-Type"], answer.read().decode()


def test_each_look_is_of_now(tmp_path: Path) -> None:
    """Each request reads the current figures; if no service answers, the figures say so, and the program goes on."""
    with serving(str(tmp_path / "x")) as url:
        _, before = get(f"{url}/metrics")
        with answering(tmp_path / "x", working):
            plain, during = get(f"{url}/metrics?a=b")
            other, openmetrics = get(f"{url}/metrics", Accept="application/openmetrics-text;version=1.0.0")
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(f"{url}/")
        caught.value.close()

    assert "xenbackend_up 0\n" in before
    assert "xenbackend_up 1\n" in during
    assert 404 == caught.value.code
    assert ("text/plain; version=0.0.4; charset=utf-8", "application/openmetrics-text") == (plain, other.split(";")[0])
    assert openmetrics.endswith("# EOF\n")


def test_a_client_that_says_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    """While one client stays silent in the middle of a request, others are answered, also after it has gone."""
    with answering(tmp_path / "x", working) as control, serving(control.path) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.send(b"GET /met")
            assert "xenbackend_up 1\n" in get(f"{url}/metrics")[1]
            assert not select.select([silent], [], [], 0)[0]  # the server has not hung up on it yet
        assert "xenbackend_up 1\n" in get(f"{url}/metrics")[1]


def test_a_place_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    """A second listener on the same address is refused with a sentence."""
    with answering(tmp_path / "x", working) as control, serving(control.path) as url:
        command = [sys.executable, "-m", "xenbackend", "metrics", "--listen", url.removeprefix("http://")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    assert (2, "") == (done.returncode, done.stdout)
    assert "cannot be listened on: Address already in use" in done.stderr


def test_prometheus_reads_them_and_our_rules(tmp_path: Path) -> None:
    """A real Prometheus, configured as documented, reads the figures and accepts our rules and the dashboard."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed")
    with (
        answering(tmp_path / "x", working) as control,
        serving(control.path) as url,
        prometheus(tmp_path, url) as asked,
    ):
        assert [["5/xvda", "mail", "read", "7"]] == [
            [*(each["metric"][key] for key in ("disk", "guest", "operation")), each["value"][1]]
            for each in until_found(asked, 'xenbackend_disk_requests_total{operation="read"}')
        ]
        for expression in [*expressions(), *(each["expr"] for each in rules(asked))]:
            assert "success" == ask(asked, "query", query=expression)["status"], expression
        states = {each["name"]: each["health"] for each in rules(asked)}

    assert {"XenbackendDown", "XenbackendDiskNotServed", "XenbackendStorageHangs"} <= set(states)
    assert not {name for name, health in states.items() if health == "err"}


@contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[str]:
    """Run a Prometheus that reads figures from `target` each second, and yield its own URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DOCS / "alerts.yml")],
        "scrape_configs": [
            {"job_name": "xenbackend", "static_configs": [{"targets": [target.removeprefix("http://")]}]}
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(configuration))  # YAML takes JSON
    command = [
        "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            yield f"http://127.0.0.1:{port}/api/v1"
        finally:
            process.terminate()


def ask(url: str, what: str, **words: str) -> dict[str, Any]:
    """Return what Prometheus's API answers."""
    try:
        answer: dict[str, Any] = json.loads(get(f"{url}/{what}?{urllib.parse.urlencode(words)}")[1])
    except urllib.error.HTTPError as error:
        with error:
            answer = json.loads(error.read())
    return answer


def until_found(url: str, expression: str) -> list[dict[str, Any]]:
    """Return the result of an expression once there is one."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        try:
            found: list[dict[str, Any]] = ask(url, "query", query=expression)["data"]["result"]
        except (OSError, KeyError, ValueError):  # it is just starting
            continue
        if found:
            return found
    raise AssertionError(f"Prometheus never found {expression}")


def rules(url: str) -> list[dict[str, Any]]:
    """Return the rules that Prometheus has, once each was evaluated."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        found = [each for group in ask(url, "rules")["data"]["groups"] for each in group["rules"]]
        if found and all(each["health"] != "unknown" for each in found):
            return [{**each, "expr": each["query"]} for each in found]
    raise AssertionError("Prometheus never evaluated our rules")


def expressions() -> list[str]:
    """Return the dashboard's expressions with the values that Grafana would substitute."""
    board = json.loads((DOCS / "dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [each.replace("$__rate_interval", "1m").replace("$guest", ".*") for each in found]
