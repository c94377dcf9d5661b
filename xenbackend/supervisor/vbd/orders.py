"""Carries out operators' orders on one vbd: each order has a number, and gets exactly one answer.

Must not write to xenstore, nor talk to a worker except through the vbd's link. What must outlive the service is noted.

    pause, resume     the guest's requests wait, or go on
    set               another chain over the same content serves the guest from now on
    resize            the same chain is opened again, with the size that it has now
    snapshot          a new image over the one that is written to takes the guest's writes from now on
    keep, drop        the disk's unnamed file gets a name, or is replaced by a new one (`chains`)
    policy            sets what becomes of requests that fail
    upgrade           another worker process serves the guest from now on
    command           has one layer carry out a verb
    measure           measures the times of each layer for an interval, as long as a client waits for them
    end_measure       ends the measurement that is under way
    detach            the toolstack removes the disk; the order is done when that is over
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from xenbackend.block.policy import Policy
from xenbackend.block.spec import check_whole_paths, parse_chain
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer, Reply, of_bug
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.vbd import chains, events
from xenbackend.supervisor.vbd.measured import answer_of
from xenbackend.supervisor.vbd.notes import Exchange
from xenbackend.supervisor.vbd.phase import USABLE, Phase
from xenbackend.supervisor.vbd.requests import seconds_of, text_of

if TYPE_CHECKING:
    from xenbackend.supervisor.vbd.vbd import Vbd

# What exchanges the chain, or the process that has it open.
_EXCHANGES = frozenset({"set", "resize", "snapshot", "keep", "drop", "upgrade"})
BARRED_BY: dict[str, frozenset[str]] = {
    "set": _EXCHANGES,
    "resize": _EXCHANGES,
    "snapshot": _EXCHANGES,
    "keep": _EXCHANGES,
    "drop": _EXCHANGES,
    "upgrade": _EXCHANGES,
    "pause": frozenset({"pause"}),
    "resume": frozenset(),
    "policy": frozenset(),
    "command": frozenset(),
    "measure": frozenset({"measure", "upgrade"}),
    "end_measure": frozenset(),
    "detach": frozenset(),
}
ORDERS = tuple(BARRED_BY)
# A service that finds one of these under way gives it once more: doing it twice is the same as doing it once.
_AGAIN = ("pause", "resume", "policy", "detach")


@dataclass(slots=True)
class Order:
    """An order that is under way."""

    verb: str
    number: int
    reply: Reply
    former: str = ""  # chain in service when it began
    chain: str = ""  # chain that it puts in
    worker: int = 0  # process number of the worker that it replaces
    opens: bool = False  # a worker is still to open `chain`, which was put in while there was no worker


class Orders:
    """The orders of one vbd."""

    def __init__(self, vbd: Vbd, default_policy: str, now: Callable[[], float]) -> None:
        self._vbd, self._now = vbd, now
        self._default_policy = default_policy
        self._under_way: dict[int, Order] = {}

    @property
    def policy(self) -> str:
        """The policy that holds, as the text that a worker is given."""
        noted = self._vbd.handover.notes.policy
        return self._default_policy if noted is None else noted

    @property
    def paused_by(self) -> str:
        """Who has paused the disk, for people; empty while it is not paused."""
        paused = self._vbd.handover.notes.paused
        return "" if paused is None else paused or "an administrator"

    @property
    def under_way(self) -> list[Order]:
        """Orders without an answer, the oldest first."""
        return list(self._under_way.values())

    def is_exchanging(self) -> bool:
        """Return whether another chain is being put in, or the order for that has no answer yet."""
        return self._vbd.handover.notes.exchange is not None or any(each.chain for each in self._under_way.values())

    def give(self, verb: str, request: Mapping[str, Any], number: int, reply: Reply) -> None:
        """Carry out an order, by a verb of `ORDERS`; `reply` gets the one answer, now or later.

        Raises: ConfigError (ChainError), if it cannot be carried out; nothing was touched then, nor `reply` called.
        """
        barring = [each for each in self._under_way.values() if each.verb in BARRED_BY[verb]]
        if barring:
            sentence = f"{barring[0].verb} is under way, order {barring[0].number}; wait for it"
            reply(Answer(Code.BUSY, sentence=sentence, data=self.chain_data()))
            return
        order = Order(verb, number, reply, former=self._vbd.chain_in_service())
        try:
            self._begin(order, request)
        except Exception:
            self._under_way.pop(number, None)  # the caller answers
            raise

    def former(self, verb: str) -> str:
        """Return the present value of what an order changes: the chain, or the policy; empty if it changes neither."""
        if verb == "policy":
            return str(Policy(self.policy))
        return self._vbd.chain_in_service() if verb in _EXCHANGES - {"upgrade"} else ""

    def looked(self) -> None:
        """Answer the orders that wait for a worker to open or serve, if it does so now, or cannot."""
        for order in [each for each in self._under_way.values() if each.verb == "upgrade"]:
            device, worker = self._vbd.device, self._vbd.link.worker
            is_there = device.phase is Phase.SERVING or (device.phase is Phase.OPEN and not device.is_waited_for())
            if worker is not None and worker.pid != order.worker and is_there:
                self._answer(order, Answer(Code.OK, data={"worker": worker.pid}))
            elif device.phase is Phase.NONE or (device.phase is Phase.RESTING and worker is None and device.error):
                sentence = f"the new worker could not take over: {device.error or 'the disk is not served'}"
                self._answer(order, Answer(Code.FAILED, sentence=sentence))

        for order in [each for each in self._under_way.values() if each.opens]:
            device = self._vbd.device
            if device.phase in USABLE:
                self._answer(order, Answer(Code.OK, data=self.chain_data()))
            elif device.phase is not Phase.OPENING:
                problem = f"the disk now waits for {order.chain}: {device.error or 'it is not needed now'}"
                self._answer(order, Answer(Code.FAILED, sentence=problem, data=self.chain_data()))

    def left(self, number: int) -> None:
        """End an order that is of no use without a client that waits for its answer: a measurement."""
        order = self._under_way.get(number)
        if order is not None and order.verb == "measure":
            self._end_measuring()

    def _end_measuring(self) -> None:
        self._vbd.link.ask(messages.Measure(0), lambda _reply: None)

    def give_up(self, sentence: str, *, leaves: bool) -> None:
        """Answer all orders: the vbd has gone, or with `leaves` this service ends and the next one may go on."""
        for order in self.under_way:
            self.left(order.number)
            if order.verb == "detach" and self._vbd.device.sight.is_over:
                self._answer(order, Answer(Code.OK))
                continue
            goes_on = leaves and (order.verb in _AGAIN or self._is_noted(order.number))
            code = Code.UNDER_WAY if goes_on else Code.GONE
            self._answer(order, Answer(code, sentence=sentence, data=self.chain_data()))

    def chain_data(self) -> dict[str, Any]:
        """Return what an answer says of the chain in service, whatever became of the order."""
        return {"chain": self._vbd.chain_in_service(), "layers": [asdict(each) for each in self._vbd.device.layers]}

    def go_on(self, verb: str, to: str, number: int, reply: Reply) -> None:
        """Go on with an order that an earlier service did not live to answer; `to` is the chain or policy it asked for.

        One that was for a former disk in this place is not carried out on this one. Raises: ConfigError, as `give`.
        """
        notes = self._vbd.handover.notes
        if notes.exchanged_by == number:
            reply(Answer(Code.OK, data=self.chain_data()))
        elif verb in _AGAIN and number > notes.begun_after:
            self.give(verb, {"policy": to, "by": notes.paused}, number, reply)
        elif not self._is_noted(number):
            if verb == "measure":
                self._end_measuring()
            reply(Answer(Code.GONE, sentence="the service ended before the order was done", data=self.chain_data()))

    def _begin(self, order: Order, request: Mapping[str, Any]) -> None:
        match order.verb:
            case "pause":
                self._pause(order, str(request.get("by") or f"order {order.number}"))
            case "resume":
                self._resume(order)
            case "set" | "resize" | "snapshot" | "keep" | "drop":
                self._begin_exchange(order, request)
            case "policy":
                self._set_policy(order, str(request.get("policy", "")))
            case "upgrade":
                self._upgrade(order)
            case "command":
                self._command(order, request)
            case "measure":
                self._measure(order, seconds_of(request))
            case "end_measure":
                self._ask(order, messages.Measure(0), lambda reply: self._done_or_noted(order, reply, {}))
            case "detach":
                self._under_way[order.number] = order  # `give_up` answers

    def _begin_exchange(self, order: Order, request: Mapping[str, Any]) -> None:
        match order.verb:
            case "set":
                self._set(order, text_of(request, "chain"), request)
            case "resize":
                self._check_service()
                self._exchange(order, order.former, replaces=False, is_resize=True)
            case "snapshot":
                self._snapshot(order, text_of(request, "file"), str(request.get("format", "")))
            case "keep" | "drop":
                self._exchange_unnamed(order, request)

    def _is_noted(self, number: int) -> bool:
        """Return whether the notes have this order's exchange, either as under way or as the last one done."""
        notes = self._vbd.handover.notes
        return number == notes.exchanged_by or (notes.exchange is not None and notes.exchange.order == number)

    def _check_service(self) -> None:
        device = self._vbd.device
        if device.phase not in (Phase.OPEN, Phase.SERVING) or device.sight.keys is None:
            stage = "it has no worker" if device.phase is Phase.NONE else f"its worker is {device.phase.value}"
            raise ConfigError(f"the disk is not in service: {device.error or stage}")

    def _pause(self, order: Order, by: str) -> None:
        if self._vbd.handover.notes.paused is None:  # else it is paused already
            self._vbd.handover.note(paused=by)
        self._ask(order, messages.Pause(), lambda reply: self._paused(order, reply))

    def _paused(self, order: Order, reply: messages.Reply) -> None:
        is_paused = self._vbd.handover.notes.paused is not None
        if reply.code is Code.GONE and is_paused:  # without a worker nothing is in flight, and the next one is told
            self._answer(order, Answer(Code.OK, data={"paused": True}))
        else:
            self._answer(order, Answer(reply.code, sentence=reply.sentence, data={"paused": is_paused}))

    def _resume(self, order: Order) -> None:
        """Serve the disk again, whatever stopped it: a pause, a failed flush, workers that died, another file.

        Raises: ConfigError, if nobody knows which chain has the guest's data.
        """
        if self._vbd.device.is_undecided():
            raise ConfigError(f"the disk cannot be resumed: {self._vbd.device.error}")
        self._vbd.handover.note(paused=None)
        if self._vbd.device.has_found_another_file():
            self._vbd.handover.files.accept_others()
        self._vbd.handover.connections.accept_undrained()
        if self._vbd.device.phase is not Phase.SERVING:
            self._vbd.handover.poison(0)  # a worker that serves does that itself
        self._ask(order, messages.Resume(), lambda reply: self._done_or_noted(order, reply, {"paused": False}))
        self._vbd.handle(events.Resume())

    def _set_policy(self, order: Order, text: str) -> None:
        """Set another policy, if `text` has one. The answer has the policy that holds."""
        if not text:
            order.reply(Answer(Code.OK, data={"policy": str(Policy(self.policy))}))
            return
        Policy(text)  # so that an error names only what was given
        policy = str(Policy(f"{self.policy},{text}"))
        self._vbd.handover.note(policy=policy)
        question = messages.SetPolicy(policy)
        self._ask(order, question, lambda reply: self._done_or_noted(order, reply, {"policy": policy}))

    def _done_or_noted(self, order: Order, reply: messages.Reply, data: dict[str, Any]) -> None:
        """Answer an order that is done even if there is no worker, because the next one is told."""
        code = Code.OK if reply.code is Code.GONE else reply.code
        self._answer(order, Answer(code, sentence=reply.sentence if code is not Code.OK else "", data=data))

    def _set(self, order: Order, text: str, request: Mapping[str, Any]) -> None:
        check_whole_paths(parse_chain(text))
        chains.short(text)
        replaces, is_dry_run = request.get("replace") is True, request.get("dry_run") is True
        if self._vbd.device.waits_without_worker() and not is_dry_run:
            self._set_without_worker(order, text, replaces=replaces)
            return
        self._check_service()
        if is_dry_run:
            question = messages.Swap(text, replaces=replaces, is_dry_run=True)
            self._ask(order, question, lambda reply: self._looked_at(order, reply))
        else:
            self._exchange(order, text, replaces=replaces)

    def _set_without_worker(self, order: Order, text: str, *, replaces: bool) -> None:
        """Have a waiting guest served by another chain, which cannot be compared with the one before."""
        if not replaces:
            said = f"the disk is not in service: {self._vbd.device.error}"
            raise ConfigError(f"{said}; add --replace, as another chain cannot be compared with its own now")
        if self._vbd.handover.files.has_unnamed():
            chains.check_keeps_unnamed(text)
        order.chain = text
        params = (self._vbd.device.sight.keys or {}).get("params", "")
        self._vbd.handover.exchange_alone(Exchange(order.number, params, text))
        self._under_way[order.number] = order
        self._vbd.exchanges.follow()
        self._vbd.handle(events.Replaced())
        order.opens = True
        self.looked()

    def _looked_at(self, order: Order, reply: messages.Reply) -> None:
        data = self.chain_data()
        if reply.code is Code.OK:
            data |= {
                "before": [each.text for each in self._vbd.device.layers],
                "after": chains.list_of_texts(reply.data),
            }
        self._answer(order, Answer(reply.code, sentence=reply.sentence, data=data))

    def _snapshot(self, order: Order, file: str, image_format: str) -> None:
        self._check_service()
        is_file = messages.own_snapshot(file) is None
        question = messages.Branch(chains.whole(file) if is_file else file, image_format)
        self._ask(order, question, lambda reply: self._branched(order, file, reply))

    def _branched(self, order: Order, file: str, reply: messages.Reply) -> None:
        """Put in the chain with the new image. If that is refused, the image stays, empty."""
        if order.number not in self._under_way:
            return
        if reply.code is not Code.OK or messages.own_snapshot(file) is not None:
            self._answer(order, Answer(reply.code, sentence=reply.sentence, data=self.chain_data()))
            return
        try:
            if not chains.is_over(reply.data, order.former, file):
                self._vbd.link.breach(f"it says that its new image is not {file}")
                raise ConfigError(f"its worker made an image other than {file}, and was killed")
            self._exchange(order, chains.short(reply.data), replaces=False)
        except ConfigError as error:
            self._answer(order, Answer(Code.FAILED, sentence=str(error), data=self.chain_data()))

    def _exchange_unnamed(self, order: Order, request: Mapping[str, Any]) -> None:
        """Give the unnamed file a name, or replace it by a new one."""
        self._check_service()
        if order.verb == "keep":
            file = chains.whole(text_of(request, "file"))
            chain = chains.short(chains.with_named(order.former, file))
            self._exchange(order, chain, replaces=True, names_unnamed=file)
            return
        if self._vbd.device.is_waited_for() and request.get("force") is not True:
            raise ConfigError("a guest uses the disk, and would find another content; to do it all the same: --force")
        self._exchange(order, chains.with_unnamed(order.former), replaces=True, renews_unnamed=True)

    def _exchange(self, order: Order, chain: str, *, replaces: bool, is_resize: bool = False, **unnamed: Any) -> None:
        """Put a chain in. The exchange is noted first, so that it is known after any death."""
        order.chain = chain
        params = (self._vbd.device.sight.keys or {}).get("params", "")
        self._vbd.handover.note(exchange=Exchange(order.number, params, chain, **unnamed))
        question = messages.Swap(chain, replaces=replaces, order=order.number, is_resize=is_resize)
        self._ask(order, question, lambda reply: self._swapped(order, reply))

    def _swapped(self, order: Order, reply: messages.Reply) -> None:
        """Answer by which chain is in service. The worker's reply must agree with its standing."""
        if order.number not in self._under_way:
            return  # the service ends; the next one finds the exchange in the notes
        is_noted = self._vbd.handover.notes.exchange is not None  # no standing has shown that it is done
        is_done = False
        if reply.code is Code.GONE:
            is_done = self._vbd.exchanges.settle()  # the journal tells what the worker could not
        elif reply.code is Code.OK and order.chain == order.former:
            self._vbd.exchanges.end(is_done=True)
            self._vbd.look_soon(theirs=True)  # and note which files it has now, which no standing shows
        else:
            self._vbd.handover.exchange_is_not_done()
        code, sentence = reply.code, reply.sentence
        if code is Code.OK and is_noted and order.chain != order.former:
            code, sentence = Code.FAILED, "its worker says that another chain is in service, but reports this one"
            self._vbd.link.breach(sentence)
        elif is_done or self._vbd.chain_in_service() == order.chain != order.former:
            code, sentence = Code.OK, ""
        elif code is Code.GONE:
            code = Code.FAILED
        self._answer(order, Answer(code, sentence=sentence, data=self.chain_data()))

    def _upgrade(self, order: Order) -> None:
        """Let another process serve the disk."""
        self._check_service()
        worker = self._vbd.link.worker
        assert worker is not None  # noqa: S101 - it is in service
        order.worker = worker.pid
        self._under_way[order.number] = order
        self._vbd.handle(events.Replace())

    def _command(self, order: Order, request: Mapping[str, Any]) -> None:
        layer, verb, arguments = text_of(request, "layer"), text_of(request, "command"), request.get("arguments", [])
        if not isinstance(arguments, list) or not all(isinstance(each, str) for each in arguments):
            raise ConfigError("the arguments of a command must be a list of texts")
        if self._vbd.link.worker is None:
            raise ConfigError(f"the disk has no worker: {self._vbd.device.error or 'its chain is not open'}")
        question = messages.Command(layer, verb, arguments)
        self._ask(order, question, lambda r: self._answer(order, Answer(r.code, sentence=r.sentence, data=r.data)))

    def _measure(self, order: Order, seconds: float) -> None:
        self._check_service()
        begun = self._now()

        def end(reply: messages.Reply) -> None:
            lasted = min(seconds, round(self._now() - begun, 3))  # less if it was ended early
            self._answer(order, answer_of(order.former, lasted, self._vbd.link.breach, reply))

        self._ask(order, messages.Measure(round(seconds * 1000)), end)

    def _ask(self, order: Order, question: messages.Question, then: Callable[[messages.Reply], None]) -> None:
        """Ask the worker. If a bug of ours prevents `then` from handling the reply, the order's answer says so."""

        def take(reply: messages.Reply) -> None:
            try:
                then(reply)
            except Exception as bug:
                self._vbd.fault(bug)
                self._answer(order, of_bug(bug))

        self._under_way[order.number] = order
        self._vbd.link.ask(question, take)

    def _answer(self, order: Order, answer: Answer) -> None:
        """Answer an order, once. A later answer, as after a `give_up`, is dropped."""
        if self._under_way.pop(order.number, None) is not None:
            order.reply(answer)
