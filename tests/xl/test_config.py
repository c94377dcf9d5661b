"""Xl's configuration language, compared with how libxlutil parses it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.tools.xlu import Xlu
from xenbackend.errors import ConfigError
from xenbackend.xl.config import line_of, quote, read_disks

EXAMPLE = """\
# a guest
name = "deb'ian"  # its name
memory = 512; vcpus=0x2
disk = [ 'phy:/dev/vg/a,xvda,w',
  # not this one
  "tap2:log:|aio:/img,xvdb,w", 7, ]
vif = [ [ 'a', 'b' ], 'mac=00:16:3e:00:00:01', ]
disk += ['tap2:aio:/it\\'s,xvdc,r']
on_crash = 'destroy'"""

ODD = [
    "",
    "\n\n;;;\n",
    "disk=['a']",
    "disk=['a'];disk=['b']",
    "disk=['a'];disk+=['b']",
    "disk+=['a']\ndisk+=[]\ndisk+=['b',\n'c'\n,\n]\n",
    "disk='a'",
    "disk='a'\ndisk+='b'",
    "disk='a'\ndisk+=['b']",
    "disk=['a']\ndisk+='b'",
    "x=[1]\nx+=1\ndisk=['a']",
    "disk=[\n]",
    "disk=[,]",
    "disk=['a',,'b']",
    "disk=['a' 'b']",
    "disk=\n['a']",
    "disk\n=['a']",
    "disk=['a'] # end",
    "disk=['a'] # end\n",
    "disk=['a' # one\n, # two\n'b' # three\n]",
    "disk=[ # one\n # two\n 'a' ]",
    "disk=['a' # unended ]",
    "disk=['a', ['x', ['y']], 'b']",
    "disk=[['a']]",
    "disk=[1, 0x1f, 'a', 2]",
    "disk=[-1]",
    "disk=[1.5]",
    "disk=[a]",
    "Disk=['a']",
    "disk.0=['a']\ndisk_a=['b']\ndisk=['c']",
    "disk=['a'",
    "disk=['a']]",
    "disk=['a'] vif=[]",
    "disk=('a')",
    "disk = ['a']\r\n",
    "\ufeffdisk=['a']",
    "disk=[\"a'b\", 'a\"b', 'a\\'b', \"a\\\"b\", 'a\\\\']",
    "disk=['\\a\\b\\f\\n\\r\\t\\v']",
    "disk=['a\\qb']",
    "disk=['a\\|b']",
    "disk=['a\\x41b']",
    "disk=['a\\101b']",
    "disk=['a\\1015b', '\\7 1z', '\\0+1', '\\1-12']",
    "disk=['a\\0']",
    "disk=['a\\12']",
    "disk=['a\\123', 'b']",
    "disk=['a']#",
    "disk=['a']\n'",
    "disk=['a']\né",
    "disk=['a']\n\udcff",
    "disk=['a\nb']",
    "disk=['a\\\nb']",
    "disk=['ä\udcff|,:']",
    "disk=['#a']#'b']\n",
    "import os\ndisk=['a']",
    "disk=['%s' % 1]",
    "disk == ['a']",
    "disk =+ ['a']",
    "disk + = ['a']",
    "= 1",
    "0x1=1\n",
    "a=1b\n",
    "a=0xfx\n",
]
PIECES = [
    *("disk", "vif", "x.y_1", "=", "+=", "[", "]", ",", ";", "\n", " ", "\t", "#", "# it's\n", "1", "0x1f", "-", "+"),
    *("'", '"', "''", '"a"', "'tap2:log:|aio:/i,xvda,w'", "'\\\\'", "'\\''", "'\\n'", "'\\1", "'\\12'", "\\", "'\\x1'"),
    *("disk=['a','b']", "disk+=[ 'c' ]", "['a',\n'b',\n]", "disk = [", "\ndisk = [\n", "é", "\r", "A", "'\\12 '"),
]


def ours(text: str) -> list[str] | None:
    """Convert our result to the form of the other parser."""
    try:
        return [disk.value for disk in read_disks(text, "text")]
    except ConfigError:
        return None


def test_disks_are_found_where_they_stand() -> None:
    """Each disk has its value and the position of its literal in the text."""
    disks = read_disks(EXAMPLE, "vm.cfg")

    assert ["phy:/dev/vg/a,xvda,w", "tap2:log:|aio:/img,xvdb,w", "7", "tap2:aio:/it's,xvdc,r"] == [
        disk.value for disk in disks
    ]
    assert ["'phy:/dev/vg/a,xvda,w'", '"tap2:log:|aio:/img,xvdb,w"', "7", r"'tap2:aio:/it\'s,xvdc,r'"] == [
        EXAMPLE[disk.start : disk.end] for disk in disks
    ]
    assert [4, 6, 6, 8] == [line_of(EXAMPLE, disk.start) for disk in disks]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=1\nDisk=['a']", "text:2: \"Disk=['a']\" is not valid in an xl configuration"),
        ("disk=[\n'a'\n'b']", "text:3: \"'b'\" comes after a value of a list; write a comma"),
        ("disk=[\n'a',\n", "text:3: the end of the file is where a value should be"),
        ("disk=\n['a']", "text:1: the end of the line is where a value should be"),
        ("disk=['a\\|b']", r"has the escape \|, which xl refuses; write \\ for a backslash"),
        ("disk ['a']", "text:1: '[' is where disk needs = or +="),
        ("disk=['a']\n'b'", "text:2: \"'b'\" is not the name of a setting"),
        ("disk=['a']\ndisk+='b'", "text:2: '+=' cannot add a list to a single value of disk"),
        ("a=1 b=2", "text:1: 'b' comes after the value of a"),
        ("a='x\0'", "is not valid in an xl configuration"),
    ],
)
def test_what_xl_refuses_is_refused_with_its_line(text: str, said: str) -> None:
    """The error names source, line, and what stands there."""
    with pytest.raises(ConfigError) as caught:
        read_disks(text, "text")

    assert said in str(caught.value)


def test_a_deep_list_is_refused() -> None:
    """Lists nested too deeply are refused with an error instead of a crash."""
    with pytest.raises(ConfigError, match="is where a value should be"):
        read_disks(f"disk={'[' * 5000}", "text")


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_are_read_as_xl_reads_them(stock: Xlu, text: str) -> None:
    """Odd texts are parsed or refused as xl does."""
    assert stock.configs([text])[0] == ours(text)


def test_the_examples_of_xen_are_read_as_xl_reads_them(stock: Xlu) -> None:
    """The configurations that the distribution ships are parsed as xl does."""
    files = sorted(Path("/etc/xen").glob("xlexample.*"))
    if not files:
        pytest.skip("no examples of Xen here")
    texts = [file.read_text() for file in files]

    assert all(stock.configs(texts))
    assert stock.configs(texts) == [ours(text) for text in texts]


@pytest.mark.slow
def test_random_texts_are_read_as_xl_reads_them(stock: Xlu, pytestconfig: pytest.Config) -> None:
    """Random texts, and examples with a piece too many or too few, are parsed as xl does."""
    chance = random.Random(pytestconfig.getoption("--seed"))
    texts = []
    for _ in range(pytestconfig.getoption("--requests") // 4):
        if chance.random() < 0.5:
            texts.append("".join(chance.choices(PIECES, k=chance.randrange(1, 12))))
        else:
            start = chance.randrange(len(EXAMPLE))
            end = start + chance.choice([0, 0, 1, 1, 2, 9])
            texts.append(EXAMPLE[:start] + "".join(chance.choices(PIECES, k=chance.randrange(3))) + EXAMPLE[end:])
    readings = stock.configs(texts)

    assert [] == [(text, stocks) for text, stocks in zip(texts, readings, strict=True) if stocks != ours(text)]
    assert 0.1 < sum(reading is not None for reading in readings) / len(readings) < 0.9


@pytest.mark.parametrize("mark", ["'", '"'])
@pytest.mark.parametrize("value", ["", "a", "it's", 'a"b', "a\\b", "\\", "a\nb", "é\udcff", "\\'", "#[],;"])
def test_a_quoted_string_is_read_again(stock: Xlu, value: str, mark: str) -> None:
    """Any text that was quoted is read back unchanged by either parser."""
    text = f"disk=[{quote(value, mark)}]"

    assert [value] == ours(text) == stock.configs([text])[0]
