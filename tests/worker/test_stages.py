"""A chain exchanged in a worker's process while a frontend is there, comes, or leaves."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.driven import DOMID, Driven
from tests.openers import Openers
from xenbackend import counters, journal
from xenbackend.blkif.abi import BLKIF_OP_WRITE, NATIVE
from xenbackend.kernel import memfd
from xenbackend.kernel.ports import open_host
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.steps import run
from xenbackend.protocol import jobs, messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE
from xenbackend.worker.channel import Channel
from xenbackend.worker.stages import Stages

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE


def test_a_chain_is_exchanged_under_a_guest(driven: Driven, images: list[Path]) -> None:
    """Requests in flight end in the former chain, and later ones go to the new chain; memories of the former one are
    dropped.
    """
    one, two = images
    driven.connect(f"log:|delay:write=50ms|aio:{one}")
    early = driven.begin_write(DATA)
    swap = driven.worker.put(messages.Swap(f"aio:{two}", replaces=True, order=17))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # the exchange has begun
    late = driven.frontend.submit(BLKIF_OP_WRITE, 8, data=DATA)
    reply = driven.worker.expect_reply(swap)
    told = [each.chain for each in driven.worker.said if isinstance(each, messages.Standing)]
    driven.frontend.wait([early, late])
    dropped = [message for message in driven.worker.said if isinstance(message, messages.Drop)]

    standing = driven.worker.stand()
    assert (Code.OK, f"aio:{two}") == (reply.code, told[-1])  # the standing comes before the reply
    assert f"aio:{two}" == standing.chain == standing.layers[0].text
    assert [next(iter(driven.worker.kept))] == [message.name for message in dropped]
    assert [DATA, bytes(PAGE)] == [one.read_bytes()[at : at + PAGE] for at in (0, PAGE)]
    assert [bytes(PAGE), DATA] == [two.read_bytes()[at : at + PAGE] for at in (0, PAGE)]
    agreed = journal.AGREED.read(driven.worker.journal) or {}
    assert (f"aio:{two}", 17) == (agreed["chain"], agreed["order"])


@pytest.mark.parametrize("chain", ["aio:/nonexistent/image", "ram:512K", "coarse:|ram:1M"])
def test_a_chain_that_cannot_be_taken_changes_nothing(driven: Driven, chain: str) -> None:
    """An exchange that is refused is answered with a sentence, and the guest is served as before."""
    driven.connect("ram:1M").write(0, DATA)
    reply = driven.worker.ask(messages.Swap(chain, replaces=True))

    assert Code.INVALID == reply.code
    assert chain.rsplit(":", maxsplit=1)[-1] in reply.sentence
    assert DATA == driven.frontend.read(0, 8)
    assert "ram:1M" == driven.worker.stand().chain


@pytest.mark.parametrize("layer", ["cow:{}", "log:{}", "checksum:{}", "cache:{},size=1M,mode=writeback"])
def test_only_an_exchange_creates_files(driven: Driven, images: list[Path], tmp_path: Path, layer: str) -> None:
    """A dry run creates no file and begins no empty one, nor does an exchange that is refused; one that is done creates
    and begins what it needs, even after a dry run.
    """
    (place := tmp_path / "records").mkdir()
    (tmp_path / "empty").touch()
    driven.connect(f"aio:{images[0]}").write(0, DATA)
    for file in (place / "new", tmp_path / "empty"):
        chain = f"{layer.format(file)}|aio:{images[0]}"
        looked = driven.worker.ask(messages.Swap(chain, replaces=True, is_dry_run=True))
        refused = driven.worker.ask(messages.Swap(f"{layer.format(file)}|ram:512K", replaces=True))
        assert (chain.split("|"), "cannot shrink" in refused.sentence) == (json.loads(looked.data), True)
        assert [] == list(place.iterdir())
        assert b"" == (tmp_path / "empty").read_bytes()
    missing = driven.worker.ask(
        messages.Swap(f"{layer.format(place / 'no' / 'file')}|aio:{images[0]}", replaces=True, is_dry_run=True)
    )
    assert (Code.INVALID, True) == (missing.code, f"there is no directory {place / 'no'}" in missing.sentence)

    chain = f"{layer.format(place / 'new')}|aio:{images[0]}"
    assert Code.OK == driven.worker.ask(messages.Swap(chain, replaces=True)).code
    assert chain == driven.worker.stand().chain
    driven.frontend.write(8, DATA)
    assert 2 * DATA == driven.frontend.read(0, 16)
    assert (place / "new").exists()
    kept = driven.worker.openers.kept[str(place / "new")]
    assert (place / "new").stat().st_ino == os.fstat(kept).st_ino


@pytest.mark.parametrize("is_early", [True, False], ids=["before it is served", "in service"])
def test_a_layer_that_fails_for_ever_pauses_the_disk(driven: Driven, *, is_early: bool) -> None:
    """If a layer's callback fails again and again, the layer is stopped, and the disk waits for `resume`; the trouble
    names the layer.
    """
    driven.open("clumsy:at=watch|ram:1M")
    if not is_early:
        driven.attach(Wishes())
    driven.worker.ask(messages.Command("clumsy", "ring", []))
    if is_early:
        driven.attach(Wishes())
    while not (trouble := driven.worker.stand().trouble):
        pass
    request = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    driven.worker.stand()
    driven.frontend.poll()
    waiting = request.status
    driven.worker.ask(messages.Resume())  # after which it may fail as often again; requests pass meanwhile
    driven.frontend.wait([request])
    while not driven.worker.stand().trouble:
        pass
    assert waiting is None
    assert "the layer clumsy" in trouble
    assert "xenbackend resume" in trouble


def test_what_can_be_refused_at_once_is(driven: Driven) -> None:
    """An exchange that cannot succeed is refused without waiting for the requests in flight."""
    driven.connect("delay:write=500ms|ram:1M")
    request = driven.begin_write(DATA)
    reply = driven.worker.ask(messages.Swap("aio:/nonexistent/image"))
    driven.frontend.poll()
    status = request.status
    driven.frontend.wait([request])

    assert Code.INVALID == reply.code
    assert status is None


def test_a_last_flush_that_fails_keeps_the_chain(driven: Driven, images: list[Path]) -> None:
    """If the former chain's last flush fails, the exchange fails, the former chain stays, and the disk is paused."""
    driven.connect(f"fault:op=flush,limit=1|aio:{images[0]}")
    reply = driven.worker.ask(messages.Swap(f"aio:{images[1]}", replaces=True))

    assert Code.FAILED == reply.code
    assert "the last flush failed" in reply.sentence
    assert "a flush failed (EIO)" in driven.worker.stand().flush_failed
    assert 5 == journal.poisoned(driven.worker.journal)
    driven.worker.ask(messages.Resume())
    driven.frontend.write(0, DATA)
    assert ("", 0) == (driven.worker.stand().flush_failed, journal.poisoned(driven.worker.journal))


