"""The steps of CI and of `make test-all`, in order, and how many of the 28 minutes each may take.

Must not run anything. Each suite has a row here: in full for `make test-all`, and for CI a share that fits, without
changing the sum (`test_steps.py`).

In a command, `{seed}` is a number that changes with the commit, and `{part}` a part that does, such as `2/5`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CI_MINUTES = 28.0  # on a quiet machine with two cores, from an empty cache


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: its name in tables and on the command line.
        ci: the command that CI runs, for a shell in the project's directory; empty if only `make test-all` runs it.
        ci_minutes: how long that may take.
        full: the command that `make test-all` runs; empty if CI does all of it.
        parts: how many parts `{part}` is chosen from.
        failed: the file with the tests that failed; `FAILED=1` after the command runs only these.
        repeats: whether the command itself repeats tests that failed.
    """

    name: str
    ci: str
    ci_minutes: float
    full: str = ""
    parts: int = 1
    failed: str = ""
    repeats: bool = False

    @property
    def changes_with_the_commit(self) -> bool:
        """Whether a failure may be older than the commit on which it appears."""
        return "{seed}" in self.ci or "{part}" in self.ci

    def failures(self) -> dict[str, object]:
        """Return the tests that failed, if the suite has recorded them."""
        file = Path(self.failed)
        return dict(json.loads(file.read_text())) if self.failed and file.exists() else {}


STEPS = (  # cheap ones first, so that most mistakes end a run early
    Step("packages", ".ci/packages", 1.5),
    Step("run", "make run", 0.5, full="make run"),
    Step(
        "deb",
        "make deb >/dev/null && lintian --allow-root --fail-on error,warning dist/xenbackend_*_all.deb",
        0.5,
        full="make deb >/dev/null",
    ),
    Step("test", "make test", 3.0, full="make test", failed="build/failed/test/v/cache/lastfailed"),
    Step(
        "system",
        "make test-system",
        4.5,
        full="make test-system",
        failed="build/failed/system/v/cache/lastfailed",
    ),
    Step(
        "model",
        "make test-model PART={part}",
        0.75,
        full="make test-model",
        parts=6,
        failed="build/failed/model/v/cache/lastfailed",
    ),
    Step("orders", "make test-orders ORDERS=4000", 0.5, full="make test-orders"),
    Step("ring", "make fuzz N=400000 S={seed} ANEW=1", 0.25, full="make fuzz N=10000000 S={seed} ANEW=1"),
    Step("fuzz", "make test-fuzz S={seed}", 1.5, full="make test-fuzz S={seed}"),
    Step(
        "images",
        "make test-images S={seed} PART={part}",
        1.0,
        full="make test-images S={seed}",
        parts=12,
        failed="build/failed/images/v/cache/lastfailed",
    ),
    Step(
        "engines", "make test-engines", 2.5, full="make test-engines", failed="build/failed/engines/v/cache/lastfailed"
    ),
    Step("chaos", "make chaos KILLS=150 S={seed}", 1.5, full="make chaos KILLS=1000 S={seed}"),
    Step("chroots", "", 0.0, full="make test-chroots", failed="build/failed/chroots/v/cache/lastfailed"),
    Step("chaos-engines", "", 0.0, full="make chaos-engines S={seed}"),
    Step("soak", "", 0.0, full="make soak S={seed}"),
    Step(
        "xen",
        "CI=1 make test-xen AGAIN=1 PART={part}",
        10.0,
        full="make test-xen AGAIN=1",
        parts=8,
        failed="build/xen/failed.json",
        repeats=True,
    ),
    Step(
        "xen-4.17",
        "",
        0.0,
        full="make test-xen XEN=4.17 AGAIN=1",
        failed="build/xen-4.17/failed.json",
        repeats=True,
    ),
)
