"""luks: encrypts the layer below, as LUKS1 and LUKS2 have it.

Synopsis:
    luks:key=FILE[,slot=N][,discard=on]
    luks:key=credential:NAME[,slot=N][,discard=on]

Description:
    The layer below has a LUKS header, as `cryptsetup luksFormat`, or for LUKS1 `qemu-img create`, makes it; the disk is
    what lies encrypted behind that. Layers above see plain text.

    The passphrase is all of FILE, byte by byte, as `cryptsetup --key-file` takes it: a newline at its end, which an
    editor or `echo` adds, belongs to it. FILE may be read by nobody but its owner and group. With credential:NAME it is
    the credential of that name, which systemd hands to the service (`LoadCredentialEncrypted=` in a drop-in of its
    unit). It never stands in the chain, on a command line, or in xenstore.

Behaviour:
    The key is found once per attachment, by the opener, a process of its own: Argon2 takes up to 4 GiB of memory and
    seconds. One disk has its turn after the other, and a disk whose Argon2 wants more memory than the host, or the
    service's control group, has left is refused with both numbers. The worker never gets the passphrase. It keeps the
    volume's key in memory that outlives it, so that a successor serves at once; the service overwrites that when the
    disk is detached. `set` with another text of this layer finds the key anew, while the guest waits, for 5 s at most.

    What is written is first copied, and encrypted in the copy; what is read is decrypted in memory of the worker, and
    then copied. So a guest never sees, and cannot alter, what is encrypted.

    Sectors are those of the header (`cryptsetup --sector-size`), or of the layer below where those are larger: a guest
    whose disk has 4096 sees sectors of 4096 bytes, from which firmware may not boot. They are several times faster than
    512. After a power failure a sector that was being written is old, new, or, where the medium itself writes less at
    once, noise as a whole.

    A discard shows to whoever has the medium which places are in use, so there is none by default. With `discard=on`
    it is passed on, and what is read there afterwards is noise.

Example:
    luks:key=/etc/xenbackend/guest1.key|aio:/dev/vg/guest1
    log:|luks:key=credential:guest1|qcow2:/srv/images/guest1.qcow2

Limits:
    AES by XTS (plain64, plain) and CBC (essiv:sha256, plain64, plain); keys by PBKDF2, argon2i and argon2id, the latter
    two if `argon2-cffi` (`python3-argon2`) is installed. Refused with a sentence are other ciphers, detached headers,
    volumes of several segments, integrity (dm-integrity), OPAL, and a re-encryption that was begun. The header is never
    written: cryptsetup adds and removes key slots while the disk is detached.

    The key is in the memory of worker, service and keeper: encrypt the host's swap, or have none. Where a worker has
    been taken over by its guest, that disk's key is lost to it.

    A request costs 1.4 us more than without this layer, and for each 4096 bytes 1.1 us in sectors of 4096, or 3.8 us in
    sectors of 512, in one thread. dm-crypt below `aio:` (`cryptsetup open`, then aio:/dev/mapper/NAME) uses all
    processors; it needs a block device below, and somebody who sets it up before the guest and takes it down after it.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.formats import luks
from xenbackend.block.formats.luks_volume import Volume
from xenbackend.block.keys import Derivation, KeySource
from xenbackend.block.luks.cipher import Sectors, address_of
from xenbackend.block.luks.unlock import find_key, wipe
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.options import Count, option
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.errors import DriverError

_MEMORY = 4096  # bytes of the one that a successor gets: _HEAD, then the key
_HEAD = struct.Struct("<32sII")  # the volume's identity, the slot that was opened, bytes of the key
_MAX_COPIES = 32 << 20  # bytes of copies at a time; requests beyond them wait
_MIN_COPY = 4096
_TRIED = 2  # slots, without the newline at the end of a passphrase
_MAX_SPARE = 16 << 20  # bytes of copies that are kept for the next requests


class _Key:
    """A volume's key, as long as it is used."""

    def __init__(self, value: bytearray, slot: int) -> None:
        self.value = value
        self.slot = slot

    def __del__(self) -> None:
        wipe(self.value)


# Of the volumes that are open in this process, by their identity, and the passphrase and slot that were named: whoever
# looks at a chain beside the one in service finds none anew, but hears of a passphrase that does not open it.
_in_use: WeakValueDictionary[tuple[bytes, str, int | None], _Key] = WeakValueDictionary()