def test_a_server_that_is_away_keeps_the_chain(driven: Driven, images: list[Path]) -> None:
    """If the former chain's server is away, the exchange fails, but no flush has: the disk goes on with that chain."""
    driven.connect(f"fault:op=flush,errno=ENOLINK,limit=1|aio:{images[0]}")
    reply = driven.worker.ask(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.frontend.write(0, DATA)
    driven.frontend.flush()

    assert (Code.FAILED, "the last flush failed: the server of the disk is away") == (reply.code, reply.sentence)
    assert ("", 0) == (driven.worker.stand().flush_failed, journal.poisoned(driven.worker.journal))


def test_two_exchanges_at_once_are_one_too_many(driven: Driven, images: list[Path]) -> None:
    """While a chain is being exchanged, a second exchange or a snapshot is refused; the first one is done."""
    driven.connect("delay:write=100ms|null:1M")
    request = driven.begin_write(DATA)
    first, second = (driven.worker.put(messages.Swap(f"aio:{path}", replaces=True)) for path in images)
    branch = driven.worker.put(messages.Branch(f"{images[0]}.leaf", ""))
    replies = [driven.worker.expect_reply(each) for each in (second, branch, first)]
    driven.frontend.wait([request])

    assert [Code.BUSY, Code.BUSY, Code.OK] == [reply.code for reply in replies]
    assert f"the chain is already being exchanged, for aio:{images[0]}" == replies[0].sentence
    assert f"aio:{images[0]}" == driven.worker.stand().chain
    assert not Path(f"{images[0]}.leaf").exists()


def test_who_leaves_during_an_exchange_leaves_after_it(driven: Driven, images: list[Path]) -> None:
    """A frontend that leaves during an exchange is disconnected after it."""
    driven.connect(f"delay:flush=50ms,write=50ms|aio:{images[0]}")
    driven.begin_write(DATA)
    swap = driven.worker.put(messages.Swap(f"delay:flush=50ms|aio:{images[1]}", replaces=True))
    driven.worker.tell(messages.Leave)
    during = driven.worker.expect_standing().stage
    reply = driven.worker.expect_reply(swap)

    assert (Stage.LEAVING, Code.OK) == (during, reply.code)
    assert f"delay:flush=50ms|aio:{images[1]}" == driven.worker.expect_standing(Stage.OPEN).chain
    driven.worker.end()


def test_another_service_that_asks_during_an_exchange_hears_how_it_ended(driven: Driven, images: list[Path]) -> None:
    """A report that is ordered during an exchange comes after it: else a new service would take the former chain for
    the one in service, and lose writes.
    """
    driven.connect(f"delay:flush=50ms,write=50ms|aio:{images[0]}")
    driven.begin_write(DATA)
    driven.worker.put(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.worker.tell(messages.Report)

    assert f"aio:{images[1]}" == driven.worker.expect_standing().chain
    driven.worker.end()


def test_who_comes_during_an_exchange_comes_after_it(driven: Driven, images: list[Path]) -> None:
    """A frontend that connects during an exchange is served by the new chain."""
    driven.open(f"delay:flush=50ms|aio:{images[0]}")
    driven.announce(Wishes())
    swap = driven.worker.put(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.offer_rings()
    reply = driven.worker.expect_reply(swap)
    driven.joined().write(0, DATA)

    assert Code.OK == reply.code
    assert DATA == images[1].read_bytes()[:PAGE]


def test_a_supervisor_that_dies_during_an_exchange(driven: Driven, images: list[Path]) -> None:
    """If the supervisor dies during an exchange, the worker ends in order after it."""
    driven.connect(f"delay:flush=50ms,write=50ms|aio:{images[0]}")
    driven.begin_write(DATA)
    driven.worker.put(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.worker.socket.close()

    assert 0 == driven.worker.process.wait(10)
    assert DATA == images[0].read_bytes()[:PAGE]


def test_no_chain_left_ends_the_worker(driven: Driven) -> None:
    """If a layer cannot be closed in an exchange, no chain is left: an alarm says so, the worker ends, and its
    successor opens the former chain.
    """
    driven.connect("clumsy:at=close|ram:1M")
    reply = driven.worker.ask(messages.Swap("null:1M", replaces=True))

    assert Code.FAILED == reply.code
    assert 1 == driven.worker.process.wait(10)
    assert ["critical"] == [line.level for line in driven.worker.lines]
    assert "clumsy:at=close|ram:1M" == (journal.AGREED.read(driven.worker.journal) or {})["chain"]


def test_what_a_snapshot_would_serve_is_told(driven: Driven, images: list[Path]) -> None:
    """A snapshot makes the new image, and returns the chain with it, which can then be put in. An existing file is left
    alone.
    """
    driven.connect(f"log:|aio:{images[0]}").write(0, DATA)
    leaf = f"{images[0]}.leaf"
    taken = driven.worker.ask(messages.Branch(str(images[1]), ""))
    reply = driven.worker.ask(messages.Branch(leaf, ""))
    looked_at = driven.worker.ask(messages.Swap(reply.data, is_dry_run=True))
    before = driven.worker.stand().chain
    done = driven.worker.ask(messages.Swap(reply.data))

    assert (Code.INVALID, "exists already" in taken.sentence) == (taken.code, True)
    assert reply.data.startswith(f"log:|qcow2:{leaf}")
    assert [*reply.data.split("|"), f"aio:{images[0]}"] == json.loads(looked_at.data)
    assert (Code.OK, f"log:|aio:{images[0]}") == (done.code, before)
    assert DATA == driven.frontend.read(0, 8)


def test_an_error_of_the_host_names_the_snapshot(driven: Driven, images: list[Path]) -> None:
    """If the new image cannot be made, the reply names the file and the reason."""
    driven.connect(f"aio:{images[0]}")
    leaf = str(images[0].with_name("x" * 300))
    reply = driven.worker.ask(messages.Branch(leaf, ""))

    assert (Code.FAILED, f"{leaf}: File name too long") == (reply.code, reply.sentence)


def test_a_snapshot_that_the_image_keeps_itself(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """A snapshot within an image is made by its source; one that cannot, or that does not get the writes, says so."""
    driven.connect(f"log:|aio:{images[0]}")
    refused = driven.worker.ask(messages.Branch("@then", ""))
    driven.worker.ask(messages.Swap(f"cow:{tmp_path}/cow|aio:{images[0]}", replaces=True))
    above = driven.worker.ask(messages.Branch("@then", ""))

    assert (Code.FAILED, True) == (refused.code, "has no snapshots of its own" in refused.sentence)
    assert (Code.FAILED, True) == (above.code, "a snapshot of the image would miss it" in above.sentence)
    assert not list(Path.cwd().glob("@then"))
    assert bytes(PAGE) == driven.frontend.read(0, 8)


def test_other_content_is_refused_unless_that_is_meant(driven: Driven, images: list[Path]) -> None:
    """A running guest gets another image only with --replace."""
    driven.connect(f"aio:{images[0]}")
    reply = driven.worker.ask(messages.Swap(f"aio:{images[1]}"))

    assert (Code.INVALID, f"aio:{images[0]}") == (reply.code, driven.worker.stand().chain)
    assert "--replace" in reply.sentence


def test_an_export_excludes_an_exchange(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """While a disk is exported to a device model, an exchange is refused, and the reply says why."""
    driven.open(f"aio:{images[0]}", export=str(tmp_path / "nbd" / "sock"))
    reply = driven.worker.ask(messages.Swap(f"log:|aio:{images[0]}"))

    assert Code.BUSY == reply.code
    assert "exported to a device model" in reply.sentence


def test_a_socket_that_cannot_be_made_is_told(driven: Driven, tmp_path: Path) -> None:
    """If the export's socket cannot be made, that is logged, as the guest cannot boot from it; the disk is served."""
    (tmp_path / "nbd").write_text("a file where the directory should be")
    opened = driven.open("ram:1M", export=str(tmp_path / "nbd" / "sock"))
    (line,) = driven.worker.lines

    assert (Stage.OPEN, "") == (opened.stage, opened.export)
    assert "device models cannot boot from this disk" in line.event
    driven.attach(Wishes()).write(0, DATA)


def test_a_command_does_not_wait_for_an_exchange(driven: Driven, images: list[Path]) -> None:
    """During an exchange a command is answered at once, by the chain that is open; a pause waits."""
    driven.connect(f"fault:op=read,limit=1|delay:write=100ms|aio:{images[0]}")
    driven.begin_write(DATA)
    questions = [
        messages.Swap(f"aio:{images[1]}", replaces=True),
        messages.Pause(),
        messages.Command("fault", "count", []),
    ]
    swap, pause, command = (driven.worker.put(question) for question in questions)
    replies = [driven.worker.expect_reply(each) for each in (command, swap, pause)]

    assert [Code.OK] * 3 == [reply.code for reply in replies]
    assert "0" == replies[0].data


@pytest.mark.parametrize(("after", "expected"), [("fault:|ram:1M", (Code.OK, "0")), ("", (Code.GONE, ""))])
def test_a_command_waits_while_a_chain_closes(driven: Driven, after: str, expected: tuple[Code, str]) -> None:
    """A command that comes while layers close reaches none of them: the next chain answers it, if there is one."""
    driven.open("fault:|log:|lingering:|ram:1M", read_only=True)  # so that there is no flush to wait for
    worker = driven.worker
    if after:
        worker.put(messages.Swap(after, replaces=True))
    else:
        worker.tell(messages.Close)
    commands = [messages.Command("fault", "count", []), messages.Command("log", "peek", [])]
    replies = [worker.expect_reply(number) for number in [worker.put(command) for command in commands]]

    assert expected == (replies[0].code, replies[0].data)
    assert (Code.INVALID if after else Code.GONE) == replies[1].code


def test_closed_layers_are_not_counted(driven: Driven) -> None:
    """The figures of layers are published once a second, but not while layers close: a closed one may have none."""
    driven.connect("throttle:iops=100000,group=g|lingering:close=1200ms|ram:1M")
    reply = driven.worker.ask(messages.Swap("throttle:iops=10|ram:1M", replaces=True))

    assert Code.OK == reply.code
    assert [] == [each.event for each in driven.worker.lines if "bug" in each.event]
    assert 0 == driven.worker.counters()["bugs"]


def test_who_is_killed_during_an_exchange_leaves_the_former_chain(driven: Driven, images: list[Path]) -> None:
    """The journal has the former chain until a request can go to the new one, so that a successor serves the right
    chain.
    """
    driven.connect(f"delay:write=200ms|aio:{images[0]}")
    request = driven.begin_write(DATA)
    driven.worker.put(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.worker.ask(messages.Command("nosuch", "get", []))  # the exchange has begun
    driven.kill()
    left = (journal.AGREED.read(driven.worker.journal) or {})["chain"]
    driven.succeed(left, resumes=True)
    driven.frontend.wait([request])

    assert f"delay:write=200ms|aio:{images[0]}" == left
    assert [DATA, bytes(PAGE)] == [path.read_bytes()[:PAGE] for path in images]


def test_an_exchange_before_a_guest_is_taken_over_keeps_what_it_had_agreed(driven: Driven, images: list[Path]) -> None:
    """A successor may exchange the chain before it maps the rings: requests in flight are then done there, once."""
    driven.connect(f"delay:write=200ms|aio:{images[0]}")
    request = driven.begin_write(DATA)
    driven.kill()
    driven.start_successor()
    driven.open(f"aio:{images[0]}", resumes=True)
    reply = driven.worker.ask(messages.Swap(f"aio:{images[1]}", replaces=True))
    driven.worker.tell(messages.Serve, None)
    standing = driven.worker.expect_standing(Stage.SERVING)
    driven.frontend.wait([request])

    assert (Code.OK, "") == (reply.code, standing.failure)
    assert [bytes(PAGE), DATA] == [path.read_bytes()[:PAGE] for path in images]


def test_a_full_counter_of_bugs_wraps(tmp_path: Path) -> None:
    """Whatever a predecessor has left in the counter of bugs, a bug is counted and reported."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = memfd.make("journal", journal.SIZE)
    page = memfd.map_sealed(memory, journal.SIZE)
    words = page[: counters.SIZE].cast("Q")
    reactor = Reactor()
    with ours, theirs:
        order = messages.Open(1, "vbd/5/51712", f"xenbackend.rig.host:{tmp_path}", DOMID, "null:1M", read_only=False)
        stages = Stages(order, [memory], reactor, Channel(theirs, reactor), lambda bug: pytest.fail(str(bug)), None)
        words[counters.INDEX["bugs"]] = (1 << 64) - 1
        found = []
        for _ in range(2):
            assert "" == stages.count_bug(KeyError("x"))
            found.append(counters.snapshot(page)["bugs"])
        stages.close()
    reactor.close()

    assert [0, 1] == found


def test_bugs_of_an_earlier_connection_are_remembered(tmp_path: Path) -> None:
    """D8: after a bug, later connections expect that a lost request may still come back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = memfd.make("journal", journal.SIZE)
    reactor, openers = Reactor(), Openers()
    with ours, theirs, Xen(tmp_path):
        guest = Guest(tmp_path, DOMID, 64)
        host = f"xenbackend.rig.host:{tmp_path}"
        order = messages.Open(1, "vbd/5/51712", host, DOMID, "null:1M", read_only=False)
        stages = Stages(order, [memory], reactor, Channel(theirs, reactor), lambda bug: pytest.fail(str(bug)), None)
        job = jobs.Job(order.vbd, [order.chain], read_only=False, host=host, frontend_domid=DOMID)
        opener = openers.remote(job)
        stages.open(opener)
        opener.close()
        found = []
        for _ in range(3):
            ring = GuestRing(guest, NATIVE, 0, open_host(host).fence)
            parameters = messages.RingParameters(ring.grefs, ring.port.number)
            run(stages.serve(messages.Connect(NATIVE.protocol, [parameters], persistent=True)))
            assert stages.connection is not None
            found.append(stages.connection.engine._expects_strays)
            if len(found) == 2:
                stages.connection.engine.contain(KeyError("x"), [])
            run(stages.leave(), lambda *_: reactor.stop())
            reactor.run()
        stages.close()
        guest.close()
    reactor.close()
    openers.close()

    assert [False, False, True] == found
