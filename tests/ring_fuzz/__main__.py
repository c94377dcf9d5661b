"""The ring fuzzer: ``python -m tests.ring_fuzz --messages 100000000 --seed 1``; it goes on where it was ended.

Must not judge: `episode` does. Each episode is (seed, number), so that one that failed is run again by ``--episode N``;
only the moments at which the second process writes are others then.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests import places
from tests.interruption import INTERRUPTED, heard_once
from tests.ring_fuzz import messages
from tests.ring_fuzz.bed import Bed
from tests.ring_fuzz.episode import LENGTH, Episode, Tally
from tests.stamp import stamp

CORPUS = Path(__file__).parent / "corpus.jsonl"
_EPISODES = 400  # of one process, at most
_PATIENCE_S = 120.0  # for one episode, on a busy machine
_MAX_GROWTH = 64 << 10  # KiB of one process, from its second episode on


def main() -> int:
    """Run, report, and return 1 where a message did what none may."""
    parser = argparse.ArgumentParser(prog="python -m tests.ring_fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episode", type=int, help="run this episode alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="the figures, and where to go on; one file for one seed")
    parser.add_argument("--anew", action="store_true", help="do not go on where the last run of this seed has ended")
    parser.add_argument(
        "--keep", action="store_true", help="write the corpus anew: a message for each way in which one is answered"
    )
    parser.add_argument("--wrong", default="", help="with this change of the product, which must be found")
    parser.add_argument(
        "--worker",
        action="store_true",
        help="send them to a worker behind its walls; no figures",
    )
    parser.add_argument("--episodes", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wrong:
        from tests.ring_fuzz.wrong import WRONG

        WRONG[arguments.wrong]()
    if arguments.worker:
        return _run_far(arguments)
    if arguments.episodes or arguments.episode is not None:
        if arguments.episodes:
            _end_in_order()
        first, end = map(int, arguments.episodes.split("-")) if arguments.episodes else (arguments.episode,) * 2
        return _run(arguments.seed, range(first, max(end, first + 1)))
    return _run_all(arguments)


def _end_in_order() -> None:
    """Leave nothing behind when whoever started this process ends it; an interruption is theirs to hear."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once
        sys.exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


def _run_far(arguments: argparse.Namespace) -> int:
    """Send messages to a worker's process, until there were so many, or one episode of them."""
    from tests.ring_fuzz.far import FarBed, FarEpisode

    tally, number = Tally(), arguments.episode or 0
    with places.directory(places.MEMORY) as directory, FarBed(directory) as bed:
        while True:
            try:
                FarEpisode(bed, arguments.seed, number, messages.read(CORPUS), tally).run()
            except Exception as fault:
                print(f"episode {number}: {type(fault).__name__}: {fault}", file=sys.stderr)
                return 1
            number += 1
            if arguments.episode is not None or tally.counts["messages"] >= arguments.messages:
                break
    print(", ".join(f"{count} {name}" for name, count in tally.counts.items()))
    return 0


def _run(seed: int, numbers: range) -> int:
    """Run some episodes in this process, and write what came of them as a line of JSON."""
    tally, corpus, settled = Tally(), messages.read(CORPUS), 0
    with places.directory(places.MEMORY) as directory:
        bed = Bed(directory)
        gc.collect()
        gc.freeze()  # what is here stays; each disconnect looks at what has come since, and nobody before
        gc.disable()
        for number in numbers:
            faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
            try:
                Episode(bed, seed, number, corpus, tally).run()
            except Exception as fault:
                print(f"episode {number}: {type(fault).__name__}: {fault}", file=sys.stderr)
                bed.rewriter.close()
                raise
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            settled = settled or used
            if used - settled > _MAX_GROWTH:
                print(f"episode {number}: {used - settled} KiB more than after the first one", file=sys.stderr)
                return 1
        faulthandler.cancel_dump_traceback_later()
        bed.close()
    kept = {signature: messages.as_line(message) for signature, message in tally.kept.items()}
    print(json.dumps({"counts": tally.counts, "kept": kept}))
    return 0


Batches = list[tuple[subprocess.Popen[str], int, int]]  # a process, and its episodes from one to another


class Figures:
    """What was run of one seed until now."""

    def __init__(self, file: Path | None, seed: int, *, anew: bool) -> None:
        self._file = file
        self.known: dict[str, Any] = {"seed": seed, "next": 0, "seconds": 0.0, "counts": {}, "failed": []}
        if file is not None and file.exists() and not anew:
            found = json.loads(file.read_text())
            if found.get("seed") == seed and not found.get("failed"):
                self.known = found
        self.kept: dict[str, str] = {}

    def add(self, found: dict[str, Any], end: int) -> None:
        """Take note of what one process has found."""
        known = self.known
        known["counts"] = dict(Counter(known["counts"]) + Counter(found["counts"]))
        known["next"] = max(known["next"], end)
        self.kept = {**found["kept"], **self.kept}

    def write(self) -> None:
        """Leave it for whoever goes on, and for the scoreboard."""
        if self._file is None:
            return
        self.known |= stamp()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.known, indent=1) + "\n")


def _run_batches(arguments: argparse.Namespace, figures: Figures, busy: Batches, begun: float) -> int:
    """Run all episodes in batches, each in a process of its own; return how many of these have failed."""
    number = figures.known["next"]
    end = number + -(-arguments.messages // LENGTH)
    failed, share = 0, min(_EPISODES, -(-(end - number) // arguments.jobs))
    while (number < end and not failed) or busy:
        while number < end and not failed and len(busy) < arguments.jobs:
            last = min(end, number + share)
            command = [sys.executable, "-m", "tests.ring_fuzz", "--seed", str(arguments.seed)]
            command += ["--episodes", f"{number}-{last}"]
            busy.append((subprocess.Popen(command, stdout=subprocess.PIPE, text=True), number, last))
            number = last
        process, first, last = busy[0]
        output, _ = process.communicate()
        del busy[0]
        if process.returncode:
            failed += 1
            figures.known["failed"].append(f"{first}-{last}")
        else:
            figures.add(json.loads(output), last)
        figures.known["seconds"] = round(time.monotonic() - begun, 1)
        figures.write()  # each time: it may be ended anywhere
    return failed


def _run_all(arguments: argparse.Namespace) -> int:
    figures = Figures(arguments.json, arguments.seed, anew=arguments.anew)
    begun, before = time.monotonic(), figures.known["seconds"]
    busy: Batches = []
    try:
        with heard_once():
            failed = _run_batches(arguments, figures, busy, begun - before)
    except KeyboardInterrupt:
        _tell(figures, time.monotonic() - begun, 0)
        return INTERRUPTED
    finally:
        for process, *_ in busy:
            process.terminate()
            process.communicate()
    _tell(figures, time.monotonic() - begun, failed)
    if arguments.keep and not failed:
        CORPUS.write_text("\n".join(figures.kept[each] for each in sorted(figures.kept)) + "\n")
    return 1 if failed else 0


def _tell(figures: Figures, seconds: float, failed: int) -> None:
    counts = figures.known["counts"]
    print(f"{counts.get('messages', 0)} messages of seed {figures.known['seed']} in {figures.known['seconds']:.0f} s,")
    print(
        f"{counts.get('rewritten', 0)} fields rewritten while they were read, {counts.get('episodes', 0)} connections,"
    )
    print(f"{counts.get('stopped rings', 0)} rings stopped, {len(figures.kept)} kinds of answers; {seconds:.0f} s now")
    if failed:
        print(f"failed: episodes {', '.join(figures.known['failed'])}; `--episode N` runs one again", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
