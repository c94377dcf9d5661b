"""`python -m tests.chaos`: kills what serves guests under load, while administrators give orders; reports what guests
noticed, and what administrators were told that is not true.

Must not be gentle. The same seed plans the same steps; the exact times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.chaos.engines import GOALS_MS, KINDS, missing
from tests.chaos.host import ChaosError, Host
from tests.chaos.orders import Tally
from tests.chaos.plan import ACTIONS, ENGINE_ACTIONS, LINK_FAULT, ORDERS, UNNAMED_VERBS, VERBS, Step, next_step
from tests.interruption import INTERRUPTED, heard_once
from tests.stamp import stamp

ERRORS, UNTRUE = "errors that guests saw", "untrue replies"
_LIES = "lies"
_COUNTED = "counted"  # numbers for the scoreboard
_TELL_S = 60.0  # between two lines of output without a progress bar
_IN_A_ROW = 3  # steps until requests in flight may finish: no worker follows the seventh that died in vain
# how long guests waited for their next answer, by what was done
_ONE, _ALL, _OTHERS = "kill to first answer", "the same, all killed at once", "meanwhile, of guests left alone"
_KILLS, _KILL_ALL = ("kill a worker", "kill a worker twice"), "kill every worker"


def main(arguments: Sequence[str]) -> int:
    """Run, print a table, and return 0 if no guest noticed more than a pause."""
    args = parse(arguments)
    console = Console()
    if args.engine and (lacks := missing(args.engine)):
        console.print(f"skipped: there is no {', '.join(lacks)} here")
        return 0
    if args.json:
        args.json.unlink(missing_ok=True)  # a run that fails has no figures
    try:
        with heard_once():
            figures = run(args, console)
    except ChaosError as problem:
        console.print(f"[red]failed[/] with --seed {args.seed}: {problem}", highlight=False, markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted: a run that is not over has no figures")
        return INTERRUPTED
    for lie in figures.pop(_LIES):
        console.print(f"[red]untrue[/]: {escape(lie)}", highlight=False, markup=True)
    counted = figures.pop(_COUNTED)
    console.print("no guest read a wrong sector or had an answer twice: the first would have ended the run")
    if args.engine:
        figures[_ONE] += f"; on a quiet machine {GOALS_MS[args.engine]} ms is the goal"
    for key, value in figures.items():
        console.print(f"{key:<32} {value}", highlight=False, markup=False)
    if args.json:
        args.json.write_text(json.dumps({**figures, **counted, **stamp()}, indent=1) + "\n")
    return 1 if figures[ERRORS] or figures[UNTRUE] else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what `run` gets. Raises: SystemExit."""
    parser = argparse.ArgumentParser(prog="tests.chaos", description="Kill what serves guests under verified load.")
    parser.add_argument("--kills", type=int, default=1000, help="of workers (%(default)s)")
    parser.add_argument("--hours", type=float, help="go on for so long instead")
    parser.add_argument(
        "--operations", type=int, default=0, help="verify so many requests, too, with the kills spread over them"
    )
    parser.add_argument("--guests", type=int, choices=range(1, 9), help="(8, and 4 with an engine)")
    parser.add_argument("--engine", choices=[*KINDS], default="", help="serve their disks from servers, or a cluster")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--only", choices=[*ACTIONS, *ENGINE_ACTIONS], action="append", help="only this; may be given again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(arguments)
    args.guests = min(args.guests or 8, 4 if args.engine else 8)
    return args


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Carry out the steps, and return the figures. Raises: ChaosError."""
    random = Random(args.seed)
    done: Counter[str] = Counter()
    slowest: Counter[str] = Counter()  # seconds until every guest had an answer again
    waits: dict[str, list[float]] = {_ONE: [], _ALL: [], _OTHERS: []}
    steps: list[tuple[int, str]] = []
    began = told_at = time.monotonic()
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as slow,
        Host(args.guests, args.seed, Path(slow), args.engine) as host,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        actions = {
            name: weight
            for name, weight in {**ACTIONS, **ENGINE_ACTIONS}.items()
            if name in host.actions and (not args.only or name in args.only)
        }
        first = [each for each in (ORDERS, LINK_FAULT) if each in actions]  # a short run has them, too
        total = int(args.hours * 3600) if args.hours else args.operations or args.kills
        task = progress.add_task("connecting", total=total)
        while (passed := _passed(args, host, time.monotonic() - began)) < 1:
            progress.update(task, completed=int(passed * total))
            if not console.is_terminal and time.monotonic() > told_at + _TELL_S:
                told_at = time.monotonic()
                console.print(_progress(host, passed, told_at - began), highlight=False)
            if _is_ahead(args, host):
                progress.update(task, description="guests are left alone")
                host.rest()
                continue
            begins = first[len(steps)] if len(steps) < len(first) else ""
            step = Step(begins, 0, 0.0) if begins else next_step(random, args.guests, actions)
            progress.update(task, description=step.action)
            steps.append((time.monotonic_ns(), step.action))
            begun_ns = time.monotonic_ns()
            took = host.wait_for_answers(host.do(step))
            if len(steps) % _IN_A_ROW == 0:
                host.wait_until_settled()
            timed = {number: seconds for number, seconds in took.items() if host.is_timed(number, begun_ns)}
            slowest[step.action] = max([slowest[step.action], *timed.values()])
            if step.action in _KILLS and step.guest in timed:
                waits[_ONE].append(timed.pop(step.guest))
                waits[_OTHERS] += timed.values()
            elif step.action == _KILL_ALL:
                waits[_ALL] += timed.values()
            done[step.action] += 1
        progress.update(task, description="verifying", completed=total)
        missed = host.missed_wakeups()
        ends = host.finish()
        return _figures(host, missed, done, slowest, waits, steps, ends, time.monotonic() - began)


def _progress(host: Host, passed: float, seconds: float) -> str:
    """Return how far a run is, and how many seconds more it needs at that pace."""
    left_s = seconds * (1 - passed) / passed if passed else 0.0
    done = f"{host.kills['workers']} workers killed, {host.answers} requests answered"
    return f"{passed:.1%} in {seconds:.0f} s: {done}, some {left_s:.0f} s left"


def _passed(args: argparse.Namespace, host: Host, seconds: float) -> float:
    """Return the part of the run that has passed; it is over at 1."""
    if args.hours:
        return seconds / (args.hours * 3600)
    killed = host.kills["workers"] / args.kills
    return min(killed, host.answers / args.operations) if args.operations else killed


def _is_ahead(args: argparse.Namespace, host: Host) -> bool:
    """Return whether more of the kills than of the operations are done."""
    return bool(host.kills["workers"] * args.operations > host.answers * args.kills)


def _figures(
    host: Host,
    missed: int,
    done: Counter[str],
    slowest: Counter[str],
    waits: dict[str, list[float]],
    steps: list[tuple[int, str]],
    ends: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "worker kills": host.kills["workers"],
        "service kills": host.kills["services"],
        **({"server kills": host.kills["servers"]} if "servers" in host.kills else {}),
        **{f"  {name}": f"{count}, all served on after {slowest[name]:.2f} s" for name, count in sorted(done.items())},
        **_orders(host.desk.tally),
        **{f"  {fault}": count for fault, count in host.link_faults().items()},
        "wake-ups missed, in the end": missed,
        "guests": len(host.guests),
        "requests verified": sum(end["requests"] for end in ends),
        ERRORS: sum(end["errors"] for end in ends),
        **{
            f"  {guest.disk.chain}": end["errors"]
            for guest, end in zip(host.guests, ends, strict=True)
            if end["errors"]
        },
        **{name: _spread(seconds) for name, seconds in waits.items()},
        "longest pause of a guest": _longest(ends, steps),
        "minutes": round(seconds / 60, 1),
        _LIES: host.desk.tally.lies,
        "CPU time": f"{_cpu_s() / max(1, host.kills['workers']):.2f} s for each kill",
        _COUNTED: {
            "kills without an error": 0 if any(end["errors"] for end in ends) else host.kills["workers"],
            "kill to first answer, ms, median": round(_part(sorted(waits[_ONE]) or [0.0], 0.5) * 1000),
            "kill to first answer, ms, 99 %": round(_part(sorted(waits[_ONE]) or [0.0], 0.99) * 1000),
            "times that xenstore went away": done["xenstore goes away"],
            "sectors verified": sum(end["sectors"] for end in ends),
        },
    }


def _cpu_s() -> float:
    """Return the seconds of CPU time that this process and those of its children that have ended have used."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _orders(tally: Tally) -> dict[str, Any]:
    """Return which orders were given, how they ended, and what administrators were told that is not true."""
    by_verb = {
        verb: {code: n for (each, code), n in tally.ended.items() if each == verb}
        for verb in (*VERBS, *UNNAMED_VERBS, "resume")
    }
    return {
        "orders": tally.ended.total(),
        **{f"  {verb}": _counts(ended) for verb, ended in by_verb.items()},
        "answers that were heard": _counts(tally.heard),
        "rounds of one, and of two at once": f"{tally.rounds[1]}, {tally.rounds[2]}",
        UNTRUE: len(tally.lies),
    }


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]

    def part(fraction: float) -> str:
        return f"{_part(ordered, fraction) * 1000:.0f} ms"

    return f"{part(0.5)} (99 %: {part(0.99)}, longest {part(1.0)})"


def _part(ordered: list[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))]


def _longest(ends: list[dict[str, Any]], steps: list[tuple[int, str]]) -> str:
    """Return the longest time that a guest was without an answer, and what was done meanwhile."""
    end = max((end for end in ends if end["is_timed"]), key=lambda end: float(end["longest_s"]))
    since = end["longest_at"] - int(end["longest_s"] * 1e9)
    actions = [action for at, action in steps if since - 1e9 < at < end["longest_at"]]
    return f"{end['longest_s']:.2f} s ({', '.join(actions) or 'nothing was done meanwhile'})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
