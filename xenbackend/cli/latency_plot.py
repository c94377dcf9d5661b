"""A histogram of latencies as a picture.

Must not be imported unless a picture is wanted: it needs matplotlib, the extra ``xenbackend[plot]``.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

from xenbackend import __version__
from xenbackend.bench.plot import write
from xenbackend.cli.histogram import Histogram
from xenbackend.client import Disk
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_time


def save(known: Disk, histogram: Histogram, path: Path) -> None:
    """Write the picture to `path`, in the format that its ending names. Raises: XenbackendError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(histogram.filled())
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(places)), [histogram.buckets[place] for place in places], width=0.9)
    axes.set_xticks(range(len(places)), [f"< {format_duration((1 << place) / 1e9)}" for place in places], rotation=45)
    axes.set_ylabel("requests that were timed")
    axes.grid(axis="y", alpha=0.3)
    when = format_time(time.time())
    span = "since it was attached" if histogram.seconds is None else f"{histogram.seconds:.1f} s"
    mean = "" if histogram.mean_ns is None else f", mean {format_duration(histogram.mean_ns / 1e9)}"
    title = f"{known.vbd}: {histogram.samples} requests, {span}{mean}"
    below = f"{platform.node()}, xenbackend {known.worker_version or __version__}, {when}"
    chain = printable(known.chain).replace("$", r"\$")  # which would begin a formula
    axes.set_title(f"{title}\n{chain}\n{below}", fontsize=9)
    write(figure, path)
