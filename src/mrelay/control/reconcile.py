"""Makes what there is equal to what the rules want: want minus have, in an order that loses no frame.

Owns what is open (`have`), what failed, and the one task that changes either. First what a rule needs to
run, then the rule in every worker, then the memberships that bring its packets; removals the other way
round. Called by main, rulebook and api, which only trigger it and may wait for it. Nothing blocks.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from mrelay.control.events import EventLog, Happened, OutputState, RuleUp, RuleWaiting
from mrelay.control.fastpath import FastPath, hop_of
from mrelay.control.links import LinkTable
from mrelay.control.routes import Hop, NextHops
from mrelay.control.rulebook import Rulebook
from mrelay.control.supervisor import RequestFailed, Supervisor
from mrelay.control.want import (
    STARTING,
    UP,
    EgressIds,
    Own,
    RulePlan,
    Settings,
    in_force,
    output_state,
    own_sources,
    plan_rules,
    rule_state,
)
from mrelay.control.workers import Workers
from mrelay.logs import log_many
from mrelay.messages import AttachXdp, HoldUnicast, JoinGroup, OpenEgress, OpenIngress, PutRule, Resource, SetGro

log = logging.getLogger(__name__)

PART = 256  # rules that are planned at a time
BACK_OFF = 5.0  # seconds until what failed is tried again, unless a link changes first


class Reconciler:
    """`plans`, `failed` and `running` (the rules in force) are the outcome of the last pass, to be shown."""

    def __init__(
        self,
        supervisor: Supervisor,
        workers: Workers,
        links: LinkTable,
        book: Rulebook,
        hops: NextHops,
        *,
        settings: Settings,
        events: EventLog,
        held: Iterable[Resource] = (),
        fast: FastPath | None = None,
    ) -> None:
        self._fast = fast
        self._supervisor, self._workers, self._links, self._book = supervisor, workers, links, book
        self._hops, self._settings, self._events = hops, settings, events
        self._have = set(held)
        egresses = [what for what in self._have if isinstance(what, OpenEgress)]
        self._ids = EgressIds(egresses, fast.left(egresses) if fast is not None else frozenset())
        self._wake = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._states: dict[Subject, str] = {}
        self.refused: dict[Resource, str] = {}  # GRO, XDP, held ports: done without, retried when a link changes
        self._no_xdp: dict[int, str] = {}  # what was last said of it, by interface
        self._anew: set[JoinGroup] = set()  # to be left and joined again in the next pass
        self._known: dict[str, RulePlan] = {}  # made since the links, or the addresses to send from, last changed
        self._own: Own = {}
        self.plans: list[RulePlan] = []
        self.failed: dict[Resource, str] = {}
        self.running: list[PutRule] = []
        self.after_pass: Callable[[], None] = lambda: None

    def trouble(self) -> dict[Resource, str]:
        """The state of what was asked for and is not well: it could not be opened, or can't be reached."""
        problems = self._hops.problems
        found: dict[Resource, str] = {what: f"error: {problem}" for what, problem in self.failed.items()}
        for plan in self.plans if problems else ():
            for egress in (output.egress for output in plan.outputs):
                hop = self._hop(egress) if egress else None
                if egress and hop in problems:
                    found[egress] = problems[hop]
        return found

    def _hop(self, egress: OpenEgress) -> Hop | None:
        """What an output must reach; without a fast path only its unicast address, if it has one."""
        hop = hop_of(egress, self._links.by_name.get(self._links.name(egress.ifindex)))
        return hop if self._fast is not None or (hop is not None and hop.address == egress.address) else None

    def hops_changed(self) -> None:
        """A route or neighbour came or went: what failed for want of it may be had now."""
        self._tell()
        if self._fast is not None:
            self._fast.look_again()
        if self.failed:
            self._wake.set()

    def trigger(self) -> None:
        """Something changed: look again soon."""
        self._wake.set()

    def links_changed(self) -> None:
        """The same, and what was refused for good may now be had."""
        self.refused.clear()
        self._known = {}
        self._hops.look_again()
        self._wake.set()

    async def join_anew(self, joins: AbstractSet[JoinGroup]) -> None:
        """Leave and join: whoever snoops on the segment hears it."""
        self._anew |= joins
        await self.settled()

    def state_of(self, name: str) -> str:
        """A rule's state, as /v1/rules has it."""
        plan = next((plan for plan in self.plans if plan.rule.name == name), None)
        return STARTING if plan is None else rule_state(plan, self.trouble())

    async def settled(self) -> None:
        """Wait for a whole pass that starts from now on."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._wake.set()
        await future

    async def run(self) -> None:
        """Reconcile until cancelled, one pass at a time; triggers meanwhile make one more pass."""
        while True:
            await self._woken()
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            await self._reconcile()
            self.after_pass()
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _woken(self) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), BACK_OFF if self.failed else None)
        except TimeoutError:
            log.debug("trying again what failed")

    async def _reconcile(self) -> None:
        if replaced := self._links.take_replaced():
            log.info("links %s are others than before, under the same numbers", sorted(replaced))
            await self._release(what for what in self._have.copy() if getattr(what, "ifindex", 0) in replaced)
        plans = await self._plan()
        wanted: set[Resource] = set().union(*(plan.needs() for plan in plans))
        self.failed = {what: problem for what, problem in self.failed.items() if what in wanted}
        self.refused = {what: why for what, why in self.refused.items() if what in wanted}
        anew, self._anew = self._anew, set()
        await self._release(self._in_the_way(wanted) | (anew & self._have))
        await self._grant(set().union(*(plan.opens() for plan in plans)))
        await self._release(what for what in self._have - wanted if isinstance(what, JoinGroup))
        running = [(plan, put) for plan in plans if (put := in_force(plan, self._have))]
        await (
            self._follow_egresses()
        )  # before the rules, or flows with a new output would have to take the slow path
        await self._workers.put({put.rule: put for _, put in running})
        if self._fast is not None:
            rings = (what for what in self._have if isinstance(what, OpenIngress) and what.family)
            self._fast.set_ranges([put for _, put in running], {ring.ifindex for ring in rings})
        if replaced:  # the rules may be what they were: joins still wait until every worker has the new rings
            await self._workers.sync()
        await self._grant(set().union(*(plan.joins for plan, _ in running if plan.state == UP)))
        if surplus := self._have - wanted:
            await self._release(surplus)
            await self._follow_egresses()
        self._ids.keep({what.output for what in self._have | wanted if isinstance(what, OpenEgress)})
        self.plans, self.running = plans, [put for _, put in running]
        egresses = {output.egress for plan in plans for output in plan.outputs if output.state == UP}
        self._hops.follow({hop for egress in egresses if egress and (hop := self._hop(egress))})
        self._tell()

    async def _plan(self) -> list[RulePlan]:
        """A plan for each rule. The supervisor opens the sockets of one part while the next is planned."""
        rules, slots = self._book.rules, self._book.slots
        own = own_sources(rules, self._links)
        known = self._known if own == self._own else {}
        plans: list[RulePlan] = []
        # If links change meanwhile, `_known` is another: what is made here will not be used again.
        made = self._known = {}
        self._own = own
        async with asyncio.TaskGroup() as asking:
            for start in range(0, len(rules), PART):
                part = rules[start : start + PART]
                plans += plan_rules(part, slots, self._links, self._ids, self._settings, own, known)
                asking.create_task(self._grant(set().union(*(plan.sockets() for plan in plans[start:]))))
                made |= {plan.rule.name: plan for plan in plans[start:]}
                await asyncio.sleep(0)
        return plans

    async def _follow_egresses(self) -> None:
        if self._fast is not None:
            await self._fast.follow(what for what in self._have if isinstance(what, OpenEgress))

    def _in_the_way(self, wanted: AbstractSet[Resource]) -> set[Resource]:
        """Rings of an interface that comes under the fast path now, or does no more: both can't be there. XDP ends
        before the program at tc does.
        """
        rings = {what for what in self._have if isinstance(what, OpenIngress)}
        coming = {(what.ifindex, bool(what.family)) for what in wanted - rings if isinstance(what, OpenIngress)}
        xdp: set[Resource] = {what for what in self._have - wanted if isinstance(what, AttachXdp)}
        return xdp | {what for what in rings - wanted if (what.ifindex, not what.family) in coming}

    async def _grant(self, wanted: AbstractSet[Resource]) -> None:
        missing = wanted - self._have - self.refused.keys()
        if not missing:
            return
        failed = await self._supervisor.grant(sorted(missing, key=_rank))
        for what, error in failed.items():
            self._grant_failed(what, error)
        for what in missing:
            if what not in failed:
                self._have.add(what)
                self.failed.pop(what, None)

    def _grant_failed(self, what: Resource, error: RequestFailed) -> None:
        if isinstance(what, SetGro):
            level = logging.WARNING if self._settings.gro is True else logging.INFO
            log.log(
                level, "%s: no UDP GRO forwarding, slower but right: %s", self._links.name(what.ifindex), error
            )
            self.refused[what] = str(error)
        elif isinstance(what, AttachXdp):
            self._xdp_refused(what, str(error))
        elif isinstance(what, HoldUnicast) and error.errno == errno.EADDRINUSE:
            # A program of this host listens there: so no port-unreachable is sent anyway.
            self.refused[what] = str(error)
        else:
            self.failed[what] = str(error)

    def _xdp_refused(self, what: AttachXdp, why: str) -> None:
        """The rule is up all the same, by tc. Each problem is said once: any link's change has us try again."""
        self.refused[what] = why
        if self._no_xdp.get(what.ifindex) != why:
            log.warning("%s: no XDP, tc forwards: %s", self._links.name(what.ifindex), why)
        self._no_xdp[what.ifindex] = why

    def xdp_at(self, ifindex: int) -> str | None:
        """Why XDP is not at an interface where it was asked for; "" when it is, None when nobody asked."""
        what = AttachXdp(ifindex)
        return "" if what in self._have else self.refused.get(what)

    async def _release(self, surplus: Iterable[Resource]) -> None:
        going = sorted(surplus, key=_rank)
        self._have.difference_update(going)
        for what, error in (await self._supervisor.release(going)).items():
            log.error("cannot release %s: %s", what, error)

    def rules_up(self) -> tuple[int, int]:
        """How many rules are up, and how many there are."""
        states = [state for subject, state in self._states.items() if subject.is_rule]
        return states.count(UP), len(states)

    def _tell(self) -> None:
        """Log each state that is not what it was, once."""
        trouble = self.trouble()
        now = {subject: state for plan in self.plans for subject, state in _states(plan, trouble)}
        changed = {subject: state for subject, state in now.items() if state != self._states.get(subject)}
        log_many(log, logging.WARNING, "%s: %s", [each for each in changed.items() if each[1] != UP])
        log_many(log, logging.INFO, "%s: %s", [each for each in changed.items() if each[1] == UP])
        log_many(log, logging.INFO, "%s: removed", [(subject,) for subject in self._states if subject not in now])
        self._states = now
        self._events.add_many([_event(*each) for each in changed.items() if not each[0].warns])


