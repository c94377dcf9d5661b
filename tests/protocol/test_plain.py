"""Answers of services of several releases get one set of names, with every key."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.answering import CHAIN, DISK, ENTRY, LAYER, Request, answering, working
from xenbackend import counters
from xenbackend.cli.main import main
from xenbackend.protocol import plain
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError, call
from xenbackend.protocol.codes import Code
from xenbackend.protocol.plain import completed

# An answer of the first services of this version, before the names of today.
FIRST = {
    "vbd": "5/xvda", "kind": "vbd", "domid": 5, "device": "xvda", "chain": "log:|aio:/img", "read_only": False,
    "state": "Connected", "frontend_state": "Connected", "phase": "serving", "worker": 12, "since": 0.0, "error": "",
    "layers": [{"text": "log:", "size": 1 << 20}], "counters": {"reads": 7}, "latency_ns": {"50%": 1},
}  # fmt: skip
OLD: dict[str, Any] = {
    "ping": {"pid": 1}, "status": [FIRST], "orders": [{"number": 3, "verb": "set", "code": "ok"}], "stop": {"pid": 1},
}  # fmt: skip


def old(request: Request) -> Answer:
    """Answer as such a service does."""
    verb = request["verb"]
    return Answer(Code.OK, OLD[verb], order=17) if verb in OLD else working(request)


def test_all_that_a_service_says_is_known_here() -> None:
    """Each key of an answer has a value here that stands for a service which does not tell it."""
    said = {verb: working({"verb": verb}).data for verb in OLD}

    assert set(plain.SERVICE) == set(said["ping"])
    assert {*plain.DISK, "vbd", "node", "kind", "domid", "device"} == set(DISK)
    assert {*plain.LAYER, "text"} == set(LAYER)
    assert set(plain.ORDER) == set(ENTRY)
    assert set(plain.STOP) == set(said["stop"])
    assert set(plain.UNTOLD) == set(said["stop"]["untold"][0])


def claims_nothing(value: Any) -> bool:
    """Return whether a value says only that it is not known."""
    if isinstance(value, dict | list):
        return all(map(claims_nothing, value.values() if isinstance(value, dict) else value))
    return value in (None, 0, "", "Unknown")


def test_what_was_not_told_claims_nothing() -> None:
    """A value that stands for a missing key has the usual type and claims nothing: it is null where 0 would be an
    answer, and an unknown state is Unknown.
    """
    stop = working({"verb": "stop"}).data
    said = [working({"verb": "ping"}).data, DISK, LAYER, ENTRY, stop, stop["untold"][0]]
    known = [plain.SERVICE, plain.DISK, plain.LAYER, plain.ORDER, plain.STOP, plain.UNTOLD]
    nulls = [{"since"}, {"read_only", "waits_s", "worker", "worker_since"}, set(), {"ended"}, set(), set()]

    assert nulls == [{key for key, value in each.items() if value is None} for each in known]
    assert {"Unknown"} == {plain.DISK["state"], plain.DISK["frontend_state"]}
    for values, example in zip(known, said, strict=True):
        for key, value in values.items():
            assert claims_nothing(value), key
            assert value is None or key in ("waits_s", "figures") or type(value) is type(example[key]), key


def test_what_was_said_stays_as_it_is() -> None:
    """Answers of this version, and unknown keys of later ones, are left as they are."""
    for verb in ("ping", "status", "orders", "stop"):
        said = working({"verb": verb}).data
        assert said == completed(verb, said)
    assert {**plain.SERVICE, "pid": 1, "later": 2} == completed("ping", {"pid": 1, "later": 2})
    assert CHAIN == completed("set", CHAIN)
    assert None is completed("ping", None)


def test_a_disk_without_its_newer_keys() -> None:
    """An older service's disk gets a place in xenstore, counters from 0, and layers under today's name."""
    [known] = completed("status", [FIRST])

    assert ("vbd/5/51712", 7, 0) == (known["node"], known["counters"]["reads"], known["counters"]["in_flight"])
    assert counters.BUCKETS == len(known["latency_histogram"])
    assert ("log:", {}, 1 << 20) == tuple(known["layers"][0][key] for key in ("layer", "figures", "size"))


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["status", "--json"], ["top", "--once", "--interval", "1"], ["metrics"], ["metrics", "--json"],
        ["latency", "5/xvda", "--interval", "1"], ["latency", "5/xvda", "--total", "--json"], ["orders"],
        ["orders", "3"], ["stop", "--force"], ["doctor"], ["doctor", "5/xvda", "--json"],
        ["__complete", "bash", "xenbackend pause "],
    ],
)  # fmt: skip
def test_every_command_takes_the_answers_of_an_older_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """With an older service each command prints what is known, and does not fail with a bug."""
    with answering(tmp_path / "x", old) as control:
        monkeypatch.setenv("XENBACKEND_SOCKET", control.path)
        main(words)
    printed, problem = capsys.readouterr()

    assert printed
    assert "Traceback" not in problem
    assert "KeyError" not in printed + problem


def test_a_write_that_was_not_told_has_every_key() -> None:
    """An `untold` entry that has only the disk's name gets every other key."""
    said = completed("stop", {"pid": 1, "untold": [{"vbd": "5/xvda"}]})

    assert {"pid": 1, "untold": [{**plain.UNTOLD, "vbd": "5/xvda"}]} == said


