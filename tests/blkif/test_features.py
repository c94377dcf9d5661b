"""Tests of `xenbackend.blkif.features`: what we publish, and the syntax of a frontend's keys (R14)."""

from __future__ import annotations

from random import Random

import pytest

from tests import figures
from xenbackend.blkif.abi import LAYOUTS, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE
from xenbackend.blkif.features import (
    BadFrontend,
    Disk,
    Frontend,
    FrontendRing,
    Limits,
    parse_frontend,
    publish_at_connect,
    publish_at_probe,
)

SIMPLE = {"ring-ref": "8", "event-channel": "15"}
LARGEST = str(2**32 - 1)
# texts that are not unsigned decimal numbers (R14), even if int() accepts them
NO_NUMBERS = [
    "",
    " ",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1\n",
    "0x1",
    "1.0",
    "1e1",
    "1_0",
    "one",
    "\0",
    "\u0661",
    "\u00b2",
    "9" * 11,
]
NO_NUMBERS += ["9" * 5000]  # more digits than int() accepts


def parse(keys: dict[str, str], limits: Limits | None = None) -> Frontend:
    """Return what is parsed from a frontend's keys."""
    return parse_frontend(keys.get, limits or Limits())


def test_simplest_frontend() -> None:
    """A frontend that writes only a ring and a port has one page, one queue, the native layout, nothing persistent."""
    assert Frontend("x86_64-abi", [FrontendRing([8], 15)], persistent=False) == parse(SIMPLE)


def test_everything_at_once() -> None:
    """Queues, pages and protocol are read from the keys that io/blkif.h defines."""
    keys = {"multi-queue-num-queues": "2", "ring-page-order": "1", "protocol": "x86_32-abi", "feature-persistent": "1"}
    for queue in range(2):
        keys |= {f"queue-{queue}/ring-ref{page}": str(10 * queue + page) for page in range(2)}
        keys[f"queue-{queue}/event-channel"] = str(90 + queue)

    assert Frontend("x86_32-abi", [FrontendRing([0, 1], 90), FrontendRing([10, 11], 91)], persistent=True) == parse(
        keys
    )


@pytest.mark.parametrize(
    ("written", "understood"),
    [(None, "x86_64-abi"), ("x86_64-abi", "x86_64-abi"), ("x86_32-abi", "x86_32-abi"), ("arm-abi", "x86_64-abi")],
)
def test_protocols(written: str | None, understood: str) -> None:
    """Each protocol of io/protocols.h has its table; without the key the protocol is the native one."""
    keys = SIMPLE if written is None else {**SIMPLE, "protocol": written}

    assert understood == parse(keys).protocol
    assert understood in LAYOUTS


@pytest.mark.parametrize("written", ["", "x86_64", "X86_64-ABI", "x86_64-abi ", "ppc64-abi", "x" * 100_000])
def test_odd_protocols(written: str) -> None:
    """An unknown protocol is refused, and the sentence stays short."""
    with pytest.raises(BadFrontend, match=r"protocol .* is unknown") as refused:
        parse({**SIMPLE, "protocol": written})

    assert len(str(refused.value)) < 200


def test_what_a_guest_wrote_is_shown_harmless() -> None:
    """R13: a sentence that quotes a guest's text contains nothing that a terminal or a log would obey."""
    for key, value in {"protocol": "\x1b[2J\n\r\u202e", "ring-ref": "\x1b]0;\x07\n"}.items():
        with pytest.raises(BadFrontend) as refused:
            parse({**SIMPLE, key: value})

        assert str(refused.value).isprintable()
        assert str(refused.value).isascii()


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize("key", ["ring-ref", "event-channel", "multi-queue-num-queues", "ring-page-order"])
@pytest.mark.rows("R14")
def test_grammar_of_numbers(key: str, text: str) -> None:
    """R14: wherever a number is due, anything but an unsigned decimal is refused, and the sentence names the key."""
    with pytest.raises(BadFrontend, match=f"the frontend's {key} is"):
        parse({**SIMPLE, key: text})


@pytest.mark.parametrize("key", ["ring-ref", "event-channel"])
def test_range_of_references_and_ports(key: str) -> None:
    """Grant refs and ports have 32 bits: the largest number is accepted, the next one is not."""
    ring = parse({**SIMPLE, key: LARGEST}).rings[0]

    assert int(LARGEST) in {ring.grefs[0], ring.event_channel}
    with pytest.raises(BadFrontend, match=f"a number from 0 to {LARGEST}"):
        parse({**SIMPLE, key: str(2**32)})