class Subject(NamedTuple):
    """Of what a state is: of a rule, of one of its outputs; `warns`: of the input, and no more than a warning."""

    rule: str
    output: str = ""
    warns: str = ""

    @property
    def is_rule(self) -> bool:
        return not self.output and not self.warns

    def __str__(self) -> str:
        what = f": output {self.output}" if self.output else f": input {self.warns}" if self.warns else ""
        return f"rule '{self.rule}'{what}"


def _states(plan: RulePlan, trouble: Mapping[Resource, str]) -> Iterator[tuple[Subject, str]]:
    """What there is to say of a rule: its state, each of several outputs that isn't up, its warning."""
    rule = plan.rule.name
    yield Subject(rule), rule_state(plan, trouble)
    if len(plan.outputs) > 1:
        for output in plan.outputs:
            yield Subject(rule, output.text), output_state(output, trouble)
    if plan.warning:
        yield Subject(rule, warns=str(plan.rule.from_)), plan.warning


def _event(subject: Subject, state: str) -> Happened:
    if subject.output:
        return OutputState, {"rule": subject.rule, "output": subject.output, "state": state}
    if state == UP:
        return RuleUp, {"rule": subject.rule}
    return RuleWaiting, {"rule": subject.rule, "reason": state}


def _rank(what: Resource) -> int:
    """Sockets and GRO before the ring that brings the packets, memberships last."""
    return (OpenEgress, SetGro, OpenIngress, AttachXdp, HoldUnicast, JoinGroup).index(type(what))
