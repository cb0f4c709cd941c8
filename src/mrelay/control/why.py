"""`why`: gathers what is known of a rule, looks at its traffic for a moment, and has diagnose judge.

Owns how facts come together: the reconciler's record, counters before and after, netlink, /proc/net, taps, and
what segments have heard. Called by relay. Nothing blocks; a few rules are looked at at a time.
"""

import asyncio
import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any, Final, NamedTuple

import numpy as np
from pyroute2 import AsyncIPRoute

from mrelay.control.links import LinkTable
from mrelay.control.looking import Look
from mrelay.control.procnet import ProcNet
from mrelay.control.reconcile import Reconciler
from mrelay.control.rulebook import Rulebook
from mrelay.control.sampler import Sampler
from mrelay.control.segments import Segments
from mrelay.control.slots import Counts, Slot
from mrelay.control.stats import Stats
from mrelay.control.supervisor import Supervisor
from mrelay.control.want import STARTING, UP, RulePlan, output_state, own_sources
from mrelay.control.workers import Workers
from mrelay.counters import DROP_REASONS
from mrelay.diagnose import facts
from mrelay.diagnose.facts import Facts
from mrelay.diagnose.stages import Answer, judge
from mrelay.messages import JoinGroup
from mrelay.model.endpoint import Output
from mrelay.model.rule import Rule

Table = dict[str, Any]

AT_ONCE: Final = 3  # rules that are looked at
_DORMANT: Final = 10.0  # seconds without a datagram, after which groups may be joined anew
# include/uapi/linux/if.h
_IFF_UP, _IFF_LOWER_UP, _IFF_MULTICAST = 0x1, 0x10000, 0x1000


