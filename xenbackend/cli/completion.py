"""`xenbackend completion SHELL`: what a shell needs to complete command lines, and the answer when Tab is pressed.

Must not know the candidates: `complete` does. The shells' scripts only hand over the line and take words.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from xenbackend.cli import complete
from xenbackend.cli.arguments import add_json
from xenbackend.cli.output import print_json

_SPECIAL_IN_DOUBLE = re.compile(r"([$`\"\\])")
_SPECIAL = re.compile(r"([^\w@%+=:,./^-])")  # what has a meaning for the shell outside of quotes
SCRIPTS = {
    "bash": """\
# bash completion for xenbackend; made by: xenbackend completion bash
_xenbackend() {
    mapfile -t COMPREPLY < <("${COMP_WORDS[0]}" __complete bash "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" \\
        2>/dev/null </dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:=/\\|,] ]] && compopt -o nospace
    return 0
}
complete -F _xenbackend xenbackend
""",
    "zsh": """\
#compdef xenbackend
# zsh completion for xenbackend; made by: xenbackend completion zsh
_xenbackend() {
    local -a found open
    local line
    while IFS= read -r line; do
        if [[ $line == *[:=/\\|,] ]]; then open+=("$line"); else found+=("$line"); fi
    done < <("${words[1]}" __complete zsh "$LBUFFER" 2>/dev/null </dev/null)
    (( ${#open} )) && compadd -S '' -- "${open[@]}"
    (( ${#found} )) && compadd -- "${found[@]}"
    (( ${#open} + ${#found} ))
}
if [[ $funcstack[1] == _xenbackend ]]; then _xenbackend "$@"; else compdef _xenbackend xenbackend; fi
""",
    "fish": """\
# fish completion for xenbackend; made by: xenbackend completion fish
function __xenbackend_complete
    set -l words (commandline -opc)
    $words[1] __complete fish (commandline -cp) 2>/dev/null </dev/null
end
complete -c xenbackend -f -a '(__xenbackend_complete)'
""",
}


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "completion",
        help="print the completion of command lines for a shell",
        description="Print what a shell needs to complete xenbackend's command lines: commands, options, disks, "
        "drivers with their options, images. The Debian package has it for all three; otherwise, for bash: "
        '`eval "$(xenbackend completion bash)"` in ~/.bashrc.',
    )
    parser.add_argument("shell", choices=SCRIPTS, help="which one")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    if args.json:
        print_json({"shell": args.shell, "script": SCRIPTS[args.shell]})
    else:
        sys.stdout.write(SCRIPTS[args.shell])
    return 0


def answer(words: Sequence[str], modules: dict[str, str]) -> int:
    """Print the candidates, one a line, or nothing if anything goes wrong; return 0.

    `words` are the shell, its line up to the cursor, and for bash the characters at which it splits words; `modules`
    are as for `complete.candidates`.
    """
    try:
        shell, line, *breaks = words
        typed = complete.read_line(line.rpartition("\n")[2], *breaks)
        found = complete.candidates(typed.words[1:], modules)
        if shell == "bash":
            found = [_in_bash(each[typed.kept :], typed.quote) for each in found]
        if found:
            print("\n".join(found), flush=True)
    except Exception:  # noqa: S110 - somebody has pressed a key, and must not see a bug's traceback
        pass
    return 0


def _in_bash(text: str, quote: str) -> str:
    """Return a text as bash must insert it, within the open `quote` or outside of one, so that it means just that text.

    Bash inserts it as it is, and a file may have any name: no part of it may be run, be expanded, or end the quote.
    """
    if not quote:
        return _SPECIAL.sub(r"\\\1", text)
    escape = _in_single if quote == "'" else _in_double
    text = escape(text)
    return text + quote if text.endswith(quote) else text  # after one, readline would take the quote for closed


def _in_single(text: str) -> str:
    return text.replace("'", r"'\''")


def _in_double(text: str) -> str:
    """Escape a text within double quotes. History is expanded there, too, and a backslash before ``!`` would remain."""
    return _SPECIAL_IN_DOUBLE.sub(r"\\\1", text).replace("!", r'"\!"')
