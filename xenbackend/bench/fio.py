"""fio on the bench file itself: what the machine achieves without any backend, in one process on one CPU.

Must not interpret another program's output.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from xenbackend.bench.plan import BenchError, Sample, Work, half


class Fio:
    """fio as a target, both load generator and backend: psync through the page cache, io_uring with O_DIRECT.

    Its CPU time is that of the whole job.
    """

    def __init__(self, name: str, file: Path, *, direct: bool, cpu: int | None) -> None:
        self.name = name
        self.client = ""
        self._file = file
        self._direct = direct
        self._cpu = cpu

    def measure(self, work: Work, seconds: float, warm_up: float) -> Sample:
        """Run one job. Raises: BenchError if fio is missing or fails."""
        try:
            done = subprocess.run(self.arguments(work, seconds, warm_up), capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise BenchError("the program fio is not installed") from None
        except subprocess.CalledProcessError as error:
            raise BenchError(f"fio failed: {error.stderr.strip() or error.stdout.strip()}") from None
        return parse(done.stdout, work)

    def arguments(self, work: Work, seconds: float, warm_up: float) -> list[str]:
        """Return the command line for one measurement."""
        start, length = half(work, self._file.stat().st_size)
        job = {
            "name": work.name,
            "filename": str(self._file),
            "rw": ("rand" if work.random else "") + ("write" if work.write else "read"),
            "bs": work.length,
            "offset": start,
            "size": length,
            "ioengine": "io_uring" if self._direct else "psync",
            "iodepth": work.depth if self._direct else 1,
            "direct": int(self._direct),
            "invalidate": 0,  # leave the page cache as the other targets find it
            "norandommap": 1,
            "allow_file_create": 0,
            "time_based": 1,
            "runtime": f"{int(seconds * 1000)}ms",
            "ramp_time": f"{int(warm_up * 1000)}ms",
            "output-format": "json",
        }
        if self._cpu is not None:
            job["cpus_allowed"] = self._cpu
        return ["fio", *(f"--{key}={value}" for key, value in job.items())]

    def count_calls(self, _work: Work, _seconds: float, _directory: Path) -> None:
        """Return None: the calls of backend and load generator cannot be separated."""

    def close(self) -> None:
        """Do nothing: no process runs between measurements."""


def parse(output: str, work: Work) -> Sample:
    """Return the sample in fio's JSON output; other messages may precede the JSON. Raises: BenchError."""
    try:
        job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
        side = job["write" if work.write else "read"]
        if not side["total_ios"]:
            raise BenchError(
                "fio did not complete a single request; measure for longer, or on a host that is less busy"
            )
        seconds = side["runtime"] / 1000
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        latency = side["clat_ns"]["percentile"]
        p50, p99, p999 = (int(latency[key]) for key in ("50.000000", "99.000000", "99.900000"))
        return Sample(side["total_ios"], seconds, cpu, 0.0, p50, p99, p999)
    except (KeyError, IndexError, ValueError) as error:
        raise BenchError(f"fio's output was not understood: {error}") from None
