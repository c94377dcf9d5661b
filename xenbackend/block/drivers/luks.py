"""luks: encrypts the layer below, in the formats LUKS1 and LUKS2.

Synopsis:
    luks:key=FILE[,slot=N][,discard=on]
    luks:key=credential:NAME[,slot=N][,discard=on]

Description:
    The layer below has a LUKS header, as written by `cryptsetup luksFormat` or, for LUKS1, by `qemu-img create`; the
    disk is the encrypted data behind it. The layers above see plain text.

    The passphrase is the whole content of FILE, byte for byte, as with `cryptsetup --key-file`: a newline at its end,
    which an editor or `echo` adds, is part of it. Only the owner and the group of FILE may have permission to read it.
    With credential:NAME the passphrase is the credential of that name that systemd passes to the service
    (`LoadCredentialEncrypted=` in a drop-in of its unit). It never appears in the chain, on a command line, or in
    xenstore.

Behaviour:
    The key is derived once per attachment, by the opener, a separate process, since Argon2 takes up to 4 GiB of memory
    and several seconds. Disks take turns, and a disk whose Argon2 needs more memory than the host, or the service's
    control group, has left is refused with both numbers. The worker never gets the passphrase. It keeps the volume's
    key in memory that outlives the worker, so that a successor can serve at once; the service overwrites that memory
    when the disk is detached. `set` with different options for this layer derives the key again while the guest waits,
    for 5 s at most.

    Data to be written are first copied, and encrypted in the copy; data that were read are decrypted in the worker's
    memory, and then copied. So a guest never sees ciphertext, and cannot alter it.

    The sector size is that of the header (`cryptsetup --sector-size`), or that of the layer below if it is larger. With
    4096 the guest sees sectors of 4096 bytes, from which firmware may not boot. They are several times faster than
    sectors of 512. After a power failure a sector that was being written has its old content, its new content, or, if
    the medium writes in smaller units, noise throughout.

    Discards reveal which parts of the disk are in use to anybody who has the medium, so by default there are none. With
    `discard=on` they are passed on, and what is read afterwards from a discarded range is noise.

Example:
    luks:key=/etc/xenbackend/guest1.key|aio:/dev/vg/guest1
    log:|luks:key=credential:guest1|qcow2:/srv/images/guest1.qcow2

Limits:
    Supported are AES in the modes XTS (plain64, plain) and CBC (essiv:sha256, plain64, plain), and keys by PBKDF2,
    argon2i and argon2id; the latter two need `argon2-cffi` (`python3-argon2`). Other ciphers, detached headers, volumes
    of several segments, integrity (dm-integrity), OPAL, and a re-encryption that has begun are refused with an error
    that says why. The header is never written: use cryptsetup to add and remove key slots while the disk is detached.

    The key is in the memory of the worker, the service and the keeper: encrypt the host's swap, or have none. A guest
    that has taken over its worker can read the key of its disk.

    A request costs 1.0 us more than without this layer, and for each 4096 bytes 1.1 us in sectors of 4096, or 3.8 us in
    sectors of 512, in one thread. dm-crypt below `aio:` (`cryptsetup open`, then aio:/dev/mapper/NAME) uses all
    processors; but it needs a block device below it, and has to be set up before the guest starts and taken down after
    it ends.
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

_READ, _WRITE = int(Op.READ), int(Op.WRITE)  # looking up and comparing the names for each request would cost more
_MEMORY = 4096  # bytes of the memory that passes the key to a successor: _HEAD, then the key
_HEAD = struct.Struct("<32sII")  # the volume's identity, the slot that was opened, bytes of the key
_MAX_COPIES = 32 << 20  # bytes of copies in use at a time; requests beyond that wait
_MIN_COPY = 4096
_TRIED = 2  # slots that are tried without the newline at the end of a passphrase
_MAX_SPARE = 16 << 20  # bytes of unused copies that are kept for later requests


class _Key:
    """A volume's key. It is overwritten when nothing refers to it any more."""

    def __init__(self, value: bytearray, slot: int) -> None:
        self.value = value
        self.slot = slot

    def __del__(self) -> None:
        wipe(self.value)


