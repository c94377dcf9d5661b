"""Tests of `xenbackend.errors`: each error has its class, its errno and its sentence."""

from __future__ import annotations

import errno

import pytest

from xenbackend import errors
from xenbackend.errors import ChainError, ConfigError, DriverError, KernelError, StoreError, XenbackendError


def test_all_are_ours() -> None:
    """XenbackendError is the base of all errors that we raise on purpose, and of no others."""
    classes = [each for each in vars(errors).values() if isinstance(each, type)]

    assert all(issubclass(each, XenbackendError) for each in classes)
    assert not issubclass(XenbackendError, OSError | ValueError)


def test_storage_that_fails_is_not_the_operators_mistake() -> None:
    """A file that cannot be written is the operator's mistake, unless its storage is full, read-only or broken."""
    kinds = {
        ConfigError: (errno.ENOENT, errno.ENOTDIR, errno.EACCES),
        XenbackendError: (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    }
    found = {kind: {type(errors.unwritable("it", OSError(each, ""))) for each in kinds[kind]} for kind in kinds}

    assert {kind: {kind} for kind in kinds} == found


def test_an_error_of_the_host_is_a_sentence() -> None:
    """An OSError becomes a sentence with file and reason, without its number; our own errors keep their text."""
    said = {
        "/img/x: No space left on device": OSError(errno.ENOSPC, "No space left on device", "/img/x"),
        r"/img/a\nb: No space left on device": OSError(errno.ENOSPC, "No space left on device", "/img/a\nb"),
        "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
        "it ended": OSError("it ended"),
        "the disk is gone": XenbackendError("the disk is gone"),
    }

    assert list(said) == [errors.sentence_of(each) for each in said.values()]


def test_chain_error_points_at_the_place() -> None:
    """A chain's error shows the chain, with carets under exactly the part that is wrong."""
    error = ChainError("no driver 'lag'", "lag:|aio:/img", position=0, length=3)
    sentence, chain, caret = str(error).splitlines()

    assert ("no driver 'lag'", "lag:|aio:/img") == (sentence, chain.strip())
    assert "lag" == chain[caret.index("^") : caret.rindex("^") + 1]
    assert isinstance(error, ConfigError)


def test_chain_error_always_has_a_caret() -> None:
    """For an error at the end of a chain the caret stands behind it."""
    caret = str(ChainError("a source is missing", "log:|", position=5, length=0)).splitlines()[-1]

    assert "       ^" == caret


def test_a_chain_without_text_has_no_caret() -> None:
    """If there is no chain to show, the sentence stands alone."""
    assert "the chain is empty" == str(ChainError("the chain is empty", " ", position=0))


def test_chain_error_points_at_the_place_whatever_stands_before_it() -> None:
    """Wide or invisible characters before the mistake do not displace the caret, and are not printed raw."""
    chain = "aio:日本\n\x1b[2J,frob=1"
    _, shown, caret = str(ChainError("unknown", chain, chain.index("frob"), 4)).splitlines()

    assert r"  aio:日本\n\x1b[2J,frob=1" == shown
    assert len("  aio:xxxx") + len(r"\n\x1b[2J,") == caret.index("^")
    assert "^^^^" == caret.strip()


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({}, "cannot be opened"),
        ({"layer": "aio:/img"}, "aio:/img: cannot be opened"),
        ({"option": "cache"}, "option cache: cannot be opened"),
        ({"layer": "aio:/img", "option": "cache", "path": "/img"}, "aio:/img: option cache: cannot be opened"),
    ],
)
def test_driver_error_says_where(where: dict[str, str], sentence: str) -> None:
    """A driver's error names its layer and option first, as far as they are known."""
    error = DriverError("cannot be opened", **where)

    assert (sentence, "cannot be opened", errno.EINVAL) == (str(error), error.problem, error.errno)


def test_driver_error_can_be_completed() -> None:
    """A caller that knows the layer can add it to an error."""
    error = DriverError("is locked", path="/img", errno=errno.EBUSY)
    error.layer = "aio:/img"

    assert ("aio:/img: is locked", "/img", errno.EBUSY) == (str(error), error.path, error.errno)


def test_kernel_error_is_a_sentence() -> None:
    """A kernel's refusal is a sentence with the operation and the meaning of errno."""
    error = KernelError("map 3 grants", errno.EPERM)

    assert ("map 3 grants: Operation not permitted", errno.EPERM) == (str(error), error.errno)


def test_store_error_without_an_answer() -> None:
    """An xenstore that does not answer counts as an I/O error."""
    assert errno.EIO == StoreError("the connection is gone").errno
    assert errno.ENOENT == StoreError("no such node", errno.ENOENT).errno
