"""Memory that requests use in place of the guest's."""

from __future__ import annotations

from random import Random

from xenbackend.block.copies import Copies, fill, give


def test_what_is_put_back_is_taken_again() -> None:
    """Memory that is put back is used again for the next copy of its size, so the kernel is asked only once."""
    copies = Copies()
    first = copies.take(5000)
    copies.put(first)

    assert copies.take(8192) is first
    assert copies.take(8192) is not first
    assert len(first) == 8192


def test_there_is_a_limit_but_for_one() -> None:
    """At most 32 MiB are in use at a time, whatever a guest asks for. A single request passes whatever its size."""
    copies, taken = Copies(), []
    assert copies.have_room(64 << 20)
    while copies.have_room(1 << 20):
        taken.append(copies.take(1 << 20))

    assert len(taken) == 32
    copies.put(taken.pop())
    assert copies.have_room(1 << 20)


def test_what_is_spared_is_bounded() -> None:
    """The amount of spare memory is limited, so sizes that are not used any more go back to the host."""
    copies, chance = Copies(), Random(1)
    for _ in range(200):
        copies.put(copies.take(chance.choice([4096, 1 << 20, 4 << 20])))
        assert sum(len(each) for kept in copies._spares.values() for each in kept) == copies._spared <= 8 << 20


def test_views_are_copied_in_their_order() -> None:
    """Copies keep the order of the views, in both directions and from any offset."""
    memory = memoryview(bytearray(16))
    fill(memory, 4, [memoryview(b"ab"), memoryview(b"cde")])
    views = [memoryview(bytearray(3)), memoryview(bytearray(2))]
    give(views, memory, 4)

    assert bytes(4) + b"abcde" + bytes(7) == memory
    assert [b"abc", b"de"] == views
