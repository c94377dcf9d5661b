"""Whole configurations, rewritten."""

from __future__ import annotations

import pytest

from tests.tools.xlu import Xlu
from xenbackend.errors import ChainError, ConfigError
from xenbackend.xl.rewrite import convert, disk_argument

XEN = (4, 17)
CONFIG = """\
name = 'guest' \t # tap2:log:|aio:/img,xvda,w
disk = [ 'phy:/dev/vg/a,xvda,w',   # the first
    "tap2:log:|aio:/it's,xvdb,w", 'tap:aio:/img,xvdc,w',

]; disk += ['tap2:aio:/it\\'s,xvdd,r' ]
\tvcpus=2"""
CONVERTED = """\
name = 'guest' \t # tap2:log:|aio:/img,xvda,w
disk = [ 'phy:/dev/vg/a,xvda,w',   # the first
    "vdev=xvdb,access=rw,script=block-xenbackend,target=log:|aio:/it's", 'tap:aio:/img,xvdc,w',

]; disk += ['vdev=xvdd,access=ro,script=block-xenbackend,target=aio:/it\\'s' ]
\tvcpus=2"""
LINES = [
    "phy:/dev/vg/a,xvda,w",
    "vdev=xvdb,access=rw,script=block-xenbackend,target=log:|aio:/it's",
    "tap:aio:/img,xvdc,w",
    "vdev=xvdd,access=ro,script=block-xenbackend,target=aio:/it's",
]


def test_only_the_lines_change() -> None:
    """Comments, blanks, quotes and order are kept to the byte; a second rewrite changes nothing."""
    assert (CONVERTED, 2) == convert(CONFIG, "vm.cfg", XEN)
    assert (CONVERTED, 0) == convert(CONVERTED, "vm.cfg", XEN)


def test_xl_takes_the_argument_for_the_files_disks(stock: Xlu) -> None:
    """With our setting added, xl reads the disks that were meant: the last setting counts."""
    argument = disk_argument(CONFIG, "vm.cfg", XEN)

    assert argument is not None
    assert [LINES, LINES] == stock.configs([CONVERTED, f"{CONFIG}\n{argument}\n"])


def test_a_text_that_xl_understands_needs_no_argument() -> None:
    """If no line is rewritten there is no setting to add."""
    assert disk_argument(CONVERTED, "vm.cfg", XEN) is None
    assert disk_argument("disk = 'tap2:log:|aio:/img,xvda,w'", "vm.cfg", XEN) is None


def test_disks_that_xl_never_sees_stay() -> None:
    """A disk list that is replaced by a later one is kept as it is, even with a wrong chain."""
    text = "disk=['tap2:log:|ayo:/img,xvda,w']\ndisk=['phy:/dev/x,xvda,w']"

    assert (text, 0) == convert(text, "vm.cfg", XEN)


@pytest.mark.parametrize("step", [convert, disk_argument])
def test_a_wrong_line_is_named_by_file_and_line(step: object) -> None:
    """The chain's own sentence and caret follow the file and the line."""
    assert callable(step)
    with pytest.raises(ChainError) as caught:
        step("a=1\ndisk = ['phy:/dev/x,xvda,w',\n 'tap2:log:|ayo:/img,xvdb,w']", "/etc/xen/vm.cfg", XEN)
    assert str(caught.value) == (
        "/etc/xen/vm.cfg:3: unknown driver 'ayo'; did you mean aio?\n  log:|ayo:/img\n       ^^^"
    )
    with pytest.raises(ConfigError, match=r"^/etc/xen/vm.cfg:1: .*names no device"):
        step("disk = ['tap2:log:|aio:/img']", "/etc/xen/vm.cfg", XEN)
