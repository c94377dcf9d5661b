"""Which names may be opened for a worker: those in a chain's text, and those that its images may name.

Must not open anything, nor believe what a worker says about a layer: only the chain's text counts, which an
administrator or a toolstack wrote.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from xenbackend.block.files import UNNAMED
from xenbackend.block.mapped.parents import DATA_FILE
from xenbackend.block.options import KEY, RECORD, files_of, uses_of
from xenbackend.block.servers import Account, Endpoint, account_of, certificates_of, servers_of
from xenbackend.block.spec import only_read_from, parse_chain
from xenbackend.errors import DriverError, printable
from xenbackend.protocol.jobs import MAX_FILES


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be done with a file.

    may_write     open it for writing
    is_shared     others may write to it as well, so that a block device need not be claimed for that
    is_record     make it if it is not there
    is_unnamed    it is the disk's unnamed file (`block.files.UNNAMED`), a record that no name leads to
    within        the places in which its layer allows the files that it names
    data_file     the file that has its data, as its layer says; empty if the layer does not say
    """

    may_write: bool
    is_shared: bool = False
    is_record: bool = False
    is_unnamed: bool = False
    within: str = ""
    data_file: str = ""

    def places_for(self, what: str) -> str:
        """Return the places for a file that it names, in the form of `parents=`."""
        if what != DATA_FILE or not self.data_file:
            return self.within
        return f"{self.within}:{os.path.abspath(self.data_file)}"  # noqa: PTH100 - pathlib would alter the name


@dataclass(frozen=True, slots=True)
class Server:
    """A server that may be connected to, and how long it may still be at work after the end of a connection."""

    endpoint: Endpoint
    drain_s: float


class Rules:
    """The rules of one chain."""

    def __init__(self, chain: str, *, read_only: bool, shareable: bool = False) -> None:
        """Take the names from a chain's text. Raises: ChainError."""
        self._rules: dict[str, Rule] = {}
        self._images: list[str] = []
        self._servers: dict[str, Server] = {}
        self._keys: set[str] = set()
        self._accounts: set[Account] = set()
        self._credentials: set[str] = set()
        layers = parse_chain(chain).layers
        first = only_read_from([layer.driver for layer in layers])
        for place, layer in enumerate(layers):
            within, data_file = (getattr(layer.options, name, "") for name in ("parents", "data_file"))
            is_shared: bool = shareable or getattr(layer.options, "share", False)
            for path, use in uses_of(layer.options).items():
                if use == KEY:
                    self._keys.add(path)
                elif path == UNNAMED:
                    self._rules[path] = Rule(may_write=True, is_record=True, is_unnamed=True)
                elif use == RECORD:
                    self._rules[path] = self._rules[f"{path}.1"] = Rule(may_write=True, is_record=True)
                else:
                    self._images.append(path)
                    may_write = not read_only and place < first
                    self._rules[path] = Rule(may_write, is_shared, within=within, data_file=data_file)
            drain_s = float(getattr(layer.options, "drain", 0.0))
            self._servers |= {name: Server(each, drain_s) for name, each in servers_of(layer.options).items()}
            if account := account_of(layer.options):
                self._accounts.add(account)
            if directory := certificates_of(layer.options):
                self._credentials.add(directory)
            self._source = list(files_of(layer.options).values())
        self._said = frozenset(self._rules)

    @property
    def images(self) -> list[str]:
        """The names of images in the chain's text."""
        return self._images

    @property
    def source(self) -> list[str]:
        """The names, in the chain's text, of the files of the image that is written to, the image itself first."""
        return self._source

    def is_said(self, name: str) -> bool:
        """Return whether a name is in the chain's text; an image has led to all other names."""
        return name in self._said

    def of(self, name: str) -> Rule:
        """Return what may be done with a file of this name. Raises: DriverError, if nothing may."""
        try:
            return self._rules[name]
        except KeyError:
            problem = f"{printable(name)} is not a file of this disk, and is not opened"
            raise DriverError(problem, path=name, errno=errno.EACCES) from None

    def server(self, name: str) -> Server:
        """Return a server that may be connected to. Raises: DriverError, if the chain does not name it."""
        try:
            return self._servers[name]
        except KeyError:
            problem = f"{printable(name)} is not a server of this disk"
            raise DriverError(problem, errno=errno.EACCES) from None

    def check_key(self, source: str) -> None:
        """Check that keys may be made of a passphrase. Raises: DriverError, if the chain does not name it."""
        if source not in self._keys:
            problem = f"{printable(source)} is not a passphrase of this disk"
            raise DriverError(problem, errno=errno.EACCES)

    def account(self, account: Account) -> Account:
        """Return an account of a cluster that the chain names. Raises: DriverError, if it does not name it."""
        if account not in self._accounts:
            problem = f"{printable(account.conf)} is not a configuration of this disk"
            raise DriverError(problem, path=account.conf, errno=errno.EACCES)
        return account

    def credentials(self, directory: str) -> str:
        """Return a directory of certificates that the chain names. Raises: DriverError, if it does not name it."""
        if directory not in self._credentials:
            problem = f"{printable(directory)} has no certificates of this disk"
            raise DriverError(problem, path=directory, errno=errno.EACCES)
        return directory

    def allow(self, name: str, named_by: str) -> None:
        """Allow reading a file to which an image was followed; `named_by`, the image, may itself be opened.

        Raises: DriverError, if there are too many files, or the image may not be opened.
        """
        rule = self.of(named_by)
        if len(self._rules) >= MAX_FILES:
            raise DriverError(f"the disk is made of more than {MAX_FILES} files", path=name, errno=errno.EMFILE)
        self._rules.setdefault(name, Rule(may_write=False, within=rule.within))