# Keys of the volumes that are open in this process, by the volume's identity and the options `key` and `slot`. So a
# second chain, checked beside the one in service, needs no key derivation, unless it names another passphrase or slot:
# that is tried, and refused if it does not open the volume.
_in_use: WeakValueDictionary[tuple[bytes, str, int | None], _Key] = WeakValueDictionary()


class _Own(Request):
    """A request to the layer below on behalf of one from above; if it has data, they are in a copy, `memory`."""

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
        slot: Count | None = option("the only key slot to try; by default all are tried", default=None)
        discard: bool = option("pass discards on, which reveals what is in use", default=False)

    options: Options
    _sectors: Sectors | None = None
    _key: _Key | None = None

    def open(self, env: Env) -> Geometry:
        """Read the header, and get the key. Raises: DriverError, OSError."""
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
        self._spares: dict[int, list[tuple[memoryview, int]]] = {}  # unused copies, by size
        self._spared = self._copied = 0  # bytes of unused copies, and of copies in use
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
        """Encrypt data to be written, and send requests of our own to the layer below."""
        passed: list[Request] = []
        refused: list[Request] = []
        for request in batch:
            op = request.op
            if op > _WRITE:
                if op == Op.FLUSH:
                    passed.append(self._stand_in(request, 0))
                elif self._can_discard:
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
        """Decrypt data that were read, and give back the requests from above that ours were made for."""
        back: list[Request] = []
        start, decrypt, put_copy = self._start, self._sectors.decrypt, self._put_copy  # type: ignore[union-attr]  # open
        for own in batch:
            request: Request = own.tag
            request.status = own.status
            memory = own.memory  # type: ignore[attr-defined]  # nothing else is sent
            if memory is not None:
                if request.op == _READ and not own.status:
                    try:
                        decrypt(own.address, own.length, own.offset - start)  # type: ignore[attr-defined]  # the same
                    except OSError as error:
                        request.status = error.errno or errno.EIO
                    else:
                        views, place = request.iov, 0
                        if len(views) == 1:
                            views[0][:] = own.iov[0]  # the common case: nothing to cut
                        else:
                            for view in views:
                                view[:] = memory[place : place + len(view)]
                                place += len(view)
                put_copy(memory, own.address)  # type: ignore[attr-defined]  # the same
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
        """Wipe this process's copies of the key; a successor still finds it in memory."""
        if self._sectors is not None:
            self._sectors.close()
            self._sectors = None
        self._key = None

    def _find_key(self, env: Env, volume: Volume, size: int) -> _Key:
        """Return the volume's key: from a predecessor, from an open chain of this process, or from the passphrase."""
        identity = volume.identity
        named = identity, self.options.key, self.options.slot
        memory = env.memory("key", _MEMORY)
        known, slot, length = _HEAD.unpack_from(memory)
        if known == identity and length == volume.cipher.key_size:
            key = _Key(bytearray(memory[_HEAD.size : _HEAD.size + length]), slot)
        else:
            key = _in_use.get(named) or self._unlock(env, volume, size)
            length = len(key.value)
            memory[: _HEAD.size] = bytes(_HEAD.size)  # so that a kill in between leaves no entry
            memory[_HEAD.size : _HEAD.size + length] = key.value
            _HEAD.pack_into(memory, 0, identity, key.slot, length)
        _in_use[named] = key
        return key

    def _unlock(self, env: Env, volume: Volume, size: int) -> _Key:
        """Get the key by the passphrase. Raises: DriverError, OSError."""
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

        first = replace(volume, slots=volume.slots[:_TRIED])  # each takes seconds, only for a better error message
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
        """Return our request for one with data; its copy has the encrypted data if it is a write.

        None: it failed, such as for lack of memory for the copy; `request` has the status.
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
            if request.op == _WRITE:
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
        if self._spared + size > _MAX_SPARE:  # some may be of sizes that the guest does not use any more
            self._spares.clear()
            self._spared = 0
        self._spared += size
        self._spares.setdefault(size, []).append((memory, address))


def _new_copy(size: int) -> tuple[memoryview, int]:
    memory = allocate(size)
    return memory, address_of(memory)
