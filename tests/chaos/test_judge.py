"""Each kind of lie that an administrator may be told is seen by the judge of a chaos run, and the truth is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.judge import Told, Truth, untrue
from xenbackend.block.policy import DEFAULT
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

BEFORE = Truth("aio:/a", "aio:/a", "aio:/a", is_paused=False, policy=DEFAULT, worker=7, since=50.0)


def after(chain: str = "aio:/a", **changes: Any) -> Truth:
    """Return what is true after a round."""
    return replace(BEFORE, chain=chain, params=chain, layers=chain, **changes)


def entry(verb: str, code: Code = Code.OK, number: int = 1, to: str = "", error: str = "") -> dict[str, Any]:
    """Return what the service remembers of an order."""
    error = error or "" if code is Code.OK else error or "no"
    return {"number": number, "verb": verb, "code": code, "from": "aio:/a", "to": to, "error": error, "ended": 100.0}


def told(verb: str, code: Code = Code.OK, data: Any = None, number: int | None = 1, **request: Any) -> Told:
    """Return what an administrator was told."""
    return Told(verb, request, Answer(code, data, "" if code is Code.OK else "no", number), 7)


SET = told("set", data={"chain": "log:|aio:/a"}, chain="log:|aio:/a")
SET_ENTRY = entry("set", to="log:|aio:/a")
PAUSE, RESUME = entry("pause"), entry("resume", number=2)
TRUE: dict[str, tuple[list[Told], list[dict[str, Any]], Truth]] = {
    "a set": ([SET], [SET_ENTRY], after("log:|aio:/a")),
    "a snapshot of the image's own": (
        [told("snapshot", data={"chain": "aio:/a"}, file="@then")],
        [entry("snapshot", to="@then")],
        after(),
    ),
    "a file got a name": (
        [told("keep", data={"chain": "cow:/c|aio:/a"}, file="/c")],
        [entry("keep", to="cow:/c|aio:/a")],
        after("cow:/c|aio:/a"),
    ),
    "nobody heard": ([Told("set", {})], [SET_ENTRY], after("log:|aio:/a")),
    "a set that failed": ([told("set", Code.FAILED, {"chain": "aio:/a"})], [entry("set", Code.FAILED)], after()),
    "under way, then done": ([told("set", Code.UNDER_WAY)], [SET_ENTRY], after("log:|aio:/a")),
    "the service went": ([told("set", Code.UNDER_WAY, number=None)], [entry("set", Code.GONE)], after()),
    "the other one had come first": (
        [SET, told("snapshot", Code.BUSY, {"chain": "log:|aio:/a"}, 2, file="/b")],
        [SET_ENTRY, entry("snapshot", Code.BUSY, 2)],
        after("log:|aio:/a"),
    ),
    "paused and resumed": ([told("pause", data={"paused": True})], [PAUSE, RESUME], after()),
    "paused": ([told("pause", data={"paused": True})], [PAUSE], after(is_paused=True)),
    "upgraded": ([told("upgrade", data={"worker": 9})], [entry("upgrade")], after(worker=9, since=90.0)),
    "killed since": ([told("upgrade", data={"worker": 9})], [entry("upgrade")], after(worker=11, since=101.0)),
    "killed at once": ([told("upgrade", data={"worker": 9})], [entry("upgrade")], after(worker=11, since=100.01)),
    "a dry run": (
        [told("set", data={"chain": "aio:/a"}, chain="log:|aio:/a", dry_run=True)],
        [entry("set --dry-run")],
        after(),
    ),
    "no log:": ([told("command", Code.INVALID)], [entry("command", Code.INVALID)], after()),
}
LIES: dict[str, tuple[list[Told], list[dict[str, Any]], Truth]] = {
    "done, and it is not": ([SET], [SET_ENTRY], after()),
    "params did not follow": ([SET], [SET_ENTRY], replace(after("log:|aio:/a"), params="aio:/a")),
    "the worker has another": ([SET], [SET_ENTRY], replace(after("log:|aio:/a"), layers="aio:/a")),
    "failed, and it was done": ([told("set", Code.FAILED)], [entry("set", Code.FAILED)], after("log:|aio:/a")),
    "gone, and it was done": ([Told("set", {})], [entry("set", Code.GONE)], after("log:|aio:/a")),
    "remembered otherwise": ([told("set", Code.FAILED)], [SET_ENTRY], after("log:|aio:/a")),
    "another sentence": ([told("set", Code.FAILED)], [entry("set", Code.FAILED, error="yes")], after()),
    "another order": ([told("set", Code.FAILED, number=3)], [entry("set", Code.FAILED)], after()),
    "a chain that never was": ([told("set", Code.BUSY, {"chain": "ram:1M"})], [entry("set", Code.BUSY)], after()),
    "another file": (
        [told("snapshot", data={"chain": "qcow2:/c"}, file="/b")],
        [entry("snapshot", to="qcow2:/c")],
        after("qcow2:/c"),
    ),
    "a name that it has not": ([Told("keep", {})], [entry("keep", to="cow:/c|aio:/a")], after()),
    "dropped below a guest": ([told("drop", data={"chain": "aio:/a"})], [entry("drop", to="aio:/a")], after()),
    "never ended": ([told("set", Code.UNDER_WAY)], [entry("set", Code.UNDER_WAY)], after()),
    "paused, and it is not": ([Told("pause", {})], [PAUSE], after()),
    "not paused, and it is": ([Told("pause", {})], [entry("pause", Code.GONE)], after(is_paused=True)),
    "resumed, and it is not": ([Told("resume", {})], [PAUSE, RESUME], after(is_paused=True)),
    "policy": ([Told("policy", {})], [entry("policy", to="read=report")], after()),
    "the same worker": ([told("upgrade", data={"worker": 7})], [entry("upgrade")], after()),
    "another worker": ([told("upgrade", data={"worker": 9})], [entry("upgrade")], after(worker=8, since=90.0)),
    "a bug": ([told("set", Code.BUG)], [entry("set", Code.BUG)], after()),
    "a bug of a command that only reads": ([told("command", Code.BUG, number=None)], [], after()),
    "no number": ([told("set", Code.FAILED, number=None)], [], after()),
}


@pytest.mark.parametrize("name", TRUE)
def test_the_truth_is_no_lie(name: str) -> None:
    """What is so may be said."""
    assert [] == untrue(BEFORE, *TRUE[name])


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_found(name: str) -> None:
    """What is not so is told, once at least."""
    assert untrue(BEFORE, *LIES[name])


def test_a_layer_that_is_there_is_found() -> None:
    """Where the chain had a `log:` layer all the time, an answer that says otherwise is a lie."""
    before = replace(BEFORE, chain="log:|aio:/a")
    refusal = told("command", Code.INVALID)

    assert untrue(before, [refusal], [entry("command", Code.INVALID)], after("log:|aio:/a"))
