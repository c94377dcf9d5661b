"""The files of a disk, kept while it is attached."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept
from xenbackend.block.files import UNNAMED
from xenbackend.kernel.identity import DeviceIdentity, FileIdentity, identify, to_text
from xenbackend.opener import steps
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import kept_files
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import prefix_of, sort_inherited
from xenbackend.supervisor.vbd.kept_files import key_of
from xenbackend.supervisor.vbd.notes import Exchange

A, B = "aio:/a", "log:|aio:/b"


class Opener:
    """Tells the supervisor which file a name means, as an opener does when it opens it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def make(self, name: str, content: str = "x") -> str:
        """Make a file, replacing a former one, and return its path."""
        path = self.home / name
        new = self.home / "new"
        new.write_text(content)
        new.rename(path)
        return str(path)

    def opens(self, handover: Handover, path: str, **how: bool) -> str:
        """Tell the supervisor of a file that is being opened, and return why it must not be, or an empty text."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        return handover.files.take(path, to_text(identify(fd)), fd, **how)

    def opens_unnamed(self, handover: Handover, *, is_next: bool = False, replaces: bool = False) -> str:
        """Do the same for a new file without a name."""
        fd = steps.hold_unnamed(str(self.home))
        return handover.files.take(UNNAMED, to_text(identify(fd)), fd, is_next=is_next, replaces=replaces)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    """Return an opener for files of a directory."""
    return Opener(tmp_path)


@pytest.fixture
def handover() -> Handover:
    """Return a handover without a keeper."""
    return Handover(Keeper({}), PATH)


def next_one(kept: Kept) -> Handover:
    """Return the handover as the next service finds it."""
    keeper = kept.keeper()
    return Handover(keeper, PATH, sort_inherited(keeper, 0).get(PATH))


def inodes(handover: Handover) -> dict[str, int]:
    """Return the inode number of each kept file by name."""
    return {file.name: os.fstat(fd).st_ino for file, fd in handover.files.kept()}


def inode(path: str) -> int:
    """Return the inode number that a name means now."""
    return Path(path).stat().st_ino


def test_a_file_is_kept_whatever_becomes_of_its_name(kept: Kept, opener: Opener) -> None:
    """The next service gets the file that was first opened, even if its name means another one by then, or none."""
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors(A)
    image, parent = opener.make("image"), opener.make("parent")
    wanted = {path: inode(path) for path in (image, parent)}
    assert [opener.opens(handover, image), opener.opens(handover, parent)] == ["", ""]
    handover.leave()
    opener.make("image")
    Path(parent).unlink()
    heir = next_one(kept)

    assert wanted == inodes(heir)
    assert wanted.keys() == heir.files.identities().keys()
    heir.close()
    assert {} == kept.fds


def test_a_name_that_means_another_file_is_refused(handover: Handover, opener: Opener) -> None:
    """If a name of the chain in service means another file, that is refused with a sentence that says what to do, and
    the former file stays kept. After `accept_others` the new file is taken.
    """
    image = opener.make("image")
    opener.opens(handover, image)
    former = inodes(handover)
    opener.make("image", "another")
    sentence = opener.opens(handover, image)

    assert sentence.startswith(f"{image} is not what the disk was served from: it is another file, inode ")
    assert "`xenbackend resume`" in sentence
    assert former == inodes(handover)
    handover.files.accept_others()
    assert "" == opener.opens(handover, image)
    assert {image: inode(image)} == inodes(handover) != former
    handover.close()


def test_an_administrator_accepts_only_what_was_refused(handover: Handover, opener: Opener) -> None:
    """`accept_others` accepts only names that were refused; the next other file is refused again."""
    image, parent = opener.make("image"), opener.make("parent")
    for path in (image, parent):
        opener.opens(handover, path)
    for name in ("image", "parent"):
        opener.make(name, "another")
    assert opener.opens(handover, image)
    handover.files.accept_others()

    assert "" == opener.opens(handover, image)
    assert "is another file" in opener.opens(handover, parent)
    handover.close()


def test_where_nothing_was_refused_nothing_is_dropped(kept: Kept, opener: Opener) -> None:
    """If nothing was refused, `accept_others` drops no file: nothing else may lead to what a guest wrote to it."""
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors(A)
    image, parent = opener.make("image"), opener.make("parent")
    for path in (image, parent):
        opener.opens(handover, path)
    before = inodes(handover)
    Path(image).unlink()
    opener.make("parent", "another")
    handover.files.accept_others()

    assert before == inodes(handover)
    assert "is another file" in opener.opens(handover, parent)
    handover.leave()
    heir = next_one(kept)
    assert before == inodes(heir)
    heir.close()


def test_a_useless_descriptor_is_replaced_by_one_of_the_same_file(kept: Kept, opener: Opener) -> None:
    """A file that is found again takes the place of its descriptor, here and with the keeper, if it is the same one.
    Another file is refused, and takes the place only after `accept_others`.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors(A)
    image = opener.make("image")
    opener.opens(handover, image)
    [(_, former)] = handover.files.kept()
    again = os.open(image, os.O_PATH | os.O_CLOEXEC)
    identity = to_text(identify(again))
    os.set_inheritable(former, True)  # so that the descriptors can be told apart
    assert "" == handover.files.take(image, identity, again, is_again=True)
    [(_, present)] = handover.files.kept()
    assert (again, False) == (present, os.get_inheritable(present))
    opener.make("image", "another")
    before = inodes(handover)

    assert "is another file" in opener.opens(handover, image, is_again=True)
    assert before == inodes(handover)
    handover.files.accept_others()
    assert "" == opener.opens(handover, image)
    assert {image: inode(image)} == inodes(handover) != before
    assert 1 == sum(name.startswith(f"{prefix_of(PATH)}.f") for name in kept.fds)
    handover.close()


