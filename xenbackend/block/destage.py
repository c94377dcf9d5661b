"""Destages the dirty blocks of a write-back cache: writes them to the layer below, in the background.

Must not remove a block's tag before the layer below has made the block's current content durable.

    dirty      written by the guest; rests for REST_S, or less if more than half of the limit is dirty
    moving     being read from FILE and written below, a few at a time
    moved      written below, and waiting for the next flush there
    settling   covered by a flush of the layer below under way; then its tag is removed, and that is made durable

A block that is written to on this way starts again. If a flush of the layer below fails, whoever requested it, all of
them start again: the kernel may have lost what was written there, and reports that only once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from xenbackend.block.copies import Copies
from xenbackend.block.mapped.parts import Part
from xenbackend.block.request import Op, Request

if TYPE_CHECKING:
    from xenbackend.block.env import Env
    from xenbackend.block.write_back import WriteBack

REST_S = 5.0
_TICK_S = 0.25
_DEPTH = 8  # blocks that are moving at once
_BATCH = 64  # moved blocks that start a flush of the layer below, even while others are moving
_UNFLUSHED = 512  # blocks that may be moved while a flush takes long: `_due` steps over each of them every time
_AFTER_ERROR_S = 1.0


class Destage:
    """The dirty blocks of one cache. `dirty` has slot and time by block, the oldest first; from then on it rests."""

    def __init__(self, cache: WriteBack, env: Env, *, limit: int, rate: int) -> None:
        self._cache, self._env, self._limit, self._rate = cache, env, limit, rate
        self.dirty: dict[int, tuple[int, float]] = {}
        self.waiting: list[Request] = []  # discards that wait for moving blocks
        self.count = 0  # blocks written below so far
        self.is_closed = False
        self._moving: dict[int, int] = {}  # block by slot
        self._stale: set[int] = set()  # slots of `_moving` that have to be moved again, such as after a write to them
        self._moved: dict[int, int] = {}  # block by slot
        self._settling: dict[int, int] = {}  # block by slot
        self._refused: set[int] = set()  # blocks for which the layer below gave an error, and that are dirty since then
        self._error = ""  # the last error of the layer below
        self._freed: list[int] = []  # slots whose removed tag may still be in FILE
        self._copies = Copies()
        self._next_at = 0.0  # when the next block may be moved
        self._drains = self._has_failed = self._has_timer = self._is_settling = self._is_freeing = False
        self._is_soon = False

    def has_room(self, blocks: Iterable[int]) -> bool:
        """Return whether these blocks may become dirty, or are dirty already."""
        has_room = len(self.dirty) < self._limit and not self._cache.is_shunned
        return has_room or all(block in self.dirty for block in blocks)

    def within(self, first: int, last: int) -> list[tuple[int, tuple[int, float]]]:
        """Return the dirty blocks in this range, each with slot and time as in `dirty`."""
        dirty = self.dirty
        if last - first < len(dirty):
            return [(block, dirty[block]) for block in range(first, last + 1) if block in dirty]
        return [(block, each) for block, each in dirty.items() if first <= block <= last]

    def is_moving(self, first: int, last: int) -> bool:
        """Return whether one of these blocks is being moved."""
        return any(first <= block <= last for block in self._moving.values())

    def add(self, block: int, slot: int) -> None:
        """Note that a slot has, or is about to get, data that the layer below does not have."""
        if slot in self._moving:
            self._stale.add(slot)
        self._moved.pop(slot, None)
        self._settling.pop(slot, None)
        if block not in self.dirty:
            self._cache.map.pins[slot] += 1
            self.dirty[block] = (slot, self._env.now())
            self._watch()

    def forget(self, block: int) -> None:
        """Note that a block is durable in the layer below; its slot is free once its tag is durably removed."""
        slot, _ = self.dirty.pop(block)
        self._moved.pop(slot, None)
        self._settling.pop(slot, None)
        self._cache.tags.drop(slot)
        self._freed.append(slot)
        self._watch()
        if block in self._refused:
            self._refused.discard(block)
            if not self._refused:
                self._env.report("destage", "works again")

    def begin_anew(self, status: int) -> None:
        """Destage again what was written below and not flushed: a flush failed, so it may be lost there."""
        self._refuse(status, [*self._moved.values(), *self._settling.values()])
        self._stale.update(self._moving)
        self._moved.clear()
        self._settling.clear()
        self._fail()

    def drain(self, seconds: float) -> None:
        """Destage all blocks, for at most this time or until an error. For `close` only."""
        if self._env.read_only or not self._env.serves:
            return
        self._drains, self._has_failed = True, False
        give_up = self._env.now() + seconds
        self._env.call_later(seconds, lambda: None)
        self._go_on()
        self._cache.pass_on()
        self._env.wait_for(lambda: self._is_empty() or self._has_failed or self._env.now() > give_up)

    def tell_left(self, file: str) -> None:
        """Warn the administrator that the layer below is not the whole disk. For `close` only."""
        if self._drains:
            count = len(self.dirty)
            blocks = "1 block" if count == 1 else f"{count} blocks"
            why = f", as the layer below gives errors ({self._error})" if self._refused else ""
            self._env.alarm(
                f"it was closed, and {file} holds the only copy of {blocks}{why}: "
                "without that file the layer below is not the whole disk"
            )

    def _is_empty(self) -> bool:
        return not (self.dirty or self._freed or self._is_freeing)

    def _watch(self) -> None:
        if not (self._has_timer or self.is_closed or self._env.read_only) and self._env.serves:
            self._has_timer = True
            self._env.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._has_timer = False
        if self.is_closed:
            return
        if not self._is_empty():
            self._watch()
        self._go_on()
        self._cache.pass_on()

    def _go_on(self) -> None:
        """Move the blocks that are due, flush the layer below for moved ones, and free slots of settled ones."""
        if self.is_closed:
            return
        for block, slot in self._due():
            self._move(block, slot)
        if not self._is_settling and self._moved and (not self._moving or len(self._moved) >= _BATCH):
            self._is_settling, self._settling, self._moved = True, self._moved, {}
            self._cache.flush_below(self._settled)
        if not self._is_freeing and self._freed:
            self._free()

    def _go_on_soon(self) -> None:
        """Continue from the loop, so that the guest's requests get their turn even if both media answer at once."""
        if not self._is_soon:
            self._is_soon = True
            self._env.call_later(0, self._now)

    def _now(self) -> None:
        self._is_soon = False
        self._go_on()
        self._cache.pass_on()

    def _due(self) -> list[tuple[int, int]]:
        now, found = self._env.now(), list[tuple[int, int]]()
        room = min(_DEPTH, _UNFLUSHED - len(self._moved)) - len(self._moving)
        if self.waiting:  # otherwise these discards might wait for ever
            room = 0
        left = len(self.dirty) - len(self._moving) - len(self._moved) - len(self._settling)
        for block, (slot, since) in self.dirty.items():
            is_rested = self._drains or now - since >= REST_S or left - len(found) > self._limit // 2
            if len(found) >= room or now < self._next_at or not is_rested:
                break
            is_on_its_way = slot in self._moving or slot in self._moved or slot in self._settling
            if is_on_its_way or self._cache.is_written(slot) or self._cache.is_held(block):
                continue
            found.append((block, slot))
            if self._rate and not self._drains:
                self._next_at = max(now, self._next_at) + self._cache.block / self._rate
        return found

    def _move(self, block: int, slot: int) -> None:
        size = self._cache.block
        memory = self._copies.take(size)
        self._moving[slot] = block

        def read(part: Part) -> None:
            if part.status or self.is_closed:
                end(part)
            else:
                self._cache.send_below(Op.WRITE, block * size, [memory[:size]], size, written)

        def written(part: Part) -> None:
            self._refuse(part.status, [block])
            end(part)

        def end(part: Part) -> None:
            self._copies.put(memory)
            del self._moving[slot]
            is_stale = slot in self._stale
            self._stale.discard(slot)
            if part.status:
                self._fail()
            elif not is_stale and not self.is_closed:
                self._moved[slot] = block
                self.count += 1
            if is_stale:
                self.dirty[block] = (self.dirty.pop(block)[0], self._env.now())
            waiting, self.waiting = self.waiting, []
            for each in waiting:
                self._cache.alter(each)
            if self._drains:
                self._go_on()
            else:
                self._go_on_soon()

        self._cache.send_to_slot(Op.READ, slot, 0, [memory[:size]], read)

    def _refuse(self, status: int, blocks: Iterable[int]) -> None:
        """If `status` is an error of the layer below, report it; the report stays until these blocks are destaged."""
        refused = [block for block in blocks if block in self.dirty] if status else ()
        if refused:
            self._refused.update(refused)
            self._error = os.strerror(status)
            self._env.report("destage", f"the layer below gives errors ({self._error}): dirty blocks stay in FILE")

    def _fail(self) -> None:
        """Wait before the next try; `drain` gives up."""
        self._has_failed = True
        self._next_at = self._env.now() + _AFTER_ERROR_S

    def _settled(self, status: int) -> None:
        self._is_settling = False
        settled, self._settling = self._settling, {}
        if status:  # the blocks are still dirty
            self._cache.lose(status)
        else:
            for block in settled.values():
                self.forget(block)
        self._go_on()

    def _free(self) -> None:
        self._is_freeing = True
        freed, self._freed = self._freed, []

        def done(status: int) -> None:
            self._is_freeing = False
            if status:
                self._cache.lose(status)
                self._freed += freed
                self._fail()
                return
            for slot in freed:
                self._cache.map.pins[slot] -= 1
            self._go_on()

        self._cache.tags.flush(done)
