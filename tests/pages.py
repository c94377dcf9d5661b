"""The blocks of the pages that a user reads: README.md and docs/. Each names its language, as in ```sh.

Must not run anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LANGUAGES = {
    "sh": "commands, run by tests/system/test_pages.py in the order of the page; scripts have tests of their own",
    "cfg": "of a guest's configuration",
    "toml": "of the settings, or of a package",
    "python": "a driver, tests/test_pages.py; or a program, tests/system/test_client_page.py",
    "xml": "of libvirt's; tests/test_toolstacks.py",
    "text": "what a program prints, or a formula; not run",
}
_BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|\n)\n {4}\S")
_COMMENT = re.compile(r"\s+# .*$")

_DOM0 = "needs dom0's own blkfront; tests/xen/test_dom0_disk.py"
_SYSTEMD = "needs systemd and a Xen host; tests/xen/test_settings.py, tests/xen/test_kills.py"
_PACKAGE = "changes the host's packages; tests/xen/test_debian_package.py"
_DRIVER_DOMAIN = "is for a driver domain; tests/xen/test_driver_domain.py"
_INSTALLS = "changes the host; tests/cli/test_install.py, and each machine of tests/xen"
NOT_RUN = {  # by the beginning of a line: why it is not run with the others
    "apt ": _PACKAGE,
    "apt-get ": _PACKAGE,
    "dpkg-divert ": _INSTALLS,
    "echo 'install xen-blkback": _DRIVER_DOMAIN,
    "e2fsck -fn /dev/": _DOM0,
    "journalctl ": "needs systemd",
    "ln -s block-xenbackend /etc/": _INSTALLS,
    "make deb": "takes minutes; tests/xen/test_debian_package.py has what it makes",
    "make run": "is `xenbackend demo` in a new environment; tests/cli/test_demo.py",
    "make test": "is what runs this",
    "/opt/xenbackend/bin/": _INSTALLS,
    "python3 -m venv": _INSTALLS,
    "sysctl ": "changes the host's kernel",
    "systemctl ": _SYSTEMD,
    ".venv/bin/xenbackend demo --keep": "goes on until Ctrl-C; tests/cli/test_demo_keep.py",
    "xenbackend attach 0/": _DOM0,
    "xenbackend bench ": "takes minutes; tests/bench/test_session.py",
    "xenbackend detach 0/": _DOM0,
    "xenbackend run --detach": "the machine of the test has a service; tests/cli/test_run.py",
    "xenbackend image convert vhd:/img/base.vhd aio:/dev/": "needs a volume; tests/image/test_convert.py has one",
    "xenbackend uninstall": _INSTALLS,
}
TOOLSTACK = ("xl create ", "xl shutdown ", "xl block-attach ", "xl block-detach ")  # the simulated host does as xl does


@dataclass(frozen=True, slots=True)
class Block:
    """A block between fences."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines for a shell, without their comments; none if the block is a script, which is tested as a whole."""
        if self.text.startswith("#!"):
            return []
        lines = (_COMMENT.sub("", line).strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Return all blocks of a page, in their order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[str]:
    """Return the commands of a page, in their order."""
    return [line for block in blocks(page) if block.language == "sh" for line in block.commands]


def has_indented(page: Path) -> bool:
    """Return whether a page has a block without fences, which names no language."""
    return _INDENTED.search(_BLOCK.sub("", page.read_text(encoding="utf-8"))) is not None


def why_not_run(line: str) -> str:
    """Return why a command is not run; empty if it is."""
    return next((reason for begin, reason in NOT_RUN.items() if line.startswith(begin)), "")


def rows(page: Path, heading: str, *, below: str = "") -> list[list[str]]:
    """Return the cells of the table whose first heading is `heading`; `below` names a section of the page."""
    text = page.read_text(encoding="utf-8")
    text = text[text.index(f"\n## {below}\n") :] if below else text
    _, _, table = text[text.index(f"\n| {heading} |") :].lstrip("\n").partition("\n")
    lines = table.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def readme_chains() -> list[str]:
    """Return the chains of README.md's table."""
    cells = [cell for _, cell in rows(ROOT / "README.md", "you want")]
    return [each.replace("\\|", "|") for cell in cells for each in re.findall(r"`([a-z0-9]+:[^`]+)`", cell)]