def test_an_accepted_file_may_be_exchanged_until_the_disk_is_served(handover: Handover, opener: Opener) -> None:
    """If the disk cannot be opened with a file that was accepted, `accept_others` accepts yet another one. Once a guest
    was served from it, another file is refused.
    """
    image = opener.make("image")
    opener.opens(handover, image)
    opener.make("image", "wrong")
    assert opener.opens(handover, image)
    for content in ("wrong", "right"):
        opener.make("image", content)
        handover.files.accept_others()
        assert "" == opener.opens(handover, image)
        assert {image: inode(image)} == inodes(handover)
    handover.files.forget_refusals()
    opener.make("image", "another")
    handover.files.accept_others()

    assert "is another file" in opener.opens(handover, image)
    handover.close()


def test_what_was_noted_elsewhere_is_compared(handover: Handover, opener: Opener) -> None:
    """If only identities are known, a name that means the same file is kept again, and another file is refused."""
    image, parent = opener.make("image"), opener.make("parent")
    opener.opens(handover, image)
    opener.opens(handover, parent)
    noted = handover.files.identities()
    handover.close()
    heir = Handover(Keeper({}), PATH)
    heir.expect(A, {key_of(name): identity for name, identity in noted.items()})
    heir.descriptors(A)
    opener.make("parent", "another")

    assert {} == inodes(heir)
    assert "" == opener.opens(heir, image)
    assert "is another file" in opener.opens(heir, parent)
    assert {image: inode(image)} == inodes(heir)
    heir.close()


def test_a_name_for_which_xenstore_has_no_room_is_compared_too(handover: Handover, opener: Opener) -> None:
    """If only a key for a long name was noted, its file is compared by that, and then kept under the name itself."""
    for _ in range(8):
        opener.home /= "x" * 200
    opener.home.mkdir(parents=True)
    image = opener.make("image")
    handover.expect(A, {key_of(image): to_text(identify(os.open(image, os.O_PATH)))})
    handover.descriptors(A)

    assert key_of(image) != image
    assert "" == opener.opens(handover, image)
    assert [image] == [*inodes(handover)] == [*handover.files.identities()]
    handover.files.accept_others()
    opener.make("image", "another")
    assert "is another file" in opener.opens(handover, image)
    handover.close()


def test_what_was_noted_elsewhere_may_be_nonsense(opener: Opener) -> None:
    """A noted identity that is invalid is logged, and the disk is served as if nothing were known."""
    said: list[str] = []
    handover = Handover(Keeper({}), PATH, complain=said.append)
    handover.expect(A, {"/a": "nonsense"})

    assert ["the record of the disk's files cannot be used: not an identity: 'nonsense'"] == said
    assert "" == opener.opens(handover, opener.make("image"))
    handover.close()


def begin_exchange(handover: Handover) -> None:
    """Note that B is to replace A."""
    handover.note(exchange=Exchange(1, A, B))


