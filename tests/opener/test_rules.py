"""Which names may be opened for a worker."""

from __future__ import annotations

import errno

import pytest

from xenbackend.block.mapped.parents import DATA_FILE, EXTENT, PARENT
from xenbackend.block.servers import Account
from xenbackend.errors import DriverError
from xenbackend.opener.rules import Rule, Rules
from xenbackend.protocol.jobs import MAX_FILES


def test_what_the_chain_names_may_be_opened() -> None:
    """Images may be opened as the disk is attached, and records and their older halves always for writing; no other
    name.
    """
    rules = Rules("log:/log|qcow2:/img,data_file=/data,parents=/all", read_only=False)
    reading = Rules("log:/log|qcow2:/img,data_file=/data", read_only=True)

    assert Rule(may_write=True, within="/all", data_file="/data") == rules.of("/img") == rules.of("/data")
    assert Rule(may_write=True, is_record=True) == rules.of("/log") == rules.of("/log.1") == reading.of("/log")
    assert Rule(may_write=False, data_file="/data") == reading.of("/img")
    assert ["/img", "/data"] == rules.source
    assert rules.is_said("/data")
    for name in ("/etc/shadow", "/img.1", "img", ""):
        with pytest.raises(DriverError, match="is not opened") as caught:
            rules.of(name)
        assert errno.EACCES == caught.value.errno


def test_what_lies_below_a_layer_that_keeps_the_writes_is_only_read() -> None:
    """Below `cow:` nothing can be written except the records of layers there, whatever the worker asks for."""
    rules = Rules("log:/one|cow:/cow|log:/two|partition:1|qcow2:/img", read_only=False)

    assert Rule(may_write=False) == rules.of("/img")
    assert all(rules.of(name).may_write for name in ("/one", "/two", "/cow"))
    assert rules.of("/cow").is_record
    assert not Rules("cow:/a|cow:/b|aio:/img", read_only=False).of("/img").may_write


def test_what_is_shared() -> None:
    """An image is shared if the disk was attached as w!, or if its layer says so; its parents are read-only."""
    rules = Rules("qcow2:/img,share=on", read_only=False)
    rules.allow("/base", "/img")

    assert rules.of("/img").is_shared
    assert Rules("aio:/img", read_only=False, shareable=True).of("/img").is_shared
    assert not Rules("aio:/img", read_only=False).of("/img").is_shared
    assert Rule(may_write=False) == rules.of("/base")


def test_the_data_file_of_a_layer_is_a_place_for_that_alone() -> None:
    """`data_file=` allows the file to hold an image's data, and not to be a parent or an extent."""
    rule = Rules("qcow2:/img,data_file=/data,parents=/all", read_only=False).of("/img")

    assert ["/all:/data", "/all", "/all"] == [rule.places_for(each) for each in (DATA_FILE, PARENT, EXTENT)]
    assert "/all" == Rule(may_write=False, within="/all").places_for(DATA_FILE)


def test_certificates_are_those_of_the_chain() -> None:
    """Only the directory of certificates that a layer names, in an option or a URI, may be read."""
    chains = ("nbd:nbds://h/a?tls-certificates=/certificates", "nbd:h:1,certificates=/certificates")
    for chain in chains:
        rules = Rules(f"log:/log|{chain}", read_only=False, shareable=False)
        assert "/certificates" == rules.credentials("/certificates")
        for directory in ("/", "/certificates/", "/log", ""):
            with pytest.raises(DriverError, match="no certificates of this disk"):
                rules.credentials(directory)


def test_the_account_of_a_cluster_is_the_chains() -> None:
    """A configuration is read only for the user that the chain names with it."""
    rules = Rules("log:/log|rbd:a/b,id=x,conf=/c", read_only=False)

    assert Account("/c", "x") == rules.account(Account("/c", "x"))
    for account in (Account("/c", "admin"), Account("/log", "x"), Account("/etc/shadow", "x")):
        with pytest.raises(DriverError, match="is not a configuration of this disk") as caught:
            rules.account(account)
        assert errno.EACCES == caught.value.errno
    with pytest.raises(DriverError, match="is not opened"):
        rules.of("/c")


def test_the_file_of_a_memory_disk_may_be_opened() -> None:
    """The file that `ram:` names may be opened; a size is not taken for a file."""
    assert Rules("ram:/img", read_only=False).of("/img")
    with pytest.raises(DriverError):
        Rules("ram:64M", read_only=False).of("64M")


def test_what_an_image_may_name_is_only_read() -> None:
    """A file that an image names is read-only, and may lead where the image may; a file that the chain names keeps its
    rule.
    """
    rules = Rules("qcow2:/img,parents=/all", read_only=False)
    rules.allow("/all/base", "/img")
    rules.allow("/all/deeper", "/all/base")
    rules.allow("/img", "/all/deeper")
    assert not rules.is_said("/all/base")
    with pytest.raises(DriverError):
        rules.allow("/other", "/nobody")

    assert Rule(may_write=False, within="/all") == rules.of("/all/base") == rules.of("/all/deeper")
    assert rules.of("/img").may_write


def test_files_are_bounded() -> None:
    """The number of files is bounded, whatever a hostile worker asks for."""
    rules = Rules("aio:/img", read_only=True)
    for number in range(MAX_FILES - 1):
        rules.allow(f"/{number}", "/img")
    with pytest.raises(DriverError, match=f"more than {MAX_FILES} files") as caught:
        rules.allow("/one-more", "/img")

    assert errno.EMFILE == caught.value.errno


def test_keys_are_made_of_what_the_chain_names() -> None:
    """Keys are derived only from the passphrases that the chain names, and those cannot be opened."""
    rules = Rules("log:|luks:key=/key|luks:key=credential:two|aio:/img", read_only=False)
    rules.check_key("/key")
    rules.check_key("credential:two")
    assert ["/img"] == rules.images
    with pytest.raises(DriverError, match="is not opened"):
        rules.of("/key")
    for name in ("/img", "/etc/shadow", "two", "", "credential:"):
        with pytest.raises(DriverError, match="is not a passphrase of this disk") as caught:
            rules.check_key(name)
        assert errno.EACCES == caught.value.errno
