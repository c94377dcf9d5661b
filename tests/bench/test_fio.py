"""fio as a target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from xenbackend.bench.fio import Fio, parse
from xenbackend.bench.plan import SMALLEST, WORKS, BenchError, Sample
from xenbackend.bench.session import bench_file

READ = next(work for work in WORKS if work.name == "rr4k")
WRITE = next(work for work in WORKS if work.name == "sw64k")
SIDE = {
    "total_ios": 1000,
    "runtime": 500,
    "clat_ns": {"percentile": {"50.000000": 10, "99.000000": 20, "99.900000": 30}},
}
JOB = {"usr_cpu": 10.0, "sys_cpu": 40.0, "job_runtime": 500, "write": SIDE}


def test_a_job_in_fios_json() -> None:
    """CPU time is fio's share of the job's time; lines before the JSON are skipped."""
    expected = Sample(1000, 0.5, 0.25, 0.0, 10, 20, 30)

    assert expected == parse("note: something\n" + json.dumps({"jobs": [JOB]}), WRITE)


@pytest.mark.parametrize("output", ["", "{", '{"jobs": []}', '{"jobs": [{}]}'])
def test_what_is_no_job_is_an_error(output: str) -> None:
    """Any other output of fio raises BenchError."""
    with pytest.raises(BenchError, match="not understood"):
        parse(output, WRITE)


def test_a_job_that_did_nothing_is_an_error() -> None:
    """A job without requests, as on a host that gave fio no time, is an error."""
    with pytest.raises(BenchError, match="did not complete a single request"):
        parse(json.dumps({"jobs": [JOB | {"write": SIDE | {"total_ios": 0, "clat_ns": {}}}]}), WRITE)


def test_where_and_how(tmp_path: Path) -> None:
    """Writes stay in the second half; O_DIRECT keeps its depth in flight, and psync has one request at a time."""
    with (tmp_path / "file").open("wb") as file:
        file.truncate(SMALLEST)
    direct = Fio("fio", tmp_path / "file", direct=True, cpu=3).arguments(WRITE, 1, 0.5)
    cached = Fio("fio", tmp_path / "file", direct=False, cpu=None).arguments(READ, 1, 0.5)

    assert {"--rw=write", f"--offset={SMALLEST // 2}", "--iodepth=32", "--direct=1", "--cpus_allowed=3"} <= {*direct}
    assert {"--rw=randread", "--offset=0", "--iodepth=1", "--ioengine=psync", "--runtime=1000ms"} <= {*cached}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_itself(tmp_path: Path) -> None:
    """The installed fio accepts the command line, and its output is understood."""
    with bench_file(tmp_path / "file", SMALLEST):
        sample = Fio("fio", tmp_path / "file", direct=False, cpu=None).measure(READ, 0.1, 0)

    assert sample.requests > 0
    assert 0 < sample.p50 <= sample.p99 <= sample.p999


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_with_a_short_file(tmp_path: Path) -> None:
    """A file that is too short is not extended, and fio's complaint is reported."""
    (tmp_path / "file").write_bytes(bytes(512))
    job = Fio("fio", tmp_path / "file", direct=False, cpu=None)
    with pytest.raises(BenchError, match="fio failed"):
        job.measure(READ, 0.1, 0)

    assert 512 == (tmp_path / "file").stat().st_size
