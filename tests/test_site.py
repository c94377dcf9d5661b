"""The documentation site, which `make docs` builds."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.answering import DISK, LAYER, answering, working
from xenbackend.blkif.features import Limits
from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.options import describe_options
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.settings import Settings

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def load() -> ModuleType:
    """Return the program that builds the site, which is not installed."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs/make_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_site = load()


def test_the_site_is_built_without_a_complaint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The site is built without a warning, with every page of the repository and those of drivers and settings."""
    assert 0 == make_site.main(tmp_path / "site"), capfd.readouterr().err
    html = tmp_path / "site/html"
    settings = (html / "docs/reference/settings.html").read_text()

    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert (html / page.relative_to(ROOT)).with_suffix(".html").exists(), page
    assert 'href="docs/install.html' in (html / "index.html").read_text()
    for name in BUILT_IN:
        text = (html / f"docs/reference/{name}.html").read_text()
        for each in describe_options(find_driver(name).Options):
            assert f">{each.name}</span>" in text, (name, each.name)
    for each in (*fields(Settings), *fields(Limits)):
        assert each.name == "limits" or f">{each.name}</span>" in settings, each.name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[here](other.md), [there](other.md#a-part)", ""),
        ("[gone](gone.md)", "gone.md"),
        ("[nobody](other.md#nobody)", "nobody"),
        ("[nothing](prometheus/nothing.yml)", "nothing.yml"),
    ],
)
def test_a_link_that_leads_nowhere_fails_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    """A link to a missing page, heading or file makes the build fail."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(f"# Front\n\n{line}\n\n{make_site._tree('', ['other.md'])}")
    (source / "other.md").write_text("# Other\n\n## A part\n")

    assert (said != "") == (make_site.build(source, tmp_path / "html") != 0)
    assert said in capfd.readouterr().err


TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),),
}  # fmt: skip


def faults(schema: dict[str, Any], value: Any, defs: dict[str, Any], where: str = "") -> list[str]:
    """Return the faults of a value by a schema, as far as our schemas use JSON Schema."""
    found = [each for ref in schema.get("allOf", []) for each in faults(ref, value, defs, where)]
    if "$ref" in schema:
        return found + faults(defs[schema["$ref"].rpartition("/")[2]], value, defs, where)
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    is_one = any(isinstance(value, TYPES[each]) for each in wanted) and (
        not isinstance(value, bool) or "boolean" in wanted
    )
    if not is_one:
        return [*found, f"{where}: {value!r} is no {wanted}"]
    if isinstance(value, list):
        found += [each for inner in value for each in faults(schema["items"], inner, defs, f"{where}[]")]
    if isinstance(value, dict):
        found += [f"{where}: no {each}" for each in schema.get("required", []) if each not in value]
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            if key in known or others:
                found += faults(known.get(key, others), inner, defs, f"{where}.{key}")
    return found


@pytest.mark.parametrize(
    ("line", "section"),
    [
        ("status", "status"), ("top --once --interval 1", "top"), ("latency 5/xvda --total", "latency"),
        ("orders", "orders"),
        ("set 5/xvda aio:/a --dry-run", "set, snapshot, resize, cow keep, cow drop"), ("stop", "upgrade, stop"),
        ("metrics", "metrics"), ("drivers", "drivers"), ("config show --defaults", "config show"),
    ],
)  # fmt: skip
def test_the_schema_is_what_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, section: str
) -> None:
    """schema.json accepts what the commands print, and nothing that lacks a key or has a value of another type."""
    layer = {"layer": "aio:/img", **{key: LAYER[key] for key in LAYER if key != "text"}, "figures": {"hits": 3}}
    definitions = make_site.json_schema((ROOT / "docs/json.md").read_text())["$defs"]

    def answer(request: dict[str, Any]) -> Answer:
        return Answer(Code.OK, [{**DISK, "layers": [layer]}]) if request["verb"] == "status" else working(request)

    with answering(tmp_path / "x", answer) as control:
        own = [] if line.startswith(("drivers", "config")) else ["--socket", control.path]
        assert 0 == main([*shlex.split(line), "--json", *own])
    printed = json.loads(capsys.readouterr().out)

    assert [] == faults(definitions[section], printed, definitions)
    for key in definitions[section]["required"]:
        without = {name: value for name, value in printed.items() if name != key}
        assert [f": no {key}"] == faults(definitions[section], without, definitions)
        assert faults(definitions[section], {**printed, key: object()}, definitions)
