"""The text of a chain."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.block.grammar import (
    MAX_CHAIN,
    MAX_LAYERS,
    Item,
    Layer,
    format_chain,
    format_file,
    format_item,
    format_layer,
    parse,
)
from xenbackend.errors import ChainError

AIO = Layer("aio", (Item("/img"),))
LOG = Layer("log")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aio:/img", (AIO,)),
        ("log:|aio:/img", (LOG, AIO)),
        ("tap2:log:|aio:/img", (LOG, AIO)),
        ("tap:aio:/img", (AIO,)),
        ("tap:tapdisk:aio:/img", (AIO,)),
        ("aio:log:|aio:/img", (LOG, AIO)),
        ("vhd:log:|aio:/img", (LOG, AIO)),
        ("aio:tap2:log:|aio:/img", (LOG, AIO)),
        ("aio:aio:/img", (AIO,)),
        ("aio:ram:64M", (Layer("ram", (Item("64M"),)),)),
        ("vhd:/img", (Layer("vhd", (Item("/img"),)),)),
        (r"aio:log\:x", (Layer("aio", (Item("log:x"),)),)),
        ("aio:./log:x", (Layer("aio", (Item("./log:x"),)),)),
        (r"aio:/a\|b\,c\\d", (Layer("aio", (Item(r"/a|b,c\d"),)),)),
        ("aio:/img,cache=on", (Layer("aio", (Item("/img"), Item("cache=on"))),)),
        ("aio:/img,", (Layer("aio", (Item("/img"), Item(""))),)),
    ],
)
def test_layers_are_read_without_prefix_and_escapes(text: str, expected: tuple[Layer, ...]) -> None:
    """Layers are separated by bars, prefixes of toolstacks are removed, and a backslash protects the next character."""
    assert expected == parse(text)


@pytest.mark.parametrize("seed", range(20))
def test_every_name_survives_the_round_trip(seed: int) -> None:
    """`parse(format(layers)) == layers` for names with any characters, and the formatted text is canonical."""
    random = Random(seed)
    alphabet = "|,\\=:/.ab log:tap2 \n\udc80ä"
    for _ in range(100):
        layers = []
        for _ in range(random.randint(1, 4)):
            items = ["".join(random.choices(alphabet, k=random.randint(1, 12))) for _ in range(random.randint(0, 3))]
            layers.append(Layer(random.choice(["aio", "vhd", "log", "x-1"]), tuple(map(Item, items))))
        text = format_chain(tuple(layers))

        assert tuple(layers) == parse(text), (seed, text)
        assert text == format_chain(parse(text)), (seed, text)


@pytest.mark.parametrize("name", ["log:x", "tap2:log:|aio:/img", r"a\b", "|", ",", "a,b=c"])
def test_the_text_of_one_layer_holds_any_file_name(name: str) -> None:
    """`format_layer` writes any file name so that the layer is read back unchanged, at any place in a chain."""
    layer = Layer("aio", (Item(name),))

    assert (layer,) == parse(format_layer("aio", name))
    assert (LOG, layer) == parse(f"log:|{format_layer('aio', name)}")


@pytest.mark.parametrize("name", ["log:x", "tap2:log:|aio:/img", r"a\b", "|", ",", "a,b=c"])
def test_an_item_that_is_added_holds_any_value(name: str) -> None:
    """`format_item` writes any value so that it is read back unchanged, after any items that a layer already has."""
    layer = Layer("aio", (Item("/img"), Item(f"key={name}")))

    assert (layer, LOG) == parse(f"aio:/img,{format_item(f'key={name}')}|log:")


@pytest.mark.parametrize(
    ("text", "problem", "marked"),
    [
        ("", "the chain is empty", ""),
        ("tap2:", "the chain is empty", ""),
        ("|aio:/img", "a layer is empty", "|"),
        ("log:||aio:/img", "a layer is empty", "|"),
        ("log:|", "a layer is empty", ""),
        ("tap2:log|aio:/img", "'log' has no colon", "log"),
        ("/img", "is a file, not a layer", "/img"),
        ("LOG:|aio:/img", "does not begin with a driver's name", "LOG:"),
        ("log: |nbd :x", "does not begin with a driver's name", "nbd :x"),
        ("aio:/img\\", "nothing follows the backslash", "\\"),
        ("aio:/i\0mg", "zero byte", "?"),
    ],
)
def test_a_broken_text_is_shown_with_a_caret_under_the_place(text: str, problem: str, marked: str) -> None:
    """Each fault of a text has a message of its own, with a caret under the fault in the operator's text."""
    with pytest.raises(ChainError) as caught:
        parse(text)

    error = caught.value
    assert problem in error.problem
    assert marked == error.chain[error.position : error.position + error.length]


def test_limits_are_exact() -> None:
    """A chain of MAX_CHAIN bytes and one of MAX_LAYERS layers are read; one more is refused."""
    longest = "aio:".ljust(MAX_CHAIN, "x")
    deepest = "|".join(["log:"] * MAX_LAYERS)

    assert len(parse(longest)) == 1
    assert len(parse(deepest)) == MAX_LAYERS
    with pytest.raises(ChainError, match="at most 4096"):
        parse(longest + "x")
    with pytest.raises(ChainError, match="at most 32"):
        parse(deepest + "|log:")


@pytest.mark.parametrize(
    ("path", "text"),
    [("a=b", "./a=b"), ("a=b/c", "./a=b/c"), ("a/b=c", "a/b=c"), ("/a=b", "/a=b"), ("a,b", r"a\,b"), ("a", "a")],
)
def test_a_file_that_looks_like_an_option_is_written_with_a_path(path: str, text: str) -> None:
    """Of the text of a layer nobody takes a relative file name such as ``a=b`` for an option."""
    assert f"aio:{text},cache=on" == format_file("aio", path, "cache=on")