@pytest.mark.parametrize("key", ["ring-ref", "event-channel"])
def test_what_must_be_there(key: str) -> None:
    """A ring without a page or a port is refused, and the sentence names the missing key."""
    with pytest.raises(BadFrontend, match=f"has not written {key}"):
        parse({name: value for name, value in SIMPLE.items() if name != key})


@pytest.mark.parametrize("limit", [1, 4, 8])
def test_queues_beyond_the_offer(limit: int) -> None:
    """As many queues as offered are accepted; none, or one more, is refused before any ring is read."""
    keys = {f"queue-{queue}/{key}": value for queue in range(10) for key, value in SIMPLE.items()} | SIMPLE
    limits = Limits(max_queues=limit)

    assert limit == len(parse({**keys, "multi-queue-num-queues": str(limit)}, limits).rings)
    for queues in (0, limit + 1, 2**32 - 1):
        with pytest.raises(BadFrontend, match=f"a number from 1 to {limit}"):
            parse({**keys, "multi-queue-num-queues": str(queues)}, limits)


def test_a_queue_without_its_keys() -> None:
    """With several queues each has its own ring; a missing one is named."""
    keys = {**SIMPLE, "multi-queue-num-queues": "2", "queue-0/ring-ref": "1", "queue-0/event-channel": "2"}
    with pytest.raises(BadFrontend, match="has not written queue-1/ring-ref"):
        parse(keys)


def test_one_queue_lies_flat() -> None:
    """A frontend with one queue writes its ring's keys into its own directory, as Linux does."""
    assert [FrontendRing([8], 15)] == parse({**SIMPLE, "multi-queue-num-queues": "1", "queue-0/ring-ref": "77"}).rings


@pytest.mark.parametrize("limit", [0, 2, 4])
def test_order_beyond_the_offer(limit: int) -> None:
    """Every ring order offered is accepted; a larger one is refused before any page is read."""
    keys = {f"ring-ref{page}": str(page) for page in range(64)} | {"event-channel": "1"}
    limits = Limits(max_ring_order=limit)
    for order in range(limit + 1):
        assert list(range(1 << order)) == parse({**keys, "ring-page-order": str(order)}, limits).rings[0].grefs
    for order in (limit + 1, 31, 2**32 - 1):
        with pytest.raises(BadFrontend, match=f"a number from 0 to {limit}"):
            parse({**keys, "ring-page-order": str(order)}, limits)


def test_a_page_is_missing() -> None:
    """Each page of a ring must be there, under its number; a missing one is named."""
    with pytest.raises(BadFrontend, match="has not written ring-ref1"):
        parse({"ring-page-order": "1", "ring-ref0": "1", "ring-ref": "9", "event-channel": "1"})


@pytest.mark.parametrize(
    ("keys", "gref"),
    [
        ({"ring-ref": "5"}, 5),
        ({"ring-ref": "5", "ring-ref0": "6"}, 5),
        ({"ring-page-order": "0", "ring-ref0": "6"}, 6),
        ({"ring-page-order": "0", "ring-ref0": "6", "ring-ref": "5"}, 6),
        ({"ring-page-order": "0", "ring-ref": "5"}, 5),
    ],
)
def test_names_of_a_single_page(keys: dict[str, str], gref: int) -> None:
    """Without an order the page's key is `ring-ref`; with order 0 it is `ring-ref0`, or `ring-ref` in some guests."""
    assert [gref] == parse({**keys, "event-channel": "1"}).rings[0].grefs


@pytest.mark.parametrize("text", [None, "0", "2", "true", "", "\u0661", *NO_NUMBERS])
def test_persistent_only_if_said_so(text: str | None) -> None:
    """R14: only "1" turns persistent grants on; any other value counts as absent."""
    keys = SIMPLE if text is None else {**SIMPLE, "feature-persistent": text}

    assert parse(keys).persistent is False


@pytest.mark.rows("C5")
def test_what_is_published_at_probe() -> None:
    """Before InitWait the limits of what a frontend may choose are published."""
    limits = Limits(max_queues=3, max_ring_order=2, max_segments=64)

    assert {
        "max-ring-page-order": "2",
        "multi-queue-max-queues": "3",
        "feature-max-indirect-segments": "64",
        "feature-persistent": "1",
    } == publish_at_probe(limits)


