"""Makes the site of documentation: the pages of the repository, and what is made of manuals, settings and tables.

Must not describe anything: drivers do by their manuals, settings by their example, pages by themselves.

    python docs/make_site.py DIRECTORY

The sources are laid out below DIRECTORY/source as they lie in the repository, so that their links hold, and the site is
DIRECTORY/html. Whatever Sphinx has to say against a page, a link that leads nowhere first, is an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xenbackend import __version__
from xenbackend.block.drivers import BUILT_IN, find_driver, manual, summary
from xenbackend.host.example import example

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "tests/xen/README.md")
REFERENCE = "docs/reference"
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
_SECTION = re.compile(r"^([A-Z]\w+):$", re.MULTILINE)
_OPTION = re.compile(r"^    (\w+): (.*)\n        (.*)$", re.MULTILINE)
_SETTING = re.compile(r"^((?:# .*\n)+)#([\w.]+) = (.*)$", re.MULTILINE)
_VERBATIM = ("Synopsis", "Example")
_KEY = re.compile(r"(\*?)`([a-z_0-9.\[\]]+)`\*?")
_KINDS: dict[str, dict[str, Any]] = {  # of docs/json.md
    "number": {"type": "number"}, "time": {"type": "number"},
    "text": {"type": "string"}, "boolean": {"type": "boolean"},
    "numbers": {"type": "array", "items": {"type": "number"}}, "texts": {"type": "array", "items": {"type": "string"}},
    "maps": {"type": "array", "items": {"type": "object"}}, "map": {"type": "object"},
    "map of numbers": {"type": "object", "additionalProperties": {"type": "number"}},
    "map of texts": {"type": "object", "additionalProperties": {"type": "string"}},
    "layers": {"type": "array", "items": {"$ref": "#/$defs/Layers"}},
}  # fmt: skip


def main(directory: Path) -> int:
    """Lay everything out, and build; return Sphinx's exit status."""
    source, html = directory / "source", directory / "html"
    shutil.rmtree(directory, ignore_errors=True)
    lay_out(source)
    status = build(source, html)
    if status == 0:
        shutil.copy(html / "README.html", html / "index.html")
    return status


def build(source: Path, html: Path) -> int:
    """Build the site of what is laid out; return Sphinx's exit status, which is not 0 where it warns of anything."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-n",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-c",
        ROOT / "docs",
        source,
        html,
    ]
    environment = {**os.environ, "XENBACKEND_VERSION": __version__}
    return subprocess.run(command, env=environment, check=False).returncode


def lay_out(source: Path) -> None:
    """Copy the pages and what they link, and write those that are made."""
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    for page in pages:
        _copy(page.relative_to(ROOT), source)
        for target in _LINK.findall(page.read_text()):
            linked = (page.parent / target).resolve()
            if linked.is_file() and linked.suffix != ".md":
                _copy(linked.relative_to(ROOT), source)
    made = source / REFERENCE
    made.mkdir()
    for name in sorted(BUILT_IN):
        (made / f"{name}.md").write_text(driver_page(name), encoding="utf-8")
    (made / "drivers.md").write_text(drivers_page(), encoding="utf-8")
    (made / "settings.md").write_text(settings_page(), encoding="utf-8")
    schema = json_schema((ROOT / "docs/json.md").read_text())
    (made / "schema.json").write_text(json.dumps(schema, indent=1), encoding="utf-8")
    with (source / "docs/json.md").open("a") as page:
        page.write("\n## As a JSON Schema\n\n[schema.json](reference/schema.json) has these tables for programs.\n")
    with (source / "README.md").open("a") as front:
        front.write(f"\n{contents(page.relative_to(ROOT).as_posix() for page in pages)}")


def contents(pages: Iterator[str]) -> str:
    """Return the tree of all pages: those of README.md's table in its order, then the others."""
    text = (ROOT / "README.md").read_text()
    _, _, table = text.partition("\n## Documentation\n")
    rows = [(caption, re.findall(r"\]\((\S+?\.md)\)", cell)) for caption, cell in
            re.findall(r"^\| ([a-z ]+) \| (.*) \|$", table, re.MULTILINE)]  # fmt: skip
    rows.append(("reference", [f"{REFERENCE}/drivers.md", f"{REFERENCE}/settings.md"]))
    named = {page for _, many in rows for page in many}
    rows.append(("more", [page for page in pages if page not in named and page != "README.md"]))
    return "\n".join(_tree(caption, many) for caption, many in rows)


def drivers_page() -> str:
    """Return the list of drivers."""
    rows = [f"| [{name}]({name}.md) | {_cell(_about(name))} |" for name in sorted(BUILT_IN)]
    tree = _tree("", [f"{name}.md" for name in sorted(BUILT_IN)])
    return "\n".join(["# Drivers\n", "| driver | |\n|---|---|", *rows, "", tree])