def test_it_is_done_for_whoever_asks(tmp_path: Path) -> None:
    """The client completes each answer, so that no command needs to."""
    with answering(tmp_path / "x", old) as control:
        assert {**plain.SERVICE, "pid": 1} == call(control.path, {"verb": "ping"}).data


def test_what_no_service_says_is_told(tmp_path: Path) -> None:
    """A number in place of a disk is an error; a disk with few keys is passed on."""
    assert "aio:/img" == completed("status", [{"chain": "aio:/img"}])[0]["chain"]
    with (
        answering(tmp_path / "x", lambda _: Answer(Code.OK, [7])) as control,
        pytest.raises(ServiceError, match="not a service of this version"),
    ):
        call(control.path, {"verb": "status"})


def test_an_answer_that_is_altered_alters_no_other() -> None:
    """Changing one completed answer does not change another one."""
    [first] = completed("status", [FIRST])
    whole = deepcopy(first)
    first["walls"].append("x")
    first["latency_by_operation"]["read"]["buckets"][0] = 7
    first["layers"][0]["figures"]["hits"] = 1

    assert [whole] == completed("status", [FIRST])


def test_a_disk_of_the_last_release() -> None:
    """A disk of the last release, whose `vbd` was its place in xenstore, gets today's `vbd` and `node`; its other keys
    are left.
    """
    [values] = completed("status", [{**FIRST, "vbd": "vbd/5/51712"}])

    assert ("5/xvda", "vbd/5/51712", {"50%": 1}) == (values["vbd"], values["node"], values["latency_ns"])


def test_where_a_disk_is_is_made_up_only_where_nobody_says_it() -> None:
    """A `node` that was told is kept. For an unknown device the made-up one has number 0, and that is no error."""
    [told] = completed("status", [{**DISK, "node": "vbd/5/1"}])
    [unknown] = completed("status", [{**FIRST, "vbd": "5/nosuch", "device": "nosuch"}])

    assert ("vbd/5/1", "vbd/5/0", "5/nosuch") == (told["node"], unknown["node"], unknown["vbd"])


def test_layers_have_one_name() -> None:
    """Layers in the answer to an order get the same name as in `status`, without figures."""
    [layer] = plain.answered(CHAIN)["layers"]

    assert {"layer": "aio:/img", **{key: LAYER[key] for key in LAYER if key not in ("text", "figures")}} == layer
    assert {"layer": "aio:/a"} == plain.layer("aio:/a")
    planned = plain.answered({**CHAIN, "before": ["aio:/a"], "after": [LAYER]})
    assert ([{"layer": "aio:/a"}], [layer]) == (planned["before"], planned["after"])
    assert {} == plain.answered("paused") == plain.answered(None)
