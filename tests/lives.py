"""Disks on recorded files whose workers are killed again and again: files and memories stay.

Some of the writes in flight at a death are done, in any order, perhaps torn; then all are repeated, as recovery does
(D11).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from tests.helpers_block import StepEnv, again, content, discard, flush, read, write
from tests.recorded import SECTOR, Disk, RecordedFile, RecordedFiles
from xenbackend.block.driver import Driver
from xenbackend.block.request import Op, Request


class Life:
    """The life of one disk. `files` may be exchanged, and `text` altered, before the next `start`."""

    def __init__(self, text: str, files: dict[str, RecordedFile], chance: Random) -> None:
        self.text, self.files, self.chance = text, files, chance
        self.memories: dict[str, dict[str, bytearray]] = {}
        self.resumes = False
        self.start()

    def start(self) -> None:
        """Start a worker."""
        memories, resumes, envs = self.memories, self.resumes, list[StepEnv]()

        class Kept(Disk):
            def _env(self, layer: str, /, *, read_only: bool, shareable: bool) -> StepEnv:
                env = super()._env(layer, read_only=read_only, shareable=shareable)
                env.memories, env.resumes = memories.setdefault(layer, {}), resumes
                envs.append(env)
                return env

        self.resumes, self.envs = True, envs
        self.disk = Kept(self.text, RecordedFiles(**self.files))

    def kill(self) -> None:
        """Kill the worker, and start another one."""
        for file in self.files.values():
            self.chance.shuffle(file.waiting)
            for request in file.waiting:
                if request.op == Op.WRITE and self.chance.random() < 0.6:
                    data = content(request)
                    file.write_at(request.offset, data[: self.chance.randint(0, len(data) // SECTOR) * SECTOR])
            file.waiting.clear()
        self.start()

    def rest(self) -> None:
        """Make every timer of the layers go off."""
        for env in self.envs:
            env.ring()

    @property
    def top(self) -> Driver:
        """Return the top layer."""
        return self.disk.chain.layers[0].driver

    def figures(self) -> dict[str, int]:
        """Return the figures of the top layer."""
        return self.top.figures()

    def die(
        self, times: int, model: bytearray, *, ops: Sequence[int], longest: int, rests: float = 0, waits: int = 0
    ) -> Iterator[None]:
        """Kill the worker so many times, with requests of these kinds in flight; yield when they have been repeated.

        `model` gets what the disk holds then. After a share `rests` of the steps, timers go off. A request that ends
        with the status `waits` is repeated, too.
        """
        for _ in range(times):
            out = self._requests(model, ops, longest)
            self.disk.chain.submit(list(out))
            for _ in range(self.chance.randint(0, 14)):
                self.disk.step()
                if self.chance.random() < rests:
                    self.rest()
            answered = {request for request in self.disk.back if not waits or request.status != waits}
            assert {0} >= {request.status for request in answered}
            self.kill()
            left = [again(request) for request in out if request not in answered]
            if left:
                assert {0} == set(self.disk.do(*left))
            yield

    def _requests(self, model: bytearray, ops: Sequence[int], longest: int) -> list[Request]:
        """Return requests that do not overlap, some followed by a flush."""
        chance, out = self.chance, list[Request]()
        for _ in range(chance.randint(1, 12)):
            length = chance.choice([512, 1024, 4096, 8192, SECTOR * chance.randint(1, longest)])
            offset = chance.randrange(0, (len(model) - length) // SECTOR + 1) * SECTOR
            if any(each.offset < offset + length and offset < each.offset + each.length for each in out):
                continue
            match chance.choice(ops):
                case Op.READ:
                    request = read(offset, length)
                case Op.WRITE:
                    request = write(offset, chance.randbytes(length))
                    model[offset : offset + length] = content(request)
                case _:
                    request = discard(offset, length)
                    model[offset : offset + length] = bytes(length)
            out += [request, flush()] if chance.random() > 0.85 else [request]
        return out


class Beside(Life):
    """The life of a disk `image` whose layer keeps a file beside it, at `path`."""

    path: str

    @property
    def image(self) -> RecordedFile:
        """Return the file of the image."""
        return self.files["image"]

    @property
    def file(self) -> RecordedFile:
        """Return the file that the layer keeps."""
        return self.files[self.path]