def driver_page(name: str) -> str:
    """Return the page of a driver, from its manual."""
    parts = _SECTION.split(manual(find_driver(name)))[1:]
    lines = [f"# {name}\n", f"{_about(name)}\n"]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        lines.append(f"## {heading}\n")
        options = _OPTION.findall(body) if heading == "Options" else []
        if heading in _VERBATIM:
            lines.append("```text\n" + "\n".join(each.strip() for each in body.strip().splitlines()) + "\n```\n")
        elif options:
            lines += ["| option | takes | |\n|---|---|---|"]
            lines += [f"| `{option}` | {_cell(kind)} | {_cell(text)} |" for option, kind, text in options]
            lines.append("")
        else:
            lines += [" ".join(each.split()) + "\n" for each in re.split(r"\n\s*\n", body.strip())]
    return "\n".join(lines)


def settings_page() -> str:
    """Return the page of the settings, from their example."""
    before, _, limits = example().partition("[limits]")
    lines = ["# Settings\n", "`/etc/xenbackend.toml`; all are optional. `xenbackend run --check` says what is wrong.\n"]
    for heading, text in (("At the top", before), ("In the table `limits`", limits)):
        lines += [f"## {heading}\n", "| setting | default | |\n|---|---|---|"]
        for about, name, default in _SETTING.findall(text):
            sentence = " ".join(line.removeprefix("# ") for line in about.splitlines())
            lines.append(f"| `{name}` | `{_cell(default)}` | {_cell(sentence)} |")
        lines.append("")
    return "\n".join(lines)


def json_schema(page: str) -> dict[str, Any]:
    """Return the tables of docs/json.md as a JSON Schema: `$defs` has one for each heading, such as `status`."""
    definitions: dict[str, Any] = {}
    sections = re.split(r"^## (.*)$", page, flags=re.MULTILINE)[1:]
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        rows = re.findall(r"^\| (\*?`.*?) \| (.*?) \| (.*?)\|?$", body, re.MULTILINE)
        if rows and heading != "Codes":
            definitions[heading] = made = _object()
            for names, kinds, meaning in rows:
                _add_row(made, names, kinds, meaning)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions}


def _add_row(made: dict[str, Any], names: str, kinds: str, meaning: str) -> None:
    """Add the keys of a row, each with its type, or all with one; what may be null is said in the row."""
    keys, types = _KEY.findall(names), kinds.split(", ")
    for place, (italics, path) in enumerate(keys):
        value = dict(_KINDS[types[min(place, len(types) - 1)]])
        if "null" in meaning and "additionalProperties" in value:
            value["additionalProperties"] = {"type": [value["additionalProperties"]["type"], "null"]}
        elif "null" in meaning:
            value["type"] = [value["type"], "null"]
        *parents, name = path.split(".")
        where = made
        for each in [*parents, *([name] if name.endswith("[]") else [])]:
            where = _inner(where, each, is_required=not italics)
        if not name.endswith("[]"):
            _set(where, name, value, is_required=not italics)
        elif value.get("items"):
            where.clear()
            where |= value["items"]


def _inner(where: dict[str, Any], name: str, *, is_required: bool) -> dict[str, Any]:
    """Return the object below a key, or that of each element of its array."""
    plain = name.removesuffix("[]")
    if "properties" not in where:  # it is one of another table, and has more here
        where |= {"allOf": [{"$ref": where.pop("$ref")}], **_object()}
    if plain not in where["properties"]:
        inner = {"type": "array", "items": _object()} if name.endswith("[]") else _object()
        _set(where, plain, inner, is_required=is_required)
    found: dict[str, Any] = where["properties"][plain]
    return found["items"] if name.endswith("[]") else found


def _set(where: dict[str, Any], name: str, value: dict[str, Any], *, is_required: bool) -> None:
    if "properties" not in where:
        where |= {"allOf": [{"$ref": where.pop("$ref")}], **_object()}
    where["properties"][name] = value
    if is_required:
        where["required"].append(name)


def _object() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "required": []}


def _about(name: str) -> str:
    return summary(find_driver(name)).removeprefix(f"{name}: ")


def _cell(text: str) -> str:
    """Return text as a cell of a table has it."""
    return text.replace("|", "\\|")


def _tree(caption: str, pages: list[str]) -> str:
    about = f":caption: {caption}\n" if caption else ""
    return f"```{{toctree}}\n:hidden:\n{about}\n" + "\n".join(pages) + "\n```\n"


def _copy(file: Path, source: Path) -> None:
    (source / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / file, source / file)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
