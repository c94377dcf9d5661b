"""The candidates for the end of a chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.block.drivers import BUILT_IN
from xenbackend.cli.complete_chain import candidates, files


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ai", ["aio:"]),
        ("log:|ai", ["log:|aio:"]),
        ("log:|throttle:io", ["log:|throttle:iops=", "log:|throttle:iops_read=", "log:|throttle:iops_write="]),
        ("aio:/x,cache=o", ["aio:/x,cache=on", "aio:/x,cache=off"]),
        ("aio:/x,cache=on,ca", []),
        ("nbd:u", ["nbd:unix:"]),
        ("luks:key=credential", ["luks:key=credential:"]),
        ("nosuch:x", []),
        ("valve:bps_w", ["valve:bps_write="]),
        (r"aio:a\|b", []),
        (r"aio:a\,b,cach", [r"aio:a\,b,cache="]),
    ],
)
def test_drivers_options_and_values(text: str, found: list[str]) -> None:
    """Candidates come from the drivers; options that are already given are not offered again."""
    offered = list(candidates(text))

    assert set(found) <= set(offered)
    assert found or not offered
    assert all(each.startswith(text) for each in offered)


def test_every_driver_is_offered() -> None:
    """All drivers are offered for an empty chain; a bar is offered after a filter without required options."""
    assert {f"{each}:" for each in BUILT_IN} <= set(candidates(""))
    assert "log:|" in candidates("log:")
    assert "aio:|" not in candidates("aio:")
    assert "luks:|" not in candidates("luks:")


def test_files(tmp_path: Path) -> None:
    """Directories end with a slash; hidden files need a leading dot; unreadable places offer nothing."""
    for name in ("img.raw", ".hidden", "other"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()

    assert [f"{tmp_path}/images/", f"{tmp_path}/img.raw"] == list(files(f"{tmp_path}/im"))
    assert [f"{tmp_path}/images/"] == list(files(f"{tmp_path}/", only_directories=True))
    assert f"{tmp_path}/.hidden" in files(f"{tmp_path}/.")
    assert f"{tmp_path}/.hidden" not in list(files(f"{tmp_path}/"))
    assert [] == list(files(f"{tmp_path}/none/"))
    assert [f"log:|aio:{tmp_path}/img.raw"] == list(candidates(f"log:|aio:{tmp_path}/img"))
    assert [f"luks:key={tmp_path}/img.raw"] == list(candidates(f"luks:key={tmp_path}/img"))
    assert [f"nbd:unix:{tmp_path}/other"] == list(candidates(f"nbd:unix:{tmp_path}/ot"))
