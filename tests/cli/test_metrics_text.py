"""The text that a monitor reads, checked with tools that read it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from tests.answering import DISK, LAYER, typed_disk, typed_service
from xenbackend.cli.metrics_text import of_nobody, of_service, text
from xenbackend.client import Disk

SERVICE = typed_service(version="0.2.0", since=1.5, breaches=2)
COUNTERS = {
    "reads": 7, "writes": 6, "flushes": 5, "discards": 4, "read_bytes": 3, "written_bytes": 2, "errors": 1,
    "guest_errors": 8, "in_flight": 9,
}  # fmt: skip


def disk(**known: Any) -> Disk:
    """Return a disk as `status` describes it."""
    layers = [{**LAYER, "text": "throttle:iops=5", "figures": {"held": 4}}]
    return typed_disk(**{"counters": COUNTERS, "layers": layers, **known})


def lines(*disks: Disk, is_openmetrics: bool = False) -> list[str]:
    """Return the lines of the text that are not comments."""
    written = text(of_service(SERVICE, disks), is_openmetrics=is_openmetrics)
    return [line for line in written.splitlines() if not line.startswith("#")]


def test_what_status_says_is_in_it() -> None:
    """Every figure of the service and of a disk has a line, with the disk and its guest as labels."""
    buckets = [0] * 48
    buckets[13], buckets[47] = 2, 1
    timed = {**DISK["latency_by_operation"], "write": {"sum_ns": 5_000_000_000, "buckets": buckets}}
    found = lines(disk(latency_by_operation=timed, reason="storage", waits_s=2.5, waits_for="storage"))
    of_it = 'disk="5/xvda",guest="mail"'

    assert {
        "xenbackend_up 1", 'xenbackend_info{version="0.2.0"} 1', "xenbackend_start_time_seconds 1.5",
        "xenbackend_breaches_total 2", "xenbackend_bugs_total 0", f'xenbackend_disk_served{{{of_it}}} 0',
        f'xenbackend_disk_reason{{{of_it},reason="storage"}} 1',
        f'xenbackend_disk_wait_seconds{{{of_it},for="storage"}} 2.5',
        f'xenbackend_disk_wait_seconds{{{of_it},for="key"}} 0',
        f'xenbackend_disk_requests_total{{{of_it},operation="read"}} 7',
        f'xenbackend_disk_requests_total{{{of_it},operation="write"}} 6',
        f'xenbackend_disk_requests_total{{{of_it},operation="flush"}} 5',
        f'xenbackend_disk_requests_total{{{of_it},operation="discard"}} 4',
        f'xenbackend_disk_bytes_total{{{of_it},operation="read"}} 3',
        f'xenbackend_disk_bytes_total{{{of_it},operation="write"}} 2', f"xenbackend_disk_errors_total{{{of_it}}} 1",
        f"xenbackend_disk_guest_errors_total{{{of_it}}} 8", f"xenbackend_disk_in_flight{{{of_it}}} 9",
        f'xenbackend_disk_latency_seconds_bucket{{{of_it},operation="write",le="4.096e-06"}} 0',
        f'xenbackend_disk_latency_seconds_bucket{{{of_it},operation="write",le="8.192e-06"}} 2',
        f'xenbackend_disk_latency_seconds_bucket{{{of_it},operation="write",le="34.359738368"}} 2',
        f'xenbackend_disk_latency_seconds_bucket{{{of_it},operation="write",le="+Inf"}} 3',
        f'xenbackend_disk_latency_seconds_sum{{{of_it},operation="write"}} 5',
        f'xenbackend_disk_latency_seconds_count{{{of_it},operation="write"}} 3',
        f'xenbackend_disk_latency_seconds_count{{{of_it},operation="read"}} 0',
        f'xenbackend_layer_figure{{{of_it},layer="0",driver="throttle",figure="held"}} 4',
    } <= set(found)  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("paused", True), ("needs_upgrade", True), ("restarts", 1)])
def test_each_fact_has_its_own_line(key: str, value: int) -> None:
    """A fact about one disk changes only that fact's line for that disk."""
    names = {"paused": "disk_paused", "needs_upgrade": "disk_needs_upgrade", "restarts": "disk_restarts_total"}
    found = lines(disk(), disk(vbd="6/xvda", guest="web", **{key: value}))

    for each, name in names.items():
        assert f'xenbackend_{name}{{disk="5/xvda",guest="mail"}} 0' in found
        assert f'xenbackend_{name}{{disk="6/xvda",guest="web"}} {int(each == key)}' in found


