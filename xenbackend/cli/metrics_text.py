"""The figures of all disks as text, in the format of Prometheus or of OpenMetrics.

Must not ask anybody: it uses the service's answers to `ping` and `status`. Sources: Prometheus, "Exposition
formats", 0.0.4; OpenMetrics 1.0.0. The two differ in how a counter is declared, and in the last line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from xenbackend.client import Disk, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_BUCKETS = range(12, 36)  # of latency, 2^n ns: 4 us to 34 s; longer times are in the last one
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = dict[str, str]
Sample = tuple[str, Labels, float]  # suffix of the name, labels, value


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all of its samples; a counter's name is without its suffix."""

    name: str
    kind: str
    help: str
    samples: Sequence[Sample]

    def lines(self, *, is_openmetrics: bool) -> Iterator[str]:
        """Yield the lines of the text."""
        declared = self.name if is_openmetrics or self.kind != "counter" else f"{self.name}_total"
        yield f"# HELP {declared} {self.help.translate(_ESCAPES)}"
        yield f"# TYPE {declared} {self.kind}"
        for suffix, labels, value in self.samples:
            words = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            yield (
                f"{self.name}{suffix}{{{words}}} {_number(value)}" if words else f"{self.name}{suffix} {_number(value)}"
            )


def text(families: Iterable[Family], *, is_openmetrics: bool) -> str:
    """Return the whole text."""
    lines = [line for each in families for line in each.lines(is_openmetrics=is_openmetrics)]
    return "\n".join([*lines, *(["# EOF"] if is_openmetrics else [])]) + "\n"


def of_nobody() -> list[Family]:
    """Return the metrics if no service answers."""
    return [Family("xenbackend_up", "gauge", "1 while the service answers.", [("", {}, 0)])]


def of_service(service: Service, disks: Sequence[Disk]) -> list[Family]:
    """Return the metrics of the service and of its disks, as `ping` and `status` describe them."""
    return [*_of_service(service), *_of_disks([_Labelled(each) for each in disks])]


def _of_service(service: Service) -> list[Family]:
    return [
        _gauge("up", "1 while the service answers.", [({}, 1)]),
        _gauge("info", "The service's version.", [({"version": service.version}, 1)]),
        _gauge("start_time_seconds", "When the service was started, since 1970.", [({}, service.since or 0)]),
        _counter("bugs", "Internal errors (bugs) that the service has met.", [({}, service.bugs)]),
        _counter("breaches", "Workers killed because they broke the protocol.", [({}, service.breaches)]),
    ]


class _Labelled:
    """One disk, and the labels that all of its samples have."""

    def __init__(self, known: Disk) -> None:
        self.labels = {"disk": known.vbd, "guest": known.guest}
        self.known = known

    def facts(self) -> Labels:
        """Return the labels that describe the disk in words."""
        known = self.known
        words = {"node": known.node, "chain": known.chain, "state": known.state}
        return self.labels | words | {"version": known.worker_version}

    def figures(self) -> Iterator[tuple[Labels, float]]:
        """Yield the figures of the layers."""
        for place, layer in enumerate(self.known.layers):
            labels = self.labels | {"layer": str(place), "driver": layer.layer.partition(":")[0]}
            for name, value in layer.figures.items():
                yield labels | {"figure": name}, value

    def latency(self) -> Iterator[Sample]:
        """Yield each operation's histogram, cumulated as the format wants it."""
        for operation, timed in self.known.latency_by_operation.items():
            labels, buckets = self.labels | {"operation": operation}, timed.buckets
            bounds = [(_number(2**place / 1e9), sum(buckets[: place + 1])) for place in _BUCKETS]
            for bound, count in [*bounds, ("+Inf", sum(buckets))]:
                yield "_bucket", labels | {"le": bound}, count
            yield "_sum", labels, timed.sum_ns / 1e9
            yield "_count", labels, sum(buckets)


def _of_disks(disks: Sequence[_Labelled]) -> list[Family]:
    def of_each(value: Callable[[Disk], float]) -> list[tuple[Labels, float]]:
        return [(disk.labels, value(disk.known)) for disk in disks]

    def counted(**keys: str) -> list[tuple[Labels, float]]:
        """Return counters by operation."""
        return [
            (disk.labels | {"operation": operation}, disk.known.counters[key])
            for disk in disks
            for operation, key in keys.items()
        ]

    served = [(disk.labels, not disk.known.reason and not disk.known.paused) for disk in disks]
    reasons = [(disk.labels | {"reason": disk.known.reason}, 1) for disk in disks if disk.known.reason]
    waits = [
        (disk.labels | {"for": what}, (disk.known.waits_s or 0) if what == disk.known.waits_for else 0)
        for disk in disks
        for what in ("storage", "key")
    ]
    done = counted(read="reads", write="writes", flush="flushes", discard="discards")
    latency = [sample for disk in disks for sample in disk.latency()]
    return [
        _gauge("disk_info", "What a disk is.", [(disk.facts(), 1) for disk in disks]),
        _gauge("disk_served", "1 while nothing prevents the disk from being served.", served),
        _gauge("disk_paused", "1 while an administrator has paused the disk.", of_each(lambda disk: disk.paused)),
        _gauge("disk_reason", "1 for the reason why a disk is not served as it should be.", reasons),
        _gauge("disk_wait_seconds", "How long opening a file has been waiting, by what it waits for.", waits),
        _gauge(
            "disk_needs_upgrade",
            "1 while the worker's version differs from the service's.",
            of_each(lambda disk: disk.needs_upgrade),
        ),
        _counter("disk_restarts", "Workers that died and were replaced.", of_each(lambda disk: disk.restarts)),
        _counter("disk_requests", "Requests that were completed.", done),
        _counter("disk_bytes", "Bytes that were read and written.", counted(read="read_bytes", write="written_bytes")),
        _counter("disk_errors", "Requests that failed.", of_each(lambda disk: disk.counters["errors"])),
        _counter(
            "disk_guest_errors", "Requests that were not valid.", of_each(lambda disk: disk.counters["guest_errors"])
        ),
        _gauge("disk_in_flight", "Requests under way.", of_each(lambda disk: disk.counters["in_flight"])),
        Family("xenbackend_disk_latency_seconds", "histogram", "Time of a request, from a sample.", latency),
        _gauge(
            "layer_figure",
            "What a layer counts; see its driver's manual.",
            [each for disk in disks for each in disk.figures()],
        ),
    ]


def _gauge(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Family:
    return Family(f"xenbackend_{name}", "gauge", text, [("", labels, value) for labels, value in samples])


def _counter(name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Family:
    return Family(f"xenbackend_{name}", "counter", text, [("_total", labels, value) for labels, value in samples])


def _escaped(value: object) -> str:
    return str(value).translate(_ESCAPES)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
