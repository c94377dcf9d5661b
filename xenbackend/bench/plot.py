"""The rows as a picture: requests per second and CPU time per request, with a group of bars per workload.

Must not be imported unless a picture was asked for: it needs matplotlib, the extra ``xenbackend[plot]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xenbackend.bench.report import Row, Spread
from xenbackend.errors import ConfigError, unwritable

_GROUP = 0.8  # the share of a group's width that its bars take


def check() -> None:
    """Check that matplotlib is installed, before anything is measured for a picture. Raises: ConfigError."""
    try:
        import matplotlib  # noqa: F401 - only to see whether it is installed
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'xenbackend[plot]'") from None


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the picture to `path`, in the format that its suffix names. Raises: XenbackendError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(row.work.name for row in rows))
    figure = Figure(figsize=(4.5 + 1.5 * len(works), 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    _bars(above, rows, works, lambda row: row.rate)
    _bars(below, rows, works, lambda row: row.cpu_us)
    above.set_ylabel("requests/s (more is better)")
    below.set_ylabel("backend CPU µs per request (less is better)")
    above.set_title("median of the rounds; the lines reach from the least to the greatest")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper")
    write(figure, path)


def write(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib in the format that the path's ending names. Raises: XenbackendError."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise unwritable(f"the picture {path} cannot be written: {error.strerror or error}", error) from None
    except ValueError as error:  # of a format that matplotlib does not know
        raise ConfigError(f"the picture {path} cannot be written: {error}") from None


def _bars(axes: Any, rows: Sequence[Row], works: list[str], value: Callable[[Row], Spread]) -> None:
    targets = list(dict.fromkeys(row.target for row in rows))
    width = _GROUP / len(targets)
    for place, target in enumerate(targets):
        mine = [row for row in rows if row.target == target]
        spreads = [value(row) for row in mine]
        left = [works.index(row.work.name) - _GROUP / 2 + (place + 0.5) * width for row in mine]
        errors = [[s.median - s.least for s in spreads], [s.greatest - s.median for s in spreads]]
        axes.bar(left, [s.median for s in spreads], width, yerr=errors, label=target, capsize=2)
    axes.set_yscale("log")  # since 4 KiB and 1 MiB are in one picture
    axes.set_xticks(range(len(works)), works)
    axes.grid(axis="y", alpha=0.3)