@pytest.mark.rows("C5")
def test_what_is_published_at_connect() -> None:
    """`sectors` counts units of 512 bytes for every sector size; a feature that the disk lacks is published as 0."""
    disk = Disk(size=1 << 20, sector_size=4096, read_only=False, can_flush=False, can_discard=False)

    assert {
        "sectors": "2048",
        "sector-size": "4096",
        "physical-sector-size": "4096",
        "info": "0",
        "feature-flush-cache": "0",
        "feature-barrier": "0",
        "feature-discard": "0",
    } == publish_at_connect(disk)


@pytest.mark.parametrize(("sector", "physical", "shown"), [(512, 0, "512"), (512, 4096, "4096"), (4096, 512, "4096")])
def test_what_is_published_of_sectors(sector: int, physical: int, shown: str) -> None:
    """The physical sector is the medium's, if that is known, and never less than a sector."""
    keys = publish_at_connect(Disk(1 << 20, sector, False, True, False, physical_sector_size=physical))

    assert (str(sector), shown) == (keys["sector-size"], keys["physical-sector-size"])


def test_what_is_published_of_discard() -> None:
    """A disk that can discard publishes its granularity, or else its sector size, and offers no secure discard."""
    for granularity, expected in ((0, "512"), (65536, "65536")):
        disk = Disk(
            size=1 << 20, sector_size=512, read_only=False, can_flush=True, can_discard=True,
            discard_granularity=granularity, discard_alignment=1024,
        )  # fmt: skip
        keys = publish_at_connect(disk)

        assert ("1", "1", "1") == (keys["feature-discard"], keys["feature-flush-cache"], keys["feature-barrier"])
        assert (expected, "1024", "0") == (
            keys["discard-granularity"], keys["discard-alignment"], keys["discard-secure"],
        )  # fmt: skip


@pytest.mark.parametrize("cdrom", [False, True])
@pytest.mark.parametrize("removable", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_info_bits(cdrom: bool, removable: bool, read_only: bool) -> None:
    """`info` has one bit for each of CD-ROM, removable and read-only."""
    disk = Disk(512, 512, read_only=read_only, can_flush=True, can_discard=False, cdrom=cdrom, removable=removable)
    bits = {VDISK_CDROM: cdrom, VDISK_REMOVABLE: removable, VDISK_READONLY: read_only}

    assert str(sum(bit for bit, is_set in bits.items() if is_set)) == publish_at_connect(disk)["info"]


def test_any_values_are_a_frontend_or_refused(request: pytest.FixtureRequest) -> None:
    """Whatever a frontend writes or leaves out, it is accepted within the limits or refused with a sentence."""
    chance, limits = Random(request.config.getoption("--seed")), Limits(max_queues=4)
    names = ["protocol", "multi-queue-num-queues", "ring-page-order", "feature-persistent", "ring-ref", "event-channel"]
    names += [f"ring-ref{page}" for page in range(16)]
    names += [f"queue-{queue}/{each}" for queue in range(4) for each in ("ring-ref", "ring-ref0", "event-channel")]
    count, served = request.config.getoption("--requests"), 0
    for _ in range(count):
        keys = {name: _any_value(chance) for name in names if chance.random() < 0.7}
        sentence = ""
        try:
            frontend = parse(keys, limits)
        except BadFrontend as problem:
            sentence = str(problem)
        assert sentence.isprintable()
        assert len(sentence) < 400
        if sentence:
            continue
        served += 1
        assert frontend.protocol in LAYOUTS
        assert 1 <= len(frontend.rings) <= limits.max_queues
        assert len({len(ring.grefs) for ring in frontend.rings}) == 1
        assert len(frontend.rings[0].grefs) in [1 << order for order in range(limits.max_ring_order + 1)]
        assert all(0 <= each < 2**32 for ring in frontend.rings for each in (*ring.grefs, ring.event_channel))

    assert served > count // 500
    figures.add("values and walks", count)


def _any_value(chance: Random) -> str:
    kind = chance.random()
    if kind < 0.75:
        return str(chance.choice((0, 1, 1, 1, 2, 4, 5, 8, 2**32 - 1)))
    if kind < 0.85:
        return chance.choice([*LAYOUTS])
    if kind < 0.95:
        return chance.choice(NO_NUMBERS)
    return "".join(
        chr(chance.choice((chance.randrange(256), chance.randrange(0x10FFFF)))) for _ in range(chance.randrange(9))
    )
