"""Domains, the toolstack that makes and removes their disks, and a blkfront in each with data that is compared.

Must not wait: each step does one thing that is possible now, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.model.images import PLACES, Image
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_OKAY,
)
from xenbackend.rig.frontend import CLOSED, CLOSING, CONNECTED, INIT_WAIT, INITIALISED, INITIALISING, Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import BackendMisbehaved, Submitted
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path, libxl_path

if TYPE_CHECKING:
    from tests.model.operators import Asking
    from tests.model.world import World

PAGES = 96
_PATIENCE_S = 10.0  # libxl's, for the backend to reach Closed


@dataclass(eq=False)
class Truth:
    """What is true about one life of a vbd, independent of what anybody says.

    chain      the one in service
    targets    chains that orders may put in its place, until a client is told that they did not
    is_paused  an administrator was told so, and nobody has asked to resume the disk since
    """

    chain: str
    targets: dict[Any, str]
    is_paused: bool = False
    resumed: int = 0  # how often that was ordered
    pausing: dict[int, int] = field(default_factory=dict)  # orders to pause, and `resumed` when they were given


class Place:
    """The place of a vbd: a domain number and a device; there may be a domain or none."""

    def __init__(self, world: World, path: VbdPath) -> None:
        self.path = path
        self.truth: Truth | None = None
        self.life = 0
        self.is_up = False  # the hotplug script was answered
        self._world = world
        self._random = world.random
        self._toolstack = world.xenstored.store(0)
        self._guest: Guest | None = None
        self._guests_store = None
        self._frontend: Frontend | None = None
        self._step = "off"  # of the frontend
        self._script: Asking | None = None
        self._removal_at: float | None = None
        self._in_flight: dict[Submitted, tuple[int, bytes]] = {}
        self._undecided: set[Submitted] = set()  # in flight when a worker died: done, or not
        self.answers = 0
        self.may_submit = 0  # requests, when nothing else new begins
        self.base: Image | None = None
        self.last_chain = ""  # of the former life

    def __str__(self) -> str:
        return f"{self.path.frontend_domid}/{self.path.devid}"

    @property
    def is_there(self) -> bool:
        """Whether the toolstack has made it and not yet removed it."""
        return self.truth is not None

    @property
    def has_domain(self) -> bool:
        """Whether its domain lives."""
        return self._guest is not None

    @property
    def is_leaving(self) -> bool:
        """Whether the toolstack has asked for its removal."""
        return self._removal_at is not None

    @property
    def is_connected(self) -> bool:
        """Whether the guest uses its disk."""
        return self._step == "running"

    def name(self) -> str:
        """Return what an administrator calls it."""
        return f"{self.path.frontend_domid}/xvda"

    def backend_state(self) -> int:
        """Return the backend's state in xenstore."""
        return self._state(self.path.backend)

    def params(self) -> str | None:
        """Return the key params in xenstore."""
        node = self._world.xenstored.registry.tree.find(f"{self.path.backend}/params")
        return node.value.decode() if node else None

    # the toolstack

    def attach(self, chain: str) -> None:
        """Make the vbd as libxl does, and its domain if there is none."""
        world, path = self._world, self.path
        if self._guest is None:
            self._begin_domain()
        self.life += 1
        self.truth = Truth(chain, {})
        self.is_up, self._removal_at, self._step = False, None, "off"
        keys = {
            "frontend": path.frontend, "frontend-id": str(path.frontend_domid), "params": chain,
            "script": "/etc/xen/scripts/block-xenbackend", "online": "1", "mode": "w", "device-type": "disk",
            "state": str(INITIALISING),
        }  # fmt: skip
        domid = path.frontend_domid

        def body(nodes: Nodes) -> None:
            nodes.make(path.backend, keys, ["n0", f"r{domid}"])
            nodes.make(libxl_path(path), {"frontend": path.frontend, "backend": path.backend}, ["n0"])
            front = {"backend": path.backend, "backend-id": "0", "state": str(INITIALISING)}
            nodes.make(path.frontend, front, [f"n{domid}", "r0"])
            nodes.set_permissions(f"{path.frontend}/state", [f"n{domid}", "r0"])

        self._toolstack.transact(body)
        world.note("attach")

    def run_script(self) -> bool:
        """Run the hotplug script once the backend has reached InitWait."""
        if (
            self._script is not None
            or self.is_up
            or self.backend_state() != INIT_WAIT
            or not self._world.can_be_asked()
        ):
            return False
        request = {"verb": "hotplug", "action": "add", "path": self.path.backend}
        self._script = self._world.ask(request, self)
        return True

    def hear_script(self) -> bool:
        """Take the script's answer; after an error the toolstack removes the vbd again."""
        if self._script is None or not self._script.poll():
            return False
        answer, self._script = self._script.answer, None
        if answer is None:
            self._world.note("script: not answered")  # the service has died; xl runs the script again or gives up
        elif answer["code"] == "ok":
            self.is_up = True
        elif not self.is_leaving and self.is_there:
            self._world.note("script: failed")
            self.request_removal(force=True)
        return True

    def request_removal(self, *, force: bool = False) -> None:
        """Ask both ends to let go; with `force` the frontend's directory goes first."""

        def body(nodes: Nodes) -> None:
            if force:
                nodes.remove(self.path.frontend)
            if nodes.read_optional(f"{self.path.backend}/state") is not None:
                nodes.write(f"{self.path.backend}/online", "0")
                if nodes.read_optional(f"{self.path.backend}/state") != str(CLOSED):
                    nodes.write(f"{self.path.backend}/state", str(CLOSING))

        self._toolstack.transact(body)
        self._removal_at = self._world.clock() + _PATIENCE_S
        self._world.note("detach by force" if force else "detach")

    def finish_removal(self, *, at_once: bool = False) -> bool:
        """Remove the nodes once the backend has reached Closed, or had enough time."""
        if self._removal_at is None:
            return False
        state = self.backend_state()
        if not at_once and state not in (0, CLOSED) and self._world.clock() < self._removal_at:
            return False
        if state == CLOSED:
            self._world.check_closed(self)
        self._remove()
        return True

    def _remove(self) -> None:
        """Remove the nodes, whatever anybody does with the vbd."""
        self._world.ends(self)
        if self.truth is not None:
            self.last_chain = self.truth.chain
        self._drop_frontend()

        def body(nodes: Nodes) -> None:
            nodes.prune(self.path.frontend, domain_path(self.path.frontend_domid))
            nodes.prune(self.path.backend, domain_path(0))
            nodes.prune(libxl_path(self.path), f"/libxl/{self.path.frontend_domid}")

        self._toolstack.transact(body)
        self.truth, self._removal_at, self.is_up = None, None, False
        if self._script is not None:
            self._script.give_up()
            self._script = None

    def make_anew(self, chain: str) -> None:
        """Remove the vbd and make it again before anybody has looked: the domain's number may be used again, too."""
        self._remove()
        if self._random.random() < 0.5:
            self._end_domain()
        self.attach(chain)
        self._world.note("made anew in the same place")

    def destroy(self) -> None:
        """End the domain; the toolstack removes its disk as soon as it may."""
        self._drop_frontend()
        self._end_domain()
        if self.is_there and not self.is_leaving:
            self.request_removal(force=True)
        self._world.note("domain destroyed")

    def may_go_on(self) -> None:
        """Note that a pause is over."""
        if self.truth is not None:
            self.truth.is_paused = False
            self.truth.resumed += 1

    def reconnect(self) -> None:
        """Connect to xenstore anew: it was away."""
        self._toolstack.reconnect()
        if self._guests_store is not None:
            self._guests_store.reconnect()

    def _begin_domain(self) -> None:
        domid = self.path.frontend_domid
        self._world.xenstored.registry.introduce(domid)
        self._guest = Guest(self._world.machine.name, domid, pages=PAGES)
        self._guests_store = self._world.xenstored.store(domid)

    def _end_domain(self) -> None:
        if self._guest is None:
            return
        self._drop_frontend()
        self._guest.close()
        self._guest = None
        if self._guests_store is not None:
            self._guests_store.close()
        self._guests_store = None
        self._world.xenstored.registry.release(self.path.frontend_domid)

    # the guest's driver

    def step_frontend(self) -> bool:
        """Let the guest's driver do its next step."""
        if self._guest is None or not self.is_there or self._world.xenstored.registry is None:
            return False
        if self._frontend is None:
            if self._state(self.path.frontend) != INITIALISING or self._guests_store is None:
                return False
            wishes = Wishes(persistent=self._random.random() < 0.3)
            self._frontend = Frontend(self._guest, self._guests_store, self.path.frontend, wishes)
            self._step = "waiting"
            return True
        if self._state(self.path.frontend) == 0:  # the toolstack has taken the directory away
            return self._step == "running" and self.poll()
        return getattr(self, f"_when_{self._step}")()

    def _when_waiting(self) -> bool:
        assert self._frontend is not None
        if self.backend_state() != INIT_WAIT or not self.is_up:
            return False
        self._frontend.announce()
        self._step = "announced"
        return True

    def _when_announced(self) -> bool:
        assert self._frontend is not None
        state = self.backend_state()
        if state in (CLOSING, CLOSED):
            return self._begin_close()
        if state != CONNECTED:
            return False
        self._frontend.read_facts()
        self._frontend._set_state(CONNECTED)
        self._step = "running"
        self._world.note("guest connected")
        return True

    def _when_running(self) -> bool:
        if self.poll():
            return True
        frontend = self._frontend
        assert frontend is not None
        if self.backend_state() in (CLOSING, CLOSED) and not self._in_flight:
            return self._begin_close()
        if self._world.is_calm:
            self.may_submit -= 1
            return self.may_submit >= 0 and self._submit(frontend)
        chance = self._random.random()
        if chance < 0.01 and not self._in_flight:
            return self._begin_close()
        return chance < 0.6 and frontend.free() > 24 and self._submit(frontend)

    def _submit(self, frontend: Frontend) -> bool:
        place = self._random.choice(PLACES)
        if any(each == place for each, _ in self._in_flight.values()):
            return False
        chance = self._random.random()
        if chance < 0.5:
            data = self._world.images.next_pattern()
            request = frontend.submit(BLKIF_OP_WRITE, place, data=data)
        elif chance < 0.9 or not frontend.facts.can_flush:
            data = b""
            request = frontend.submit(BLKIF_OP_READ, place, 1)
        else:
            place, data = -1, b""
            request = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
        self._in_flight[request] = place, data
        return True

    def poll(self) -> bool:
        """Take the answers that are there, and compare."""
        if self._frontend is None or not self._frontend.rings or self._step not in ("running", "draining"):
            return False
        try:
            done = self._frontend.poll()
        except BackendMisbehaved as problem:
            self._world.blame(f"{self}: {problem}")
            return False
        for request in done:
            self._undecided.discard(request)
            self._take(request, *self._in_flight.pop(request))
        return bool(done)

    def lost_worker(self) -> None:
        """Note that the worker has died: its requests in flight may be done, and will be repeated."""
        self._undecided |= self._in_flight.keys()

    def leave_image(self, image: Image | None) -> None:
        """Note that another image is written to from now on: what a dead worker may have done, it did to this one."""
        self._may_be_done(image, self._undecided & self._in_flight.keys())

    def _may_be_done(self, image: Image | None, requests: Iterable[Submitted]) -> None:
        for request in requests:
            place, data = self._in_flight[request]
            if image is not None and request.operation == BLKIF_OP_WRITE:
                before = image.may_hold(place)
                image.now_holds(place, None if before is None else before | {data})

    def _take(self, request: Submitted, place: int, data: bytes) -> None:
        world, truth = self._world, self.truth
        assert truth is not None
        world.answered += 1
        self.answers += 1
        if truth.is_paused and not self.is_leaving:  # requests of a dead worker are done before a disk is closed
            world.blame(f"{self}: a request was answered although the disk is paused")
        image = world.images.of_chain(truth.chain)
        if place < 0 or image is None:
            return
        before = image.may_hold(place)
        if request.operation == BLKIF_OP_WRITE:
            if request.status == BLKIF_RSP_OKAY:
                image.now_holds(place, {data})
            else:
                world.note("guest: an error")
                image.now_holds(place, None if before is None else before | {data})
        elif request.status != BLKIF_RSP_OKAY:
            world.note("guest: an error")
        elif before is not None and request.data not in before:
            world.blame(
                f"{self}: sector {place} of {truth.chain} reads {request.data[:8].hex()}, which was never right"
            )
        else:
            image.holds(place, request.data)

    def _begin_close(self) -> bool:
        assert self._frontend is not None
        self._frontend._set_state(CLOSING)
        self._step = "closing"
        return True

    def _when_closing(self) -> bool:
        assert self._frontend is not None
        if self.backend_state() not in (CLOSING, CLOSED):
            return False
        self._frontend._set_state(CLOSED)
        self._step = "closed"
        return True

    def _when_closed(self) -> bool:
        frontend = self._frontend
        assert frontend is not None
        if self.backend_state() != CLOSED:
            return False
        try:
            for ring in frontend.rings:
                ring.close()
        except BackendMisbehaved as problem:
            self._world.blame(f"{self}: {problem}")
        frontend.rings = []
        self._world.note("guest closed")
        self._step = "over"
        return True

    def _when_over(self) -> bool:
        assert self._frontend is not None
        if self.is_leaving or self._random.random() < 0.7:
            return False
        self._frontend._set_state(INITIALISING)
        self._step = "waiting"
        self._world.note("guest began anew")
        return True

    def _drop_frontend(self) -> None:
        """Remove the guest's driver; its requests in flight may be done, even on a chain that is being put in."""
        if self._frontend is not None:
            self.poll()
            self._frontend.crash()
            self._frontend = None
        self._step = "off"
        chains = {self.truth.chain, *self.truth.targets.values()} if self.truth is not None else set()
        for image in {self._world.images.of_chain(chain) for chain in chains}:
            self._may_be_done(image, self._in_flight)
        self._in_flight.clear()
        self._undecided.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether the guest waits for an answer."""
        return bool(self._in_flight)

    def close(self) -> None:
        """End the domain, and close the toolstack's connection."""
        self._end_domain()
        self._toolstack.close()

    def _state(self, directory: str) -> int:
        node = self._world.xenstored.registry.tree.find(f"{directory}/state")
        return int(node.value) if node and node.value.isdigit() else 0


__all__ = ["BLKIF_OP_DISCARD", "INITIALISED", "Place", "Truth"]
