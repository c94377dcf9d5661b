"""The lines, settings and scripts in docs/toolstacks.md mean to xenbackend what the page says.

How a toolstack reads its own words is taken from the sources that the page names; no toolstack runs here.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.tools import xlu
from xenbackend.cli.main import main
from xenbackend.host.files import SCRIPTS, items
from xenbackend.host.program import PACKAGED
from xenbackend.supervisor.service import settings
from xenbackend.supervisor.vbd.spec import is_ours, parse_spec
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.xl.disk import rewrite

PAGE = Path(__file__).parent.parent / "docs/toolstacks.md"
LITERAL = "tap2:log:|aio:/img/guest.raw,xvda,w"
CARRIERS = {"raw": "aio:", "vhd": "vhd:"}  # libxl of 4.19 and later, `libxl__device_disk_string_of_format`
HOOK = "#!/bin/sh"


def blocks(language: str) -> list[str]:
    """Return the page's blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Return the arguments of each shell command in the blocks."""
    for block in blocks("sh"):
        if not block.startswith(HOOK):
            yield from (shlex.split(line, comments=True) for line in block.splitlines())


def hook() -> str:
    """Return the text of libvirt's hook."""
    (text,) = [block for block in blocks("sh") if block.startswith(HOOK)]
    return text


def as_libxl_writes(text: str) -> tuple[VbdPath, dict[str, str]]:
    """Return where libxl puts a disk of libvirt's XML, and its keys that matter to us.

    Source: libvirt `libxlMakeDisk` (and Qubes' patch of it, for `script`), libxl of Xen 4.20.0 `device_disk_add`.
    """
    disk = ElementTree.fromstring(re.sub(r"\{[%{].*?[%}]\}", "", text).strip())  # noqa: S314 - the page is ours
    source, target, driver = disk.find("source"), disk.find("target"), disk.find("driver")
    assert source is not None
    assert target is not None
    assert driver is not None
    place, script = source.get("file") or source.get("dev") or "", disk.find("script")
    kind, params, default = {
        "tap": ("vbd3", f"{CARRIERS[driver.attrib['type']]}{place}", "block-tap"),
        "phy": ("vbd", place, "block"),
    }[driver.attrib["name"]]
    path = VbdPath(kind, 0 if disk.find("backenddomain") is None else 3, 5, 51712)
    name = default if script is None else script.attrib["path"]
    return path, {"frontend": path.frontend, "mode": "w", "params": params, "script": f"{SCRIPTS}/{Path(name).name}"}


def chain_of(path: VbdPath, keys: Mapping[str, str], scripts: list[str]) -> str:
    """Return the chain served for a disk, empty if the disk is not ours."""
    return parse_spec(path, keys).chain if is_ours(keys, scripts) else ""


def test_every_block_is_looked_at() -> None:
    """Every block of the page is in a language that some test here reads."""
    opened = re.findall(r"^```(.+)$", PAGE.read_text(), re.MULTILINE)

    assert {"cfg", "sh", "toml", "xml"} == set(opened)
    assert 2 * len(opened) == PAGE.read_text().count("\n```")


def test_xl_is_given_the_lines_that_convert_makes() -> None:
    """For each Xen the page's line is what `xenbackend convert` makes of blktap2's, and is not rewritten again."""
    shown = [ast.literal_eval(block.partition("=")[2].strip()) for block in blocks("cfg")]
    made = [[rewrite(LITERAL, xen)] for xen in ((4, 17), (4, 20))]

    assert [sorted(line.split(",")) for (line,) in shown] == [sorted((line or "").split(",")) for (line,) in made]
    assert [None, None] == [rewrite(line, (4, 20)) for (line,) in shown]


@pytest.mark.skipif(not xlu.can_compile(), reason="no gcc or libxen-dev here")
def test_xl_reads_the_lines_as_the_page_means_them(tmp_path: Path) -> None:
    """Xl's parser finds the chain, our script and the backend in each line, and refuses blktap2's own."""
    lines = [line for block in blocks("cfg") for line in ast.literal_eval(block.partition("=")[2].strip())]
    *found, literal = xlu.Xlu(tmp_path).disks([*lines, LITERAL])

    assert [("log:|aio:/img/guest.raw", "block-xenbackend")] * 2 == [
        (disk.target, disk.script) for disk in found if disk is not None
    ]
    assert ["unknown", "tap"] == [disk.backend for disk in found if disk is not None]
    assert literal is None


def test_libvirts_disks_are_ours_by_the_settings_beside_them(tmp_path: Path) -> None:
    """With the page's settings each disk of libvirt is served with the chain that it names, and without them not.

    Qubes' disk needs no settings.
    """
    allowed = []
    for number, block in enumerate(blocks("toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        allowed.append(settings.load(file, {}).scripts)
    in_dom0, in_driver_domain = allowed
    plain, chain, of_driver_domain, qubes = [as_libxl_writes(block) for block in blocks("xml")]
    default = settings.Settings().scripts

    assert "aio:/img/guest.raw" == chain_of(*plain, in_dom0)
    assert "qcow2:/img/guest.qcow2" == chain_of(*chain, in_dom0)
    assert "aio:/img/guest.raw" == chain_of(*of_driver_domain, in_driver_domain)
    assert "log:|aio:/img/work.raw" == chain_of(*qubes, default)
    assert ["", "", ""] == [chain_of(*disk, default) for disk in (plain, chain, of_driver_domain)]
    assert [True, True] == [set(default) < set(scripts) for scripts in allowed]


def test_what_libvirts_schema_refuses_is_a_chain() -> None:
    """The source that the page warns of, which libvirt's schema refuses, would be valid for us."""
    path, keys = as_libxl_writes(blocks("xml")[1].replace("qcow2:/img/guest.qcow2", "log:|aio:/img/guest.raw"))

    assert "log:|aio:/img/guest.raw" == chain_of(path, keys, ["block-tap"])


def test_the_link_leads_to_our_script() -> None:
    """`block-tap` is a link to the script that an installation puts beside it."""
    (link,) = [words for words in commands() if words[0] == "ln"]
    installed = {item.path for item in items(PACKAGED)}

    assert ["ln", "-s", "block-xenbackend", f"{SCRIPTS}/block-tap"] == link
    assert f"{SCRIPTS}/{link[2]}" in installed
    assert link[3] not in installed


def test_our_commands_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The arguments of our commands are valid: each fails only for lack of a xenstore."""
    ours = [words[1:] for words in commands() if words[0] == "xenbackend"]
    statuses = [main([*words, "--store", str(tmp_path / "none")]) for words in ours]

    assert [1] * len(ours) == statuses, capsys.readouterr().err
    assert ["attach", "detach"] * 2 == [words[0] for words in ours]


@pytest.mark.parametrize(
    ("words", "is_called"),
    [
        ("web started begin -", True),
        ("web prepare begin -", False),
        ("web stopped end -", False),
        ("web2 started begin -", False),
    ],
)
def test_libvirts_hook(tmp_path: Path, words: str, *, is_called: bool) -> None:
    """The hook attaches the disk when that guest starts, at no other time, and passes a failure on to libvirt."""
    (tmp_path / "libxl").write_text(hook())
    (tmp_path / "xenbackend").write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    ended = subprocess.run(
        [tmp_path / "libxl", *words.split()],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        input="<domain/>",
        capture_output=True,
        text=True,
        check=False,
    )
    attached = "attach web/xvdb log:|aio:/img/web-data.raw\n"

    assert (3 if is_called else 0, attached if is_called else "") == (ended.returncode, ended.stdout)