@pytest.mark.parametrize("is_done", [True, False])
def test_an_exchange_keeps_the_files_of_the_chain_that_is_in_service(
    kept: Kept, opener: Opener, *, is_done: bool
) -> None:
    """After an exchange the files that only the former chain had are dropped; if it is not done, those that only the
    new one had. A file of both is kept once. A service that starts in between knows which is which.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors(A)
    image, record, parent = (opener.make(name) for name in ("image", "record", "parent"))
    opener.opens(handover, image)
    opener.opens(handover, record)
    begin_exchange(handover)
    before = len(kept.fds), len(open_descriptors())  # the keeper has taken all, as descriptors on their way count, too
    assert "" == opener.opens(handover, image, is_next=True)
    assert before == (len(kept.fds), len(open_descriptors()))
    assert "" == opener.opens(handover, parent, is_next=True)
    assert {image, record} == inodes(handover).keys()
    handover.leave()
    heir = next_one(kept)
    if is_done:
        heir.exchange_is_done()
    else:
        heir.exchange_is_not_done()

    assert {image, parent if is_done else record} == inodes(heir).keys()
    assert 2 == sum(name.startswith(f"{prefix_of(PATH)}.f") for name in kept.fds)
    heir.close()


def test_another_file_of_the_same_name_needs_an_administrators_word(handover: Handover, opener: Opener) -> None:
    """A name in the new chain must mean the same file as in service, or the order must say that it replaces it. Then
    each chain has its own file, and the former one stays in service if the exchange is not done.
    """
    handover.descriptors(A)
    image = opener.make("image")
    opener.opens(handover, image)
    former = inodes(handover)
    begin_exchange(handover)
    opener.make("image", "another")

    assert opener.opens(handover, image, is_next=True).endswith("if it has the same content, add --replace")
    assert "" == opener.opens(handover, image, is_next=True, replaces=True)
    assert former == inodes(handover)
    handover.exchange_is_not_done()
    assert former == inodes(handover)
    begin_exchange(handover)
    opener.opens(handover, image, is_next=True, replaces=True)
    handover.exchange_is_done()
    assert {image: inode(image)} == inodes(handover) != former
    handover.close()


@pytest.mark.parametrize("dies", [False, True])
def test_only_the_unnamed_file_stays_where_no_worker_puts_the_chain_in(
    kept: Kept, opener: Opener, monkeypatch: pytest.MonkeyPatch, *, dies: bool
) -> None:
    """D2: if another chain is put in without a worker, its names are looked up anew, but the unnamed file has none and
    stays. A service that dies before the chain is in has dropped nothing.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors(A)
    image = opener.make("image")
    opener.opens(handover, image)
    opener.opens_unnamed(handover)
    before = inodes(handover)
    if dies:
        monkeypatch.setattr(handover, "exchange_is_done", lambda: None)
    handover.exchange_alone(Exchange(1, A, B))
    handover.leave()
    heir = next_one(kept)
    if dies:
        heir.exchange_is_not_done()

    assert (before if dies else {UNNAMED: before[UNNAMED]}) == inodes(heir)
    assert inodes(heir).keys() == heir.files.identities().keys()
    assert "was lost" in opener.opens_unnamed(heir)
    heir.close()


def test_an_unnamed_file_that_was_lost_is_not_waited_for_by_another_chain(handover: Handover, opener: Opener) -> None:
    """If the unnamed file was lost, a chain that is put in without a worker begins with a new one."""
    opener.opens_unnamed(handover)
    lost = Handover(Keeper({}), PATH)
    lost.expect(A, handover.files.identities())
    handover.close()
    assert "was lost" in opener.opens_unnamed(lost)
    lost.exchange_alone(Exchange(1, A, B))

    assert "" == opener.opens_unnamed(lost)
    lost.close()


def test_a_partition_that_grows_stays_the_same_disk(handover: Handover, opener: Opener) -> None:
    """`resize` accepts a partition that has become larger, whose new size counts from then on. Without that order it is
    taken for another partition.
    """
    part = DeviceIdentity(2049, 40, 1 << 20, 1 << 20)
    larger, image = to_text(replace(part, size=2 << 20)), opener.make("image")

    def take(identity: str, **how: bool) -> str:
        return handover.files.take("/dev/sda1", identity, os.open(image, os.O_PATH), **how)

    assert "" == take(to_text(part))
    assert "has 2097152 bytes" in take(larger)
    begin_exchange(handover)
    assert "add --replace" in take(larger, is_next=True)
    assert "" == take(larger, is_next=True, may_grow=True)
    handover.exchange_is_done()
    assert {"/dev/sda1": larger} == handover.files.identities()
    assert "" == take(larger)
    handover.close()


