"""Writes the manual pages of the package: each command, each driver, the settings.

Must not describe anything: commands do by their help, drivers by their manuals, settings by their example.

    python3 debian/manpages.py DIRECTORY

The pages of commands are made by help2man of `xenbackend COMMAND --help`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from xenbackend import __version__
from xenbackend.block.drivers import BUILT_IN, find_driver, manual, summary
from xenbackend.cli.arguments import Parser
from xenbackend.cli.main import MODULES
from xenbackend.host.example import example

PROGRAM = "xenbackend"
_VERBATIM = ("Synopsis", "Example")
_SECTION = re.compile(r"^([A-Z]\w+):$", re.MULTILINE)
_OPTION = re.compile(r"^    (\w+): (.*)\n        (.*)$", re.MULTILINE)
_SETTING = re.compile(r"^((?:# .*\n)+)#([\w.]+ = .*)$", re.MULTILINE)


def main(directory: Path) -> None:
    """Write all pages below a directory, in man1, man5 and man7."""
    for section in ("man1", "man5", "man7"):
        (directory / section).mkdir(parents=True, exist_ok=True)
    for words, about in commands():
        name = "-".join([PROGRAM, *words])
        (directory / "man1" / f"{name}.1").write_text(command_page(words, about), encoding="utf-8")
    for name in sorted(BUILT_IN):
        (directory / "man7" / f"{PROGRAM}-{name}.7").write_text(driver_page(name), encoding="utf-8")
    (directory / "man5" / f"{PROGRAM}.toml.5").write_text(settings_page(), encoding="utf-8")


def commands() -> Iterator[tuple[list[str], str]]:
    """Yield the words of each command, and what it does in a line; no words for the program itself."""
    yield [], "userspace block backend for Xen"
    root = Parser(prog=PROGRAM).add_subparsers()
    for module in dict.fromkeys(MODULES.values()):
        importlib.import_module(f"xenbackend.cli.{module}").register(root)
    yield from _below([], root)


def _below(
    words: list[str], subparsers: argparse._SubParsersAction[argparse.ArgumentParser]
) -> Iterator[tuple[list[str], str]]:
    abouts = {each.dest: each.help or "" for each in subparsers._choices_actions}
    for name, parser in subparsers.choices.items():
        yield [*words, name], abouts.get(name, "")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _below([*words, name], action)


def command_page(words: list[str], about: str) -> str:
    """Return the page of a command, as help2man makes it."""
    title = "-".join([PROGRAM, *words])
    command = [
        "help2man", "--no-info", f"--version-string={title} {__version__}", f"--name={about or title}",
        " ".join([sys.executable, "-m", PROGRAM, *words]),
    ]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "80"}  # to which argparse folds
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    others = sorted({"-".join([PROGRAM, *each]) for each, _ in commands() if each[:-1] == words and each})
    more = [*(f"{each}(1)" for each in others if each != title), f"{PROGRAM}.toml(5)", f"{PROGRAM}-aio(7)"]
    return text.rstrip() + "\n" + _see_also(more)


def driver_page(name: str) -> str:
    """Return the page of a driver, from its manual."""
    driver = find_driver(name)
    parts = _SECTION.split(manual(driver))[1:]
    about = summary(driver).removeprefix(f"{name}: ").rstrip(".")
    lines = [_head(f"{PROGRAM}-{name}", 7, "Drivers of xenbackend"), f".SH NAME\n{PROGRAM}\\-{name} \\- {_text(about)}"]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        lines.append(f".SH {heading.upper()}")
        if heading in _VERBATIM:
            lines += [".nf", *(_line(each.strip()) for each in body.strip().splitlines()), ".fi"]
        elif heading == "Options" and _OPTION.search(body):
            lines += [f".TP\n\\fB{_text(option)}\\fR\n{_line(kind)}\n.br\n{_line(text)}" for option, kind, text in
                      _OPTION.findall(body)]  # fmt: skip
        else:
            lines += [_paragraph(each) for each in re.split(r"\n\s*\n", body.strip())]
    return "\n".join(lines) + "\n" + _see_also([f"{PROGRAM}(1)", f"{PROGRAM}-check(1)", f"{PROGRAM}-drivers(1)"])


def settings_page() -> str:
    """Return the page of the settings file, from its example."""
    text = example()
    before, _, limits = text.partition("[limits]")
    lines = [
        _head(f"{PROGRAM}.toml", 5, "Settings of xenbackend"),
        f".SH NAME\n{PROGRAM}.toml \\- settings of the userspace block backend for Xen",
        ".SH SYNOPSIS\n/etc/xenbackend.toml",
        ".SH DESCRIPTION",
        "A file in TOML, all of it optional. It is read when the service starts; guests do not notice a restart.",
        ".B xenbackend run \\-\\-check\nsays what is wrong with it,\n.B xenbackend config show\nwhat holds.",
        ".SH SETTINGS\nEach with its default.",
        *_settings(before),
        ".SH LIMITS\nIn a table of their own, [limits]: the most that is offered to a guest.",
        *_settings(limits),
    ]
    return "\n".join(lines) + "\n" + _see_also([f"{PROGRAM}(1)", f"{PROGRAM}-run(1)", f"{PROGRAM}-config-show(1)"])


def _settings(text: str) -> Iterator[str]:
    for about, setting in _SETTING.findall(text):
        sentence = " ".join(line.removeprefix("# ") for line in about.splitlines())
        yield f".TP\n\\fB{_text(setting)}\\fR\n{_line(sentence)}"


def _head(title: str, section: int, manual_name: str) -> str:
    return f'.TH {_text(title.upper())} {section} "" "{PROGRAM} {__version__}" "{manual_name}"'


def _see_also(pages: list[str]) -> str:
    """Return the last section; pages are such as ``xenbackend(1)``."""
    named = [each.rstrip(")").partition("(") for each in pages]
    rows = [f".BR {_text(name)} ({number})" for name, _, number in named]
    return '.SH "SEE ALSO"\n' + ",\n".join(rows) + "\n"


def _paragraph(text: str) -> str:
    return ".PP\n" + _line(" ".join(text.split()))


def _line(text: str) -> str:
    """Return a line of text in which nothing at its beginning is taken for a request."""
    made = _text(text)
    return f"\\&{made}" if made.startswith((".", "'")) else made


def _text(text: str) -> str:
    """Return text as roff has it; what is between backquotes is bold."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