class _Counts(NamedTuple):
    """Counters at one moment. `outputs`: sent and errors of each; `workers`: state and restarts of each."""

    packets: int
    outputs: list[tuple[int, int]]
    drops: dict[str, int]
    workers: dict[int, tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom `Why` asks."""

    book: Rulebook
    reconciler: Reconciler
    workers: Workers
    links: LinkTable
    stats: Stats
    sampler: Sampler
    segments: Segments
    supervisor: Supervisor
    procnet: ProcNet


class Why:
    """Answers for one rule, and for all."""

    def __init__(self, sources: Sources) -> None:
        self._of = sources
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def rule(self, rule: Rule, seconds: float) -> Table:
        """/v1/rules/NAME/why"""
        async with self._turn:
            return _view(rule, *await self._judge(rule, seconds))

    async def all(self, seconds: float) -> Table:
        """/v1/why: a line for each rule. Those whose counters rise and whose outputs are well need no look."""
        before = await self._of.stats.stats()
        await asyncio.sleep(min(1.0, seconds))
        well = _well(before, await self._of.stats.stats())
        rest = [rule for rule in self._of.book.rules if rule.name not in well]
        looked = await asyncio.gather(*(self.rule(rule, seconds) for rule in rest))
        answers = {answer["rule"]: answer for answer in looked}
        lines = [answers.get(rule.name) or _quick(rule, well) for rule in self._of.book.rules]
        return {"rules": [{key: line[key] for key in ("rule", "verdict", "stage", "summary")} for line in lines]}

    # ---- one rule ----------------------------------------------------------------------------------

    async def _judge(self, rule: Rule, seconds: float) -> tuple[Answer, float]:
        of, wanted = self._of, rule.from_
        plan = next((plan for plan in of.reconciler.plans if plan.rule.name == rule.name), None)
        links = await _links()
        link = _link(wanted.interface, links)
        before, started = await self._counts(rule), time.monotonic()
        look = Look(of.supervisor, wanted, link.ifindex)
        if link.up:
            others = [
                (other.ifindex, name)
                for name, other in links.items()
                if other.up and name not in (wanted.interface, "lo") and not _same_bridge(other, link)
            ]
            joins = self._may_join_anew(rule, plan)
            await look.run(seconds, lambda: self._rising(rule, before), others, joins)
        after, took = await self._counts(rule), time.monotonic() - started
        found = await self._facts(rule, plan, links, look, (before, after, took))
        return judge(found), took

    async def _rising(self, rule: Rule, before: _Counts) -> bool:
        return (await self._counts(rule)).packets > before.packets

    def _may_join_anew(self, rule: Rule, plan: RulePlan | None) -> Any:
        """How to, when the rule has joined and taken nothing for a while."""
        last = self._last(rule)
        if plan is None or not plan.joins or (last is not None and last < _DORMANT):
            return None
        return lambda: self._of.reconciler.join_anew(plan.joins)

    async def _counts(self, rule: Rule) -> _Counts:
        workers, slots = self._of.workers, self._of.book.slots
        await workers.sync()
        mine = slots.rules.get(rule.name)
        links = [slots.links.get((rule.name, str(output))) for output in rule.to]
        drops = sum(worker.counters.drops for worker in workers.by_number.values())
        return _Counts(
            workers.read_rules([mine.index])[0][0] - mine.base[0] if mine else 0,
            [_sent(workers.read_links([slot.index])[0], slot) if slot else (0, 0) for slot in links],
            dict(zip(DROP_REASONS, np.asarray(drops).tolist(), strict=True)) if workers.by_number else {},
            {number: (worker.state_text(), worker.restarts) for number, worker in workers.by_number.items()},
        )

    async def _facts(
        self,
        rule: Rule,
        plan: RulePlan | None,
        links: Mapping[str, facts.Link],
        look: Look,
        counted: tuple[_Counts, _Counts, float],
    ) -> Facts:
        before, after, took = counted
        of, family = self._of, rule.from_.address.version
        link = _link(rule.from_.interface, links)
        segment = of.segments.by_ifindex.get(link.ifindex)
        own = own_sources((plan.rule for plan in of.reconciler.plans), of.links)[family]
        return Facts(
            rule=rule,
            others=tuple(other.from_ for other in of.book.rules if other.name != rule.name),
            seconds=took,
            state=of.reconciler.state_of(rule.name),
            link=link,
            deaf=of.reconciler.failed.get(plan.ingress, "") if plan and plan.ingress else "",
            joins=self._joins(plan),
            warning=plan.warning if plan else "",
            querier=segment.querier(family) if segment else None,
            listened=time.monotonic() - segment.since if segment else took,
            traffic=look.traffic,
            elsewhere=look.elsewhere,
            blind=look.blind,
            revived=look.revived,
            own=frozenset(own),
            workers=_workers(before, after),
            flows=await self._flows(rule),
            outputs=self._outputs(rule, plan, links, before, after),
            drops={reason: count - before.drops.get(reason, 0) for reason, count in after.drops.items()},
            counted=max(0, after.packets - before.packets),  # it may have been removed meanwhile
            total=after.packets,
            last=self._last(rule),
            since=self._since(rule),
        )

    def _joins(self, plan: RulePlan | None) -> tuple[facts.Join, ...]:
        joins = sorted(plan.joins, key=_join_order) if plan else []
        failed, procnet = self._of.reconciler.failed, self._of.procnet
        return tuple(
            facts.Join(
                join.group,
                join.source,
                failed.get(join, ""),
                None if join in failed else procnet.member(join.ifindex, join.group, join.source),
            )
            for join in joins
        )

    async def _flows(self, rule: Rule) -> tuple[facts.Flow, ...]:
        flows = (await self._of.stats.flows())["flows"]
        mine = sorted((flow for flow in flows if rule.name in flow["rules"]), key=lambda flow: -flow["pps"])
        names = ("source", "group", "port", "engine", "why", "packets")
        return tuple(facts.Flow(**{name: flow[name] for name in names}) for flow in mine)

    def _outputs(
        self,
        rule: Rule,
        plan: RulePlan | None,
        links: Mapping[str, facts.Link],
        before: _Counts,
        after: _Counts,
    ) -> tuple[facts.Output, ...]:
        trouble = self._of.reconciler.trouble()
        states = {output.text: output_state(output, trouble) for output in plan.outputs} if plan else {}
        return tuple(
            self._output(rule, output, states.get(str(output), STARTING), links, then, now)
            for output, then, now in zip(rule.to, before.outputs, after.outputs, strict=True)
        )

    def _output(
        self,
        rule: Rule,
        output: Output,
        state: str,
        links: Mapping[str, facts.Link],
        then: tuple[int, int],
        now: tuple[int, int],
    ) -> facts.Output:
        link = _link(output.interface, links)
        kept = rule.from_.address
        address = output.address or (kept.network_address if kept.num_addresses == 1 else None)
        segment = self._of.segments.by_ifindex.get(link.ifindex)
        multicast = address.is_multicast if address is not None else kept.is_multicast
        members = segment.members(address.version, int(address)) if segment and address and multicast else ()
        sent, errors = (max(0, after - before) for before, after in zip(then, now, strict=True))
        family = (address or kept).version
        return facts.Output(str(output), state, link, family, multicast, output.ttl, sent, errors, now[0], members)

    def _last(self, rule: Rule) -> float | None:
        slot = self._of.book.slots.rules.get(rule.name)
        return self._of.sampler.ago(slot.index)[0] if slot else None

    def _since(self, rule: Rule) -> float | None:
        slot = self._of.book.slots.rules.get(rule.name)
        return self._of.sampler.ago(slot.index)[1] if slot else None


def _workers(before: _Counts, after: _Counts) -> tuple[facts.Worker, ...]:
    """One that came up only while we looked is shown as it was before."""
    found = []
    for number, (state, restarts) in sorted(after.workers.items()):
        was, then = before.workers.get(number, (state, restarts))
        found.append(facts.Worker(number, was if was != facts.RUNNING else state, restarts - then))
    return tuple(found)


def _sent(now: Counts, slot: Slot) -> tuple[int, int]:
    return now[0] - slot.base[0], now[2] - slot.base[2]


def _join_order(join: JoinGroup) -> tuple[int, int]:
    address = ip_address(join.group)
    return address.version, int(address)


def _same_bridge(one: facts.Link, other: facts.Link) -> bool:
    """A bridge and its ports see the same frames."""
    return one.bridge is not None and other.bridge is not None and one.bridge.name == other.bridge.name


async def _links() -> dict[str, facts.Link]:
    """All interfaces as they are now, by name."""
    async with AsyncIPRoute() as netlink:
        found = [message async for message in await netlink.get_links()]
    bridges = {message["index"]: bridge for message in found if (bridge := _bridge(message))}
    return {
        message.get("ifname"): facts.Link(
            name=message.get("ifname"),
            ifindex=message["index"],
            up=bool(message["flags"] & _IFF_UP),
            carrier=bool(message["flags"] & _IFF_LOWER_UP),
            multicast=bool(message["flags"] & _IFF_MULTICAST),
            mtu=message.get("mtu") or 0,
            bridge=bridges.get(message["index"]) or bridges.get(message.get("master") or 0),
        )
        for message in found
    }


def _bridge(message: Any) -> facts.Bridge | None:
    info = message.get("linkinfo") or {}
    data = info.get("data") if info.get("kind") == "bridge" else None
    if data is None:
        return None
    snooping, querier = data.get("br_mcast_snooping"), data.get("br_mcast_querier")
    return facts.Bridge(message.get("ifname"), bool(snooping), bool(querier))


def _link(name: str, links: Mapping[str, facts.Link]) -> facts.Link:
    return links.get(name) or facts.Link(name, like=tuple(difflib.get_close_matches(name, links, 3)))


# ---- answers ---------------------------------------------------------------------------------------


def _view(rule: Rule, answer: Answer, seconds: float) -> Table:
    return {
        "rule": rule.name,
        "verdict": answer.verdict,
        "stage": answer.stage or None,
        "summary": answer.summary,
        "seconds": round(seconds, 2),
        "stages": [
            {"stage": name, **asdict(finding), "evidence": list(finding.evidence)}
            for name, finding in answer.findings.items()
        ],
    }


def _well(before: Table, after: Table) -> dict[str, int]:
    """The rules that took datagrams between two stats, and lost none of them at an output; how many."""
    old = {rule["name"]: rule for rule in before["rules"]}
    found: dict[str, int] = {}
    for rule in after["rules"]:
        then = old.get(rule["name"])
        if then is None or rule["packets"] <= then["packets"]:
            continue
        sent = [
            to["state"] == UP and to["errors"] == was["errors"] and to["packets"] > was["packets"]
            for to, was in zip(rule["outputs"], then["outputs"], strict=True)
        ]
        if all(sent):
            found[rule["name"]] = rule["packets"] - then["packets"]
    return found


def _quick(rule: Rule, well: Mapping[str, int]) -> Table:
    text = f"forwarding: {well[rule.name]:,} datagrams just now, by its counters"
    return {"rule": rule.name, "verdict": "forwarding", "stage": None, "summary": text}
