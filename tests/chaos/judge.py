"""Compares what administrators were told with what is true; each sentence that it returns is about one lie.

Must not ask anybody. A *round* has the orders about one disk between two moments at which nothing was under way: the
truth before, each answer that a client got, the ledger's entry of each order, the truth after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xenbackend.block.policy import Policy
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

EXCHANGES = ("set", "snapshot", "resize", "keep")  # orders that may change the chain
REMEMBERED = 100  # characters of a sentence that the ledger keeps in any case
_TICK_S = 0.05  # the start of a process is known to a hundredth of a second


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true while nothing is under way.

    chain         the one in service, as the service says
    params        the one that the toolstack would start the guest with
    layers        the chain that the worker has open
    worker        its process, which has run `since` then (seconds since 1970)
    """

    chain: str
    params: str
    layers: str
    is_paused: bool
    policy: str
    worker: int
    since: float


@dataclass(slots=True)
class Told:
    """An order that was given, and the answer that its client got: None if the client went away."""

    verb: str
    request: dict[str, Any]
    answer: Answer | None = None
    worker: int = 0  # that served the disk when it was given; not all before it, as their numbers come again

    def __str__(self) -> str:
        heard = "nothing" if self.answer is None else f"{self.answer.code} {self.answer.data} {self.answer.sentence!r}"
        return f"{self.verb} {self.request} was told {heard}"


Entry = dict[str, Any]  # of the ledger


def untrue(before: Truth, told: Sequence[Told], entries: Sequence[Entry], after: Truth) -> list[str]:
    """Return sentences about what was said of a round's orders and is not true; all `entries` have ended."""
    ended = sorted(entries, key=lambda entry: (entry["ended"], entry["number"]))
    lies = [
        f"order {each['number']}, {each['verb']}: {each['code']}: {each['error']}" for each in ended if _is_odd(each)
    ]
    exchanges = [each for each in ended if _is_done(each, *EXCHANGES) and not each["to"].startswith("@")]
    chains = [before.chain, *(each["to"] for each in exchanges)]
    for each in told:
        if each.answer is not None:
            lies += [f"{each}, and {lie}" for lie in _of_answer(each, each.answer, ended, chains, after)]
    if (after.chain, after.params, after.layers) != (chains[-1],) * 3:
        lies.append(
            f"{chains[-1]} was said to be in service, and status says {after.chain}, params is {after.params}, "
            f"the worker has open {after.layers}"
        )
    pauses = [each["verb"] for each in ended if _is_done(each, "pause", "resume")]
    failed = any(each["verb"] == "pause" and each["code"] == Code.FAILED for each in ended)  # it may hold, or not
    if not failed and after.is_paused != (pauses[-1] == "pause" if pauses else before.is_paused):
        lies.append(f"after {pauses} is_paused is {after.is_paused}, and was {before.is_paused}")
    policies = [each["to"] for each in sorted(ended, key=lambda entry: entry["number"]) if _is_done(each, "policy")]
    if after.policy != str(Policy(",".join([before.policy, *policies]))):
        lies.append(f"after {policies} the policy is {after.policy}, and was {before.policy}")
    return lies


def _of_answer(told: Told, answer: Answer, ended: Sequence[Entry], chains: Sequence[str], after: Truth) -> list[str]:
    """Return what is wrong with one answer."""
    if answer.code is Code.BUG:  # also to a command that only reads, of which the ledger has nothing
        return ["no answer may be that"]
    if answer.order is None:  # a service that went away before it could say so much, or a command that only reads
        has_none = answer.code in (Code.UNDER_WAY, Code.UNREACHABLE, Code.GONE) or told.verb == "command"
        return [] if has_none else ["the answer has no number"]
    [entry] = [each for each in ended if each["number"] == answer.order] or [None]
    if entry is None or entry["verb"] != f"{told.verb}{' --dry-run' * (told.request.get('dry_run') is True)}":
        return [f"the service remembers {entry}"]
    lies = []
    if answer.code is not Code.UNDER_WAY and entry["code"] != answer.code:
        lies.append(f"the service remembers {entry['code']}: {entry['error']}")
    if (
        not answer.sentence.startswith(entry["error"].removesuffix(" [...]")[:REMEMBERED])
        and answer.code is not Code.UNDER_WAY
    ):
        lies.append(f"the service remembers {entry['error']!r}")
    if (answer.code is not Code.OK) != bool(answer.sentence):
        lies.append("the sentence does not go with that")
    data = answer.data if isinstance(answer.data, dict) else {}
    if "chain" in data and data["chain"] not in chains:
        lies.append(f"that chain was never in service: {chains}")
    if answer.code is Code.OK:
        lies += _of_success(told, data, entry, after)
    elif told.verb == "command" and answer.code is Code.INVALID and all("log:" in each for each in chains):
        lies.append(f"there was a log: layer all the time: {chains}")
    return lies


def _of_success(told: Told, data: dict[str, Any], entry: Entry, after: Truth) -> list[str]:
    """Return what is wrong with the answer to an order that succeeded."""
    request = told.request
    match told.verb:
        case "set" if not request.get("dry_run"):
            is_true = data["chain"] == request["chain"] == entry["to"]
        case "snapshot" if request["file"].startswith("@"):  # the image's own, which changes no chain
            is_true = data["chain"] == entry["from"]
        case "drop":  # a guest uses the disk
            is_true = False
        case "snapshot" | "keep":
            is_true = request["file"] in data["chain"] and data["chain"] == entry["to"]
        case "resize":
            is_true = data["chain"] == entry["from"] == entry["to"]
        case "pause" | "resume":
            is_true = data["paused"] is (told.verb == "pause")
        case "policy":
            is_true = set(request["policy"].split(",")) <= set(data["policy"].split(","))
        case "upgrade":
            is_later = after.since > entry["ended"] - _TICK_S  # that one has died since
            is_true = data["worker"] != told.worker and (is_later or data["worker"] == after.worker)
        case _:
            is_true = True
    return [] if is_true else [f"order {entry['number']} was to lead to {entry['to']!r}, and {after} is so"]


def _is_done(entry: Entry, *verbs: str) -> bool:
    return entry["verb"] in verbs and entry["code"] == Code.OK


def _is_odd(entry: Entry) -> bool:
    """Return whether an order ended as none may: by a bug, not at all, or failed without a reason."""
    return entry["code"] in (Code.BUG, Code.UNDER_WAY) or (entry["code"] != Code.OK) != bool(entry["error"])
