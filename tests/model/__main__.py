"""The model at length: ``python -m tests.model --orders 100000 --seed 1``, or one run of it again: ``--run 17``.

Must not share anything between two runs but the report: each begins with a machine of its own, in a process with the
same hash seed as all others, so that it can be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from tests import places
from tests.model.report import Report

ORDERS_PER_RUN = 250
_BATCH = 8  # runs of one process


def main() -> int:
    """Run, report, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", type=int, help="do this run alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--wrong", default="", help="with this change of the product, which must be found")
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, *sys.orig_argv[1:]]
        return subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False).returncode
    if arguments.runs:
        return _do(arguments.seed, json.loads(arguments.runs), arguments.wrong)
    runs = [arguments.run] if arguments.run is not None else list(range(-(-arguments.orders // ORDERS_PER_RUN)))
    return _do_all(arguments, runs)


def _do(seed: int, runs: list[int], wrong: str) -> int:
    """Do some runs in this process, and write a line of JSON for each."""
    from tests.model.run import do_one

    for run in runs:
        with places.directory(places.MEMORY) as directory:
            notes, faults = do_one(directory, seed, run, ORDERS_PER_RUN, wrong)
        sys.stdout.write(json.dumps({"run": run, "notes": notes, "faults": faults}) + "\n")
        sys.stdout.flush()
        if wrong and faults:
            break
    return 0


def _do_all(arguments: argparse.Namespace, runs: list[int]) -> int:
    began = time.monotonic()
    report, waiting = Report(arguments.seed), [runs[first : first + _BATCH] for first in range(0, len(runs), _BATCH)]
    busy: list[subprocess.Popen[str]] = []
    while waiting or busy:
        while waiting and len(busy) < arguments.jobs:
            command = [sys.executable, "-m", "tests.model", "--seed", str(arguments.seed), "--wrong", arguments.wrong]
            command += ["--runs", json.dumps(waiting.pop(0))]
            busy.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        done = busy.pop(0)
        output, _ = done.communicate()
        for line in output.splitlines():
            found = json.loads(line)
            report.add(found)
            if found["faults"] and not arguments.wrong:
                print(f"run {found['run']}: {found['faults'][0]}", file=sys.stderr)
        if arguments.wrong and report.failed:
            waiting.clear()  # one is enough
        if done.returncode:
            report.broken += 1
    print(report.text(time.monotonic() - began))
    return report.status()


if __name__ == "__main__":
    sys.exit(main())