class _Own(Request):
    """A request of ours for one from above, and the copy that it is done with, if it has data."""

    __slots__ = ("address", "memory")

    memory: memoryview | None
    address: int


class Luks(Filter):
    """See the head of this file."""

    name = "luks"

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `luks:`."""

        key: KeySource = option("a file with the passphrase, or a credential of the service")
        slot: Count | None = option("the only key slot to try, if not all of them", default=None)
        discard: bool = option("pass discards on, which shows what is in use", default=False)

    options: Options
    _sectors: Sectors | None = None
    _key: _Key | None = None

    def open(self, env: Env) -> Geometry:
        """Read the header, and have the key. Raises: DriverError, OSError."""
        below = super().open(env)
        volume = luks.parse(self.look, below.size, self.options.slot)
        if volume.offset % below.sector_size:
            raise DriverError(
                f"its data begin at byte {volume.offset}, inside a sector of the layer below, which has "
                f"{below.sector_size} bytes"
            )
        key = self._key = self._find_key(env, volume, below.size)
        cipher = volume.cipher
        self._sectors = Sectors(cipher, key.value, volume.sector_size, volume.tweak)
        self._start = volume.offset
        self._spares: dict[int, list[tuple[memoryview, int]]] = {}  # copies in no use, by their size
        self._spared = self._copied = 0  # bytes of those, and of copies in use
        self._waiting: deque[Request] = deque()
        self._unused: list[_Own] = []
        env.report("cipher", f"{cipher.text}, key of {cipher.key_size * 8} bits, sectors of {volume.sector_size} bytes")
        env.report("header", f"LUKS{volume.version}, key slot {key.slot}")
        sector = max(below.sector_size, volume.sector_size)
        self._can_discard = self.options.discard and below.can_discard and not env.read_only
        step = max(below.discard_granularity, sector) if self._can_discard else 0
        return replace(
            below,
            size=volume.size,
            sector_size=sector,
            physical_sector_size=max(below.physical_sector_size, sector),
            can_discard=self._can_discard,
            discard_granularity=step,
            discard_alignment=(below.discard_alignment - volume.offset) % step if step else 0,
        )

    def submit(self, batch: list[Request]) -> None:
        """Encrypt what is written, and pass on requests of our own."""
        passed: list[Request] = []
        refused: list[Request] = []
        for request in batch:
            op = request.op
            if op == Op.FLUSH:
                passed.append(self._stand_in(request, 0))
            elif op == Op.DISCARD:
                if self._can_discard:
                    passed.append(self._stand_in(request, self._start))
                else:
                    request.status = errno.EOPNOTSUPP
                    refused.append(request)
            elif self._waiting or (self._copied and self._copied + request.length > _MAX_COPIES):
                self._waiting.append(request)
            else:
                own = self._with_copy(request)
                (refused if own is None else passed).append(own or request)
        if passed:
            self.next.submit(passed)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if refused:
            self.complete(refused)

    def on_complete(self, batch: list[Request]) -> None:
        """Decrypt what was read, and give back those that ours stood for."""
        back: list[Request] = []
        start, decrypt = self._start, self._sectors.decrypt  # type: ignore[union-attr]  # open
        for own in batch:
            request: Request = own.tag
            request.status = own.status
            memory = own.memory  # type: ignore[attr-defined]  # nothing else is sent
            if memory is not None:
                if request.op == Op.READ and not own.status:
                    try:
                        decrypt(own.address, own.length, own.offset - start)  # type: ignore[attr-defined]  # the same
                    except OSError as error:
                        request.status = error.errno or errno.EIO
                    else:
                        views, place = request.iov, 0
                        if len(views) == 1:
                            views[0][:] = own.iov[0]  # as most are: nothing to cut
                        else:
                            for view in views:
                                view[:] = memory[place : place + len(view)]
                                place += len(view)
                self._put_copy(memory, own.address)  # type: ignore[attr-defined]  # the same
            own.tag, own.iov, own.memory = None, (), None  # type: ignore[attr-defined]  # the same
            back.append(request)
        self._unused += batch  # type: ignore[arg-type]  # the same
        more: list[Request] = []
        waiting = self._waiting
        while waiting and (not self._copied or self._copied + waiting[0].length <= _MAX_COPIES):
            request = waiting.popleft()
            next_own = self._with_copy(request)
            (back if next_own is None else more).append(next_own or request)
        if more:
            self.next.submit(more)  # type: ignore[union-attr]  # as in `submit`
        self.complete(back)

    def close(self) -> None:
        """Forget the key; a successor may still get it."""
        if self._sectors is not None:
            self._sectors.close()
            self._sectors = None
        self._key = None

    def _find_key(self, env: Env, volume: Volume, size: int) -> _Key:
        """Return the volume's key: a predecessor's, that of an open chain of this process, or from a passphrase."""
        identity = volume.identity
        named = identity, self.options.key, self.options.slot
        memory = env.memory("key", _MEMORY)
        known, slot, length = _HEAD.unpack_from(memory)
        if known == identity and length == volume.cipher.key_size:
            key = _Key(bytearray(memory[_HEAD.size : _HEAD.size + length]), slot)
        else:
            key = _in_use.get(named) or self._unlock(env, volume, size)
            length = len(key.value)
            memory[: _HEAD.size] = bytes(_HEAD.size)  # whoever dies in between leaves none
            memory[_HEAD.size : _HEAD.size + length] = key.value
            _HEAD.pack_into(memory, 0, identity, key.slot, length)
        _in_use[named] = key
        return key

    def _unlock(self, env: Env, volume: Volume, size: int) -> _Key:
        """Find the key. Raises: DriverError, OSError."""
        source = self.options.key

        def derive(how: Derivation) -> memoryview:
            return env.files.derive(source, how)

        found = find_key(volume, self.look, derive, size)
        if found is None:
            raise DriverError(self._why_not(env, volume, size), errno=errno.EACCES)
        return _Key(found[1], found[0])

    def _why_not(self, env: Env, volume: Volume, size: int) -> str:
        source = self.options.key
        numbers = ", ".join(str(slot.number) for slot in volume.slots)

        def derive(how: Derivation) -> memoryview:
            return env.files.derive(source, how, without_newline=True)

        first = replace(volume, slots=volume.slots[:_TRIED])  # each takes seconds, and this is for a sentence
        try:
            found = find_key(first, self.look, derive, size)
        except (DriverError, OSError):
            found = None  # it does not end with a newline
        if found is None:
            return f"the passphrase of {source} opens no key slot of it (tried: {numbers})"
        wipe(found[1])
        return (
            f"the passphrase of {source} opens no key slot of it, and without the newline at its end it opens slot "
            f"{found[0]}; all bytes of a file count, and `printf %s` writes one without a newline"
        )

    def _stand_in(self, request: Request, start: int) -> _Own:
        own = self._unused.pop() if self._unused else _Own()
        own.op, own.offset, own.length = request.op, request.offset + start, request.length
        own.iov, own.memory, own.status, own.tag = (), None, PENDING, request
        return own

    def _with_copy(self, request: Request) -> _Own | None:
        """Return a request for one with data, whose copy is encrypted if it is written.

        None: there is no memory for the copy, and the request has the status.
        """
        length = request.length
        size = max(_MIN_COPY, 1 << (length - 1).bit_length())
        spares = self._spares.get(size)
        try:
            if spares:
                memory, address = spares.pop()
                self._spared -= size
            else:
                memory, address = _new_copy(size)
            part = memory if size == length else memory[:length]
            if request.op == Op.WRITE:
                views, place = request.iov, 0
                if len(views) == 1:
                    part[:] = views[0]
                else:
                    for view in views:
                        memory[place : place + len(view)] = view
                        place += len(view)
                self._sectors.encrypt(address, length, request.offset)  # type: ignore[union-attr]  # open
        except OSError as error:
            request.status = error.errno or errno.ENOMEM
            return None
        own = self._unused.pop() if self._unused else _Own()
        own.op, own.offset, own.length = request.op, request.offset + self._start, length
        own.status, own.tag = PENDING, request
        own.memory, own.address = memory, address
        own.iov = [part]
        self._copied += size
        return own

    def _put_copy(self, memory: memoryview, address: int) -> None:
        size = len(memory)
        self._copied -= size
        if size > _MAX_SPARE:
            return
        if self._spared + size > _MAX_SPARE:  # of sizes that the guest may not use any more
            self._spares.clear()
            self._spared = 0
        self._spared += size
        self._spares.setdefault(size, []).append((memory, address))


def _new_copy(size: int) -> tuple[memoryview, int]:
    memory = allocate(size)
    return memory, address_of(memory)
