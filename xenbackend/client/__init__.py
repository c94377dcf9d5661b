"""A client of the service, for programs: docs/client.md.

Must not change the meaning of an exported name: that takes a new `VERSION`.
"""

from xenbackend.client.asking import Client
from xenbackend.client.results import (
    Changed,
    Disk,
    Done,
    File,
    Latency,
    Layer,
    LayerTimes,
    Measured,
    Order,
    Pending,
    Planned,
    Policy,
    Service,
    Stopped,
    Times,
    Untold,
    Upgraded,
    Wait,
    Who,
)
from xenbackend.protocol.answers import VERSION
from xenbackend.protocol.client import (
    Bug,
    Busy,
    Failed,
    Gone,
    Invalid,
    ServiceError,
    UnderWay,
    Unreachable,
)
from xenbackend.protocol.codes import Code

__all__ = [
    "VERSION", "Bug", "Busy", "Changed", "Client", "Code", "Disk", "Done", "Failed", "File", "Gone", "Invalid",
    "Latency", "Layer", "LayerTimes", "Measured", "Order", "Pending", "Planned", "Policy", "Service",
    "ServiceError", "Stopped", "Times", "UnderWay", "Unreachable", "Untold", "Upgraded", "Wait", "Who",
]  # fmt: skip