def test_every_disk_has_its_counters() -> None:
    """Every disk has all counters, by operation."""
    found = lines(disk(), disk(vbd="6/xvda", guest="web", counters={**COUNTERS, "reads": 70}))

    assert 'xenbackend_disk_requests_total{disk="5/xvda",guest="mail",operation="read"} 7' in found
    assert 'xenbackend_disk_requests_total{disk="6/xvda",guest="web",operation="read"} 70' in found
    assert 8 == len([line for line in found if line.startswith("xenbackend_disk_requests_total{")])


def test_layers_of_one_kind_are_told_apart() -> None:
    """Layers of the same kind are told apart by their number in the chain, from the guest's end down."""
    layers = [{"layer": "throttle:iops=5", "figures": {"held": count}} for count in (4, 5)]
    found = [line for line in lines(disk(layers=layers)) if "layer_figure" in line]
    labels = 'disk="5/xvda",guest="mail",layer="{}",driver="throttle",figure="held"'

    assert [f"xenbackend_layer_figure{{{labels.format(place)}}} {4 + place}" for place in (0, 1)] == found


def test_what_is_told_as_words() -> None:
    """Each disk's texts are labels of one line, including its worker's version as `version`."""
    [info] = [line for line in lines(disk(worker_version="0.3.0")) if "disk_info" in line]

    assert info.endswith('node="vbd/5/51712",chain="log:|aio:/img",state="Connected",version="0.3.0"} 1')


def test_a_service_that_tells_little_or_nothing() -> None:
    """An older service has no start time, which is shown as 0; if no service answers, `xenbackend_up` is 0."""
    older = text(of_service(typed_service(since=None), []), is_openmetrics=False)

    assert "\nxenbackend_start_time_seconds 0\n" in older
    assert text(of_nobody(), is_openmetrics=False).endswith("\nxenbackend_up 0\n")


def test_a_disk_that_is_served_has_no_reason() -> None:
    """A disk in service has no line for a reason; a paused disk is not served, but a pause is not a reason either."""
    assert 'xenbackend_disk_served{disk="5/xvda",guest="mail"} 1' in lines(disk())
    assert 'xenbackend_disk_served{disk="5/xvda",guest="mail"} 0' in lines(disk(paused=True))
    assert [] == [line for line in lines(disk(), disk(paused=True)) if "disk_reason" in line]


def test_words_of_others_stay_within_their_quotes() -> None:
    """A chain or a guest's name, whatever it contains, cannot end a label or begin a line."""
    found = lines(disk(guest='a"} 1\nxenbackend_up 0', chain="aio:\\x"))

    assert "xenbackend_up 0" not in found
    assert r'guest="a\"} 1\nxenbackend_up 0"' in "".join(found)
    assert r'chain="aio:\\x"' in "".join(found)


def test_the_two_formats_differ_as_they_should() -> None:
    """OpenMetrics declares a counter without its suffix and ends with an EOF line; the samples are the same."""
    plain, other = (text(of_service(SERVICE, [disk()]), is_openmetrics=each) for each in (False, True))

    assert lines(disk()) == lines(disk(), is_openmetrics=True)
    assert "# TYPE xenbackend_bugs_total counter\n" in plain
    assert "# TYPE xenbackend_bugs counter\n" in other
    assert other.endswith("\n# EOF\n")
    assert "# EOF" not in plain


@pytest.mark.parametrize("disks", [[], [disk()], [disk(), disk(vbd="6/xvda", guest='"\\\n', reason="halted")]])
def test_promtool_finds_no_fault(disks: list[Disk]) -> None:
    """Prometheus's own tool reads the text and has no complaint about names, types or units."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    for families in (of_service(SERVICE, disks), of_nobody()):
        written = text(families, is_openmetrics=False)
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=written, capture_output=True, text=True, check=False
        )

        assert (0, "", "") == (checked.returncode, checked.stdout, checked.stderr)
