"""What operators ask of one vbd in service, and who waits for the answers.

Must not write xenstore. What is to outlive the service is in the handover's notes.

    pause, resume     the guest's requests wait, and go on
    set               another chain serves the guest from now on
    snapshot          a new image over the one that is written to, which takes the guest's writes from now on
    policy            what becomes of requests that fail
    upgrade           another worker process serves the guest from now on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from xenbackend.block.policy import Policy
from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.phase import Phase

ORDERS = ("pause", "resume", "set", "resize", "snapshot", "policy", "upgrade")
MAX_CHAIN = 2048  # characters, the quota of a value
Reply = Callable[[dict[str, Any]], None]


class Served(Protocol):
    """The vbd, as far as orders need it."""

    device: Device
    handover: Handover

    def tell(self, message: messages.Message) -> bool:
        """Send a message to the worker; False where there is none."""

    def handle(self, event: events.Event) -> None:
        """Let the automaton see an event."""


class Orders:
    """The orders of one vbd. Every method raises ConfigError for what cannot be asked now."""

    def __init__(self, vbd: Served, default_policy: str) -> None:
        self._vbd = vbd
        self._default_policy = default_policy
        self._waiting: dict[str, list[Reply]] = {}  # by order

    @property
    def policy(self) -> str:
        """The policy's text, as a worker is given it."""
        return str(self._vbd.handover.notes.get("policy", self._default_policy))

    @property
    def chain(self) -> str:
        """The chain that is wanted now, empty where there is none that could be."""
        spec = self._vbd.device.spec
        return spec.chain if spec else ""

    @property
    def is_paused(self) -> bool:
        """True while an administrator wants it."""
        return bool(self._vbd.handover.notes.get("paused"))

    def pause(self, reply: Reply) -> None:
        """Take no more requests from the guest; `reply` is called when nothing is in flight."""
        self._vbd.handover.note(paused=True)
        if self._vbd.tell(messages.Pause()):
            self._wait("pause", reply)
        else:
            reply({"data": "paused"})

    def resume(self, reply: Reply) -> None:
        """Serve on, whatever stopped the disk: a pause, a failed flush, workers that died."""
        self._vbd.handover.note(paused=None)
        if self._vbd.device.phase is not Phase.SERVING:
            self._vbd.handover.forgive()  # a worker that serves does that itself
        self._vbd.tell(messages.Resume())
        self._vbd.handle(events.Resume())
        reply({"data": "resumed"})

    def _check_service(self) -> None:
        device = self._vbd.device
        if device.phase not in (Phase.OPEN, Phase.SERVING) or device.keys is None:
            raise ConfigError(f"the disk is not in service: {device.error or f'its worker is {device.phase.value}'}")

    def set_chain(self, text: str, reply: Reply) -> None:
        """Serve the guest through another chain, or once more through the same one; `reply` gets its layers."""
        check_whole_paths(parse_chain(text))
        self._check_service()
        if "set" in self._waiting:
            raise ConfigError("another chain is just being put in; wait for it")
        if len(text) > MAX_CHAIN:
            raise ConfigError(f"a chain of {len(text)} characters does not fit into xenstore, which takes {MAX_CHAIN}")
        self._vbd.handover.note(swap={"from": (self._vbd.device.keys or {}).get("params", ""), "to": text})
        self._vbd.tell(messages.Swap(text))
        self._wait("set", reply)

    def snapshot(self, file: str, image_format: str, reply: Reply) -> None:
        """Put a new image over the guest's; `reply` gets the layers, `set_chain`'s."""
        self._check_service()
        if "set" in self._waiting or "snapshot" in self._waiting:
            raise ConfigError("another chain is just being put in; wait for it")
        if not Path(file).is_absolute():
            raise ConfigError(f"{file!r} is no whole path: the service would look for it in a directory of its own")
        self._wait("snapshot", reply)
        self._vbd.tell(messages.Branch(file, image_format))

    def _branched(self, chain: str) -> None:
        """Put the chain with the new image in; where that is refused the image is left, empty."""
        for reply in self._waiting.pop("snapshot", []):
            try:
                self.set_chain(chain, reply)
            except ConfigError as error:
                reply({"error": str(error)})

    def set_policy(self, text: str, reply: Reply) -> None:
        """Go by another policy, if one is given; `reply` gets the one that holds."""
        if text:
            Policy(text)  # so that a mistake is told of what was given, and nothing else
            policy = str(Policy(f"{self.policy},{text}"))
            self._vbd.handover.note(policy=policy)
            self._vbd.tell(messages.Obey(policy))
        reply({"data": str(Policy(self.policy))})

    def upgrade(self, reply: Reply) -> None:
        """Let another process serve the disk; `reply` is called when it does."""
        if self._vbd.device.phase not in (Phase.OPEN, Phase.SERVING):
            raise ConfigError(f"its worker is {self._vbd.device.phase.value}; only one in service can be replaced")
        self._wait("upgrade", reply)
        self._vbd.handle(events.Replace())

    def hear(self, message: messages.Message) -> None:
        """Answer who waited for this."""
        match message:
            case messages.Held():
                self._answer("pause", {"data": "paused"})
            case messages.Branched():
                self._branched(message.chain)
            case messages.Swapped():
                self._vbd.handover.note(chain=message.chain)
                self._answer(
                    "set", {"data": {"chain": message.chain, "layers": [asdict(each) for each in message.layers]}}
                )
            case messages.Unswapped():
                self._vbd.handover.note(swap=None)
                for order in ("snapshot", "set"):
                    self._answer(order, {"error": message.sentence})
            case messages.Connected():
                self._answer("upgrade", {"data": "upgraded"})
            case messages.Opened() if not self._vbd.device.is_waited_for():
                self._answer("upgrade", {"data": "upgraded"})
            case messages.Failed():
                self._answer("upgrade", {"error": f"the new worker could not take over: {message.sentence}"})

    def worker_ended(self, sentence: str) -> None:
        """Answer who waited for the worker that has ended."""
        for order in ("snapshot", "set"):
            self._answer(order, {"error": f"{sentence} meanwhile; `xenbackend status` says what is in service"})
        if self.is_paused:
            self._answer("pause", {"data": "paused"})
        if self._vbd.device.phase is Phase.NONE:  # nobody takes over
            self._answer("upgrade", {"error": self._vbd.device.error or sentence})

    def give_up(self, sentence: str) -> None:
        """Answer everybody: the vbd has gone, or this service goes."""
        for order in list(self._waiting):
            self._answer(order, {"error": sentence})

    def _wait(self, order: str, reply: Reply) -> None:
        self._waiting.setdefault(order, []).append(reply)

    def _answer(self, order: str, answer: dict[str, Any]) -> None:
        for reply in self._waiting.pop(order, []):
            reply(answer)


def give(orders: Orders, verb: str, request: Mapping[str, Any], reply: Reply) -> None:
    """Do what an operator asks of one vbd, by a verb of ORDERS. Raises: ConfigError."""
    match verb:
        case "pause":
            orders.pause(reply)
        case "resume":
            orders.resume(reply)
        case "set":
            orders.set_chain(str(request.get("chain", "")), reply)
        case "resize":  # what is opened once more is as large as it has become
            orders.set_chain(orders.chain, reply)
        case "snapshot":
            orders.snapshot(str(request.get("file", "")), str(request.get("format", "")), reply)
        case "policy":
            orders.set_policy(str(request.get("policy", "")), reply)
        case "upgrade":
            orders.upgrade(reply)
