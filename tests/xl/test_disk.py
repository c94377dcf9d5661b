"""Disk lines, compared with what libxlutil makes of them."""

from __future__ import annotations

import random
import re
from dataclasses import fields

import pytest

from tests.tools.xlu import Disk, Xlu
from xenbackend.block import drivers
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ChainError, ConfigError
from xenbackend.xl.disk import _OPTION, read, rewrite

BEFORE, SINCE = (4, 17), (4, 19)
TAIL = "access=rw,script=block-xenbackend,target="

LITERALS = [  # what an operator writes, and what xl gets
    ("tap2:log:|aio:/img,xvda,w", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2: log:|aio:/img,xvda,w", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("  tap2:log:|aio:/img , xvda , w", f"vdev=xvda,{TAIL}log:|aio:/img "),
    ("tap2:log:|aio:/img,xvda", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,,", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,w,", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,r", "vdev=xvda,access=ro,script=block-xenbackend,target=log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,ro", "vdev=xvda,access=ro,script=block-xenbackend,target=log:|aio:/img"),
    ("tap2:log:|aio:/img,xvda,rw", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:/x,limit=1G|aio:/img,cache=on,xvda,w", f"vdev=xvda,{TAIL}log:/x,limit=1G|aio:/img,cache=on"),
    ("tap2:delay:discard=5ms,write=1ms|ram:64M,51712", f"vdev=51712,{TAIL}delay:discard=5ms,write=1ms|ram:64M"),
    (r"tap2:aio:/a\,b,xvda,w", rf"vdev=xvda,{TAIL}aio:/a\,b"),
    (r"tap2:aio:/a\,discard,xvda,w", rf"vdev=xvda,{TAIL}aio:/a\,discard"),
    (r"tap2:aio:/a\,,xvda,w", rf"vdev=xvda,{TAIL}aio:/a\,,"),
    (r"tap2:aio:/a\\,xvda,w", rf"vdev=xvda,{TAIL}aio:/a\\"),
    ("tap2:aio:/img,xvda,w", f"vdev=xvda,{TAIL}aio:/img"),
    ("tap2:tapdisk:aio:/img,xvda,w", f"vdev=xvda,{TAIL}aio:/img"),
    ("tap2:ram:64M,xvda,w", f"vdev=xvda,{TAIL}ram:64M"),
    ("tap2:aio:/i.iso,hdc:cdrom,r", "vdev=hdc,devtype=cdrom,access=ro,script=block-xenbackend,target=aio:/i.iso"),
    ("tap2:aio:/img,xvda:disk,w", f"vdev=xvda,devtype=disk,{TAIL}aio:/img"),
    ("tap2:log:|aio:/img,xvda,w,discard", f"vdev=xvda,discard,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,vdev=xvda,access=rw", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap2:log:|aio:/img,vdev=xvda,w", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("vdev=xvda,tap2:log:|aio:/img", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("script=tap2,tap2:log:|aio:/img,xvda", "vdev=xvda,access=rw,script=tap2,target=log:|aio:/img"),
    ("tap2:aio:/img,xvda,w,script=block-xenbackend", f"vdev=xvda,{TAIL}aio:/img"),
    ("tap2:aio:/img,xvda,w,backendtype=tap", f"vdev=xvda,{TAIL}aio:/img"),
    ("tap2:aio:/img,xvda,w,cdrom", "vdev=xvda,devtype=cdrom,access=rw,script=block-xenbackend,target=aio:/img"),
    ("tap2:aio:/img,xvda,w,backend=drv", f"vdev=xvda,backend=drv,{TAIL}aio:/img"),
    ("tap:log:|aio:/img,xvda,w", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap:aio:log:|aio:/img,xvda,w", f"vdev=xvda,{TAIL}log:|aio:/img"),
    ("tap:sync:/img,xvda,w", f"vdev=xvda,{TAIL}sync:/img"),
    ("tap:ram:64M,xvda,w", f"vdev=xvda,{TAIL}ram:64M"),
]
UNTOUCHED = [
    "phy:/dev/vg/a,xvda,w",
    "file:/img,xvda,w",
    "/img,raw,xvda,rw",
    "/img/tap2:x,raw,xvda,rw",
    "format=raw,vdev=xvda,access=rw,target=tap2:x",
    "vdev=xvda,script=block-xenbackend,target=tap2:log:|aio:/img",
    "tap2:,script=block-xenbackend,vdev=xvda,target=log:|aio:/img",
    "tap2:aio:/img,xvda,w,backendtype=qdisk",
    "tap2:aio:/img,xvda,w,script=block-iscsi",
    "tap:aio:/img,xvda,w",
    "tap:tapdisk:aio:/img,xvda,w",
    "tap:qcow2:/img,xvda,w",
    "tap:vhd:/img,xvda:disk,r",
    "tap:/img,xvda,w",
    "aio:/img,xvda,w",
    ",hdc:cdrom,r",
]


@pytest.mark.parametrize(("line", "ours"), LITERALS)
def test_a_line_becomes_one_that_xl_understands(line: str, ours: str) -> None:
    """The chain follows target=, which xl reads to the line's end; from Xen 4.19 on the line has its own kind."""
    assert ours == rewrite(line, BEFORE)
    assert ours.replace("script=", "backendtype=tap,script=", 1) == rewrite(line, SINCE)


@pytest.mark.parametrize(("line", "ours"), LITERALS)
def test_xl_reads_the_line_that_was_meant(stock: Xlu, line: str, ours: str) -> None:
    """Stock xl refuses the original line or loses a driver's word; it reads every part of the rewritten one."""
    literal, before, since = stock.disks([line, ours, str(rewrite(line, SINCE))])
    target = parse_chain(ours.partition("target=")[2].removesuffix("," if ours.endswith(r"\,,") else "")).text

    assert literal is None or literal.target != target or literal.script is None
    assert before is not None
    assert since is not None
    assert target == before.target == since.target
    assert ("unknown", "tap", "raw", "raw") == (before.backend, since.backend, before.format, since.format)
    for said in (before, since):
        assert (said.vdev, said.script) == (
            re.findall(r"vdev=(\w+)", ours)[0],
            re.findall(r"script=([\w-]+)", ours)[0],
        )
        assert said.kind == ("cdrom" if "cdrom" in line else "disk")
        assert said.access == ("ro" if "access=ro" in ours or "cdrom" in line else "rw")


@pytest.mark.parametrize("line", UNTOUCHED)
def test_a_line_that_asks_for_others_is_left_alone(stock: Xlu, line: str) -> None:
    """A line for another backend reaches xl unchanged, and xl can read it."""
    assert rewrite(line, BEFORE) is None
    assert rewrite(line, SINCE) is None
    assert stock.disks([line]) != [None]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tap2:aio:/img", "names no device for the guest; write it after the chain, as in ,xvda,w"),
        ("tap2:aio:/img,w", "names no device"),
        ("tap2:aio:/img,xvda,w!", "asks for the access 'w!'; xl knows r and w"),
        ("tap2:aio:/img,vdev=xvda,vdev=xvdb", "vdev is given twice"),
        ("tap2:/img,xvda,w", "write the driver before it, as in aio:/img"),
        ("tap2:,xvda,w", "the chain is empty"),
        ("tap2:log:|ayo:/img,xvda,w", "unknown driver 'ayo'"),
        ("tap2:aio:/img,cash=on,xvda,w", "cash"),
        ("tap2:aio:img,xvda,w", "is relative to the service's working directory; write the whole path"),
        ("tap2:aio:/a\nb,xvda,w", "a file name with a line break"),
        ("tap2:log:,xvda,w", "log is a filter"),
        ("tap2:aio:/img,xvda,x", "'x' is not an access mode of a disk: write r or w after the device xvda"),
        ("tap2:aio:/img,xvda,W", "'W' is not an access mode of a disk"),
        ("tap2:aio:/img,xvda,w,r", "'w' and 'r' both say what access"),
        ("tap2:aio:/img,xvd-a,w", "'xvd-a' is not a virtual device"),
        ("tap2:aio:/img,foo,w", "'foo' is not a virtual device"),
        ("tap2:aio:/img,sdaa,w", "'sdaa': there are only 16 disks"),
        ("tap2:aio:/img,vdev=foo", "'foo' is not a virtual device"),
    ],
)
def test_a_disk_that_cannot_be_is_refused(line: str, said: str) -> None:
    """A line for us is checked before xl runs, with the same result as the chain itself."""
    with pytest.raises(ConfigError) as caught:
        rewrite(line, BEFORE)

    assert said in str(caught.value)


MEANT = "vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:/img"


@pytest.mark.parametrize(
    ("line", "chain", "vdev", "is_read_only"),
    [
        ("tap2:log:|aio:/img,xvda,w", "log:|aio:/img", "xvda", False),
        ("tap2:aio:/img,xvdb,r", "aio:/img", "xvdb", True),
        ("log:|aio:/img,xvda,w", "log:|aio:/img", "xvda", False),
        ("script=block-xenbackend,vdev=xvdc,access=ro,target=aio:/img", "aio:/img", "xvdc", True),
        ("backendtype=tap,script=tap2,vdev=xvda,target=aio:/img", "aio:/img", "xvda", False),
        ("vdev=0xca00,script=/etc/xen/scripts/block-xenbackend,target=aio:/img", "aio:/img", "0xca00", False),
    ],
)
def test_what_a_line_means(line: str, chain: str, vdev: str, is_read_only: bool) -> None:
    """A line may be in blktap2's form, in xl's, or a chain with the configuration's words behind it."""
    meant = read(line, BEFORE)

    assert (chain, vdev, is_read_only) == (meant.chain, meant.vdev, meant.is_read_only)
    assert f"vdev={vdev},access={'ro' if is_read_only else 'rw'},script=" in meant.line
    assert meant.line.endswith(f"target={chain}")
    assert MEANT == read("tap2:log:|aio:/img,xvda,w", BEFORE).line == read(MEANT, BEFORE).line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vdev=xvda,target=aio:/img,xvda,w", "',xvda,w' is after target=, and all of that is the chain"),
        ("vdv=xvda,target=aio:/img", "'vdv=xvda' is before target=, and is not an option of a disk line"),
        ("tap2:aio:/img,xvda,w,script=block-iscsi", "for the hotplug script 'block-iscsi'"),
        ("tap2:aio:/img,xvda,w,backendtype=qdisk", "for the backend 'qdisk'"),
        ("aio:/img", "names no device"),
    ],
)
def test_a_line_that_is_not_for_us_or_says_too_much(line: str, said: str) -> None:
    """If a line is not for us, or has an unknown word, the error names the reason."""
    with pytest.raises(ConfigError) as caught:
        read(line, BEFORE)

    assert said in str(caught.value)


def test_the_caret_stands_in_the_chain() -> None:
    """A wrong chain is shown from its first layer on, with a caret below the mistake."""
    with pytest.raises(ChainError) as caught:
        rewrite("tap2:log:|ayo:/img,xvda,w", BEFORE)

    assert ("log:|ayo:/img", 5, 3) == (caught.value.chain, caught.value.position, caught.value.length)


def test_no_drivers_option_is_a_word_of_xl() -> None:
    """An option of the last layer, such as cache=on, is never taken for an option of xl."""
    for name in drivers.BUILT_IN:
        for option in fields(drivers.find_driver(name).Options):
            assert not _OPTION.fullmatch(f"{option.name}=on")


@pytest.mark.slow
def test_random_disks_reach_xl_whole(stock: Xlu, pytestconfig: pytest.Config) -> None:
    """Stock xl reads any chain, device and access as it was written, whatever its files are called."""
    chance = random.Random(pytestconfig.getoption("--seed"))
    wanted, lines = [], []
    for _ in range(pytestconfig.getoption("--requests") // 20):
        names = ["/" + "".join(chance.choices("ab|,\\:='\" #;é\udcff\t[]", k=chance.randrange(1, 8))) for _ in "123"]
        files = [re.sub(r"([\\|,])", r"\\\1", name) for name in names]
        layers = [f"log:{files[0]}", "delay:read=1ms,discard=2ms", f"log:{files[1]},limit=1G", "fault:op=write,every=9"]
        source = chance.choice([f"aio:{files[2]}", f"aio:{files[2]},cache=on", f"sync:{files[2]}", "ram:64M"])
        chain = "|".join([*chance.sample(layers, chance.randrange(4)), source])
        vdev = chance.choice(["xvda", "xvdb1", "sdp", "hdc", "d5p3", "51712", "0xca00"])
        access = chance.choice(["r", "ro", "w", "rw"])
        ours = rewrite(f"{chance.choice(['tap2:', 'tap2:tapdisk:', 'tap2: '])}{chain},{vdev},{access}", BEFORE)
        assert ours is not None
        lines.append(ours)
        wanted.append(Disk(parse_chain(chain).text, vdev, "ro" if access[1:] == "o" or access == "r" else "rw"))
    read = stock.disks(lines)

    assert [(disk.target, disk.vdev, disk.access) for disk in wanted] == [
        disk and (disk.target, disk.vdev, disk.access) for disk in read
    ]
    assert {"block-xenbackend"} == {disk and disk.script for disk in read}