def test_a_device_that_grows_while_a_chain_is_put_in_is_kept_once(handover: Handover, opener: Opener) -> None:
    """A new chain's device may be found larger after it was found the same: then only the larger one is in service. If
    the chain is not put in, it is the former one.
    """
    part = DeviceIdentity(2049, 40, 1 << 20, 1 << 20)
    same, larger, image = to_text(part), to_text(replace(part, size=2 << 20)), opener.make("image")

    def take(identity: str, **how: bool) -> str:
        return handover.files.take("/dev/sda1", identity, os.open(image, os.O_PATH), **how)

    assert "" == take(same)
    for identity, is_done in ((same, False), (larger, True)):
        begin_exchange(handover)
        assert ["", ""] == [take(each, is_next=True, may_grow=True) for each in (same, larger)]
        handover.exchange_is_done() if is_done else handover.exchange_is_not_done()
        assert {"/dev/sda1": identity} == handover.files.identities()
        assert 1 == len(handover.files.kept())
    handover.close()


def test_what_an_exchange_refuses_is_not_accepted_later(handover: Handover, opener: Opener) -> None:
    """A file that `set` was refused is not accepted by a later `resume`."""
    image = opener.make("image")
    opener.opens(handover, image)
    opener.make("image", "another")
    opener.opens(handover, image, is_next=True)
    handover.files.accept_others()

    assert "is another file" in opener.opens(handover, image)
    handover.close()


def test_another_chain_begins_anew(handover: Handover, opener: Opener) -> None:
    """If the toolstack names another chain, none of the former one's files are kept."""
    before = len(open_descriptors())
    handover.descriptors(A)
    image = opener.make("image")
    opener.opens(handover, image)
    handover.descriptors(B)

    assert ({}, {}) == (inodes(handover), handover.files.identities())
    assert before == len(open_descriptors())
    opener.make("image", "another")
    assert "" == opener.opens(handover, image)
    handover.close()


def test_there_is_a_bound(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kept files is bounded, however many an image names: one too many is refused and closed."""
    monkeypatch.setattr(kept_files, "MAX_FILES", 16)
    before = len(open_descriptors())
    handover, image = Handover(Keeper({}), PATH), opener.make("image")
    identity = to_text(FileIdentity(1, 2))
    said = [handover.files.take(f"/f{number}", identity, os.open(image, os.O_PATH)) for number in range(19)]

    assert [""] * 16 == said[:16]
    assert all("is one file too many: the service keeps 16 for each disk" in each for each in said[16:])
    assert 16 == len(inodes(handover))
    handover.close()
    del handover
    assert before == len(open_descriptors())


def test_names_that_cannot_be_noted_are_refused(opener: Opener) -> None:
    """A file whose name does not fit into the notes is not opened, since nobody would know later which it was."""
    before = len(open_descriptors())
    handover, image = Handover(Keeper({}), PATH), opener.make("image")
    identity = to_text(FileIdentity(1, 2))
    name = "/" + "\udcff" * 4000
    said = [handover.files.take(f"{name}{number}", identity, os.open(image, os.O_PATH)) for number in range(20)]

    assert "" == said[0]
    assert "cannot be opened: the service cannot record that for the next one" in said[-1]
    assert said.count("") == len(inodes(handover))
    handover.close()
    del handover
    assert before == len(open_descriptors())


def test_no_identity_is_believed_that_nobody_writes(handover: Handover, opener: Opener) -> None:
    """An invalid identity is an error, and the descriptor is closed."""
    image = opener.make("image")
    opener.opens(handover, image)
    before = len(open_descriptors())
    with pytest.raises(ValueError, match="not an identity"):
        handover.files.take(image, "nonsense", os.open(image, os.O_PATH))

    assert before == len(open_descriptors())
    handover.close()


def test_an_unnamed_file_that_was_lost_is_never_another_one(handover: Handover, opener: Opener) -> None:
    """A lost unnamed file is never replaced by `resume`, which accepts only files with names; a kept one is never
    dropped.
    """
    image = opener.make("image")

    assert "" == opener.opens_unnamed(handover)
    assert handover.files.has_unnamed()
    opener.opens(handover, image)
    first = inodes(handover)
    handover.files.accept_others()
    assert first == inodes(handover)
    for _ in range(2):
        assert "was lost when the service was stopped; detach the disk" in opener.opens_unnamed(handover)
        handover.files.accept_others()
    assert first == inodes(handover)
    assert "was lost" in opener.opens_unnamed(handover, is_next=True)
    assert "" == opener.opens_unnamed(handover, is_next=True, replaces=True)
    handover.close()
