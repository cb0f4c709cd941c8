"""What the API says in numbers: stats, flows and workers; where they come from: docs/decisions/D32.

Owns nothing; reads the workers' counters after they brought them up to date. Called by api and metrics.
Long lists are made in a thread, from copies.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mrelay.control.fastpath import EBPF, URING, XDP, FastPath, States, engine_of
from mrelay.control.links import LinkTable
from mrelay.control.proc import Usage, usage
from mrelay.control.reconcile import Reconciler
from mrelay.control.rulebook import Rulebook
from mrelay.control.sampler import FlowTable, Sampler, flow_table
from mrelay.control.slots import Slot, Slots
from mrelay.control.streams import Streams
from mrelay.control.want import STARTING, RulePlan, output_state, rule_state
from mrelay.control.workers import Worker, Workers
from mrelay.counters import DROP_REASONS, RULE_DROPS, U64
from mrelay.counters_size import RULE_ROWS
from mrelay.messages import Resource
from mrelay.model.rule import Rule
from mrelay.model.ruleset import FlowKey, RuleSet, address_text

NOTHING: Final = (0,) * (2 + len(DROP_REASONS))
ROWS: Final = {"rules": RULE_ROWS, "links": 3}
SETTLE_TRIES = 20
SETTLE_PAUSE = 0.0005  # seconds

Table = dict[str, Any]
Counted = tuple[U64, U64, NDArray[np.float64]]  # by slot: of rules, of links, of rules each second


class Stats:
    """The views. Counts are of datagrams and of UDP payload bytes; bps is bits per second."""

    def __init__(
        self,
        workers: Workers,
        book: Rulebook,
        links: LinkTable,
        reconciler: Reconciler,
        sampler: Sampler,
        fast: FastPath | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._fast, self._streams = fast, streams
        self._workers, self._book, self._links = workers, book, links
        self._reconciler, self._sampler = reconciler, sampler

    async def stats(self) -> Table:
        """/v1/stats"""
        await self._workers.sync()
        totals = [await _totals(worker) for worker in self._workers.by_number.values()]
        received, matched, *drops = np.array([NOTHING, *totals], np.uint64).sum(axis=0).tolist()
        book, rates = self._book, self._sampler.rules()
        flows = sum(_flow_count(worker) for worker in self._workers.by_number.values())
        carried = await asyncio.to_thread(self.carried)
        return {
            "time": time.time(),
            "received": received,
            "matched": matched,
            "drops": dict(zip(DROP_REASONS, drops, strict=True)),
            "rules": await asyncio.to_thread(
                _rules,
                book.rules,
                book.slots,
                (self._sum("rules"), self._sum("links"), rates),
                self._reconciler.plans,
                self._reconciler.trouble(),
            ),
            "flows": flows,
            "engines": {**carried, URING: max(0, flows - sum(carried.values()))},
            "carried": sum(worker.counters.carried for worker in self._workers.by_number.values()),
            "passed": {} if self._fast is None else self._fast.passed(),
        }

    def _sum(self, table: Literal["rules", "links"]) -> U64:
        """A table of counters over all workers, up to the last slot that is somebody's."""
        slots: Mapping[Any, Slot] = getattr(self._book.slots, table)
        used = 1 + max((slot.index for slot in slots.values()), default=-1)
        tables = [getattr(worker.counters, table)[:, :used] for worker in self._workers.by_number.values()]
        return np.sum(tables, axis=0, dtype=np.uint64) if tables else np.zeros((ROWS[table], used), np.uint64)

    def interfaces(self) -> dict[str, tuple[bool, bool]]:
        """Those that rules name: whether each is up, and whether the fast path is at it."""
        return {name: self._interface(name) for name in sorted(self._book.interfaces())}

    def _interface(self, name: str) -> tuple[bool, bool]:
        link = self._links.by_name.get(name)
        if link is None:
            return False, False
        return link.up, self._fast is not None and self._fast.is_at(link.ifindex)

    def processes(self) -> dict[str, Usage]:
        """What each worker uses."""
        workers = sorted(self._workers.by_number.values(), key=lambda worker: worker.number)
        return {f"worker-{worker.number}": usage(worker.pid, worker.statm) for worker in workers}

    async def flows(self, limit: int | None = None) -> Table:
        """/v1/flows: all, or so many of the busiest."""
        await self._workers.sync()
        tables = {number: flow_table(worker) for number, worker in self._workers.by_number.items()}
        rates = {number: self._sampler.flows(number, table) for number, table in tables.items()}
        if limit is not None:
            tables, rates = _busiest(tables, rates, limit)
        return {"flows": await asyncio.to_thread(_flows, tables, rates, self.names(), self._fast, self._no_xdp())}

    def _no_xdp(self) -> dict[int, str]:
        """By interface where XDP was asked for: why it is not there, or nothing."""
        found = ((ifindex, self._reconciler.xdp_at(ifindex)) for ifindex in self._links.numbers())
        return {ifindex: why for ifindex, why in found if why is not None}

    def carried(self) -> dict[str, int]:
        """Flows that the fast path carries now, by engine."""
        return {XDP: 0, EBPF: 0} if self._fast is None else self._fast.carried()

    def at_ingress(self, ifindex: int) -> bool:
        """Whether the fast path takes an interface's frames first."""
        return self._fast is not None and self._fast.is_at(ifindex)

    def outliving(self) -> int:
        """Those that the kernel would go on with if the relay ended."""
        return sum(self.carried().values()) if self._fast is not None and self._fast.pinned else 0

    def names(self) -> "Names":
        """What turns numbers into words, as of now."""
        slots = self._book.slots
        rules = RuleSet()
        for rule in self._reconciler.running:
            rules.put(rule)
        return Names(
            rules,
            {slot.index: name for name, slot in slots.rules.items()},
            {slot.index: to for (_, to), slot in slots.links.items()},
            self._links.name,
            {} if self._streams is None else self._streams.words(),
        )

    async def workers(self) -> Table:
        """/v1/workers"""
        await self._workers.sync()
        workers = sorted(self._workers.by_number.values(), key=lambda worker: worker.number)
        return {"workers": [self._worker(worker) for worker in workers]}

    def _worker(self, worker: Worker) -> Table:
        return {
            "worker": worker.number,
            "core": worker.core,
            "pid": worker.pid,
            "state": worker.state_text(),
            "restarts": worker.restarts,
            "repairs": worker.repairs,
            "egress": worker.egress,
            "flows": _flow_count(worker),
            "received": worker.counters.received,
            "carried": worker.counters.carried,
            "cpu_percent": self._sampler.cpu_percent(worker.number),
        }


async def _totals(worker: Worker) -> list[int]:
    """Received, matched and the drops of one worker, which add up.

    The worker goes on counting while we read, so look again until they do; a sum that never does is shown
    as it is, for it is a bug worth seeing.
    """
    counters = worker.counters
    for _ in range(SETTLE_TRIES):
        drops = counters.drops.tolist()
        totals = [counters.received, counters.matched, *drops]
        if totals[0] == totals[1] + sum(drops):
            break
        await asyncio.sleep(SETTLE_PAUSE)
    return totals


def _flow_count(worker: Worker) -> int:
    """Flows that went somewhere; what no rule takes has a place in the table too, but no packets."""
    return int(np.count_nonzero((worker.counters.keys[4] != 0) & (worker.counters.flows[0] != 0)))


def _rules(
    rules: tuple[Rule, ...],
    slots: Slots,
    counted: Counted,
    plans: Sequence[RulePlan],
    trouble: Mapping[Resource, str],
) -> list[Table]:
    by_name = {plan.rule.name: plan for plan in plans}
    return [_rule(rule, slots, counted, RuleStates.of(by_name.get(rule.name), trouble)) for rule in rules]


class RuleStates(NamedTuple):
    """A rule's state, and each output's by its text."""

    rule: str
    outputs: Mapping[str, str]

    @classmethod
    def of(cls, plan: RulePlan | None, trouble: Mapping[Resource, str]) -> "RuleStates":
        """By the plan of the last pass, if it had the rule."""
        if plan is None:
            return cls(STARTING, {})
        outputs = {output.text: output_state(output, trouble) for output in plan.outputs}
        return cls(rule_state(plan, trouble), outputs)


def _rule(rule: Rule, slots: Slots, counted: Counted, states: RuleStates) -> Table:
    counts, links, rates = counted
    slot = slots.rules[rule.name]
    packets, octets, *drops = _above_base(counts, slot)
    pps, octets_ps = rates[:, slot.index].tolist()
    return {
        "name": rule.name,
        "state": states.rule,
        "packets": packets,
        "bytes": octets,
        "pps": round(pps, 1),
        "bps": round(octets_ps * 8, 1),
        "drops": {DROP_REASONS[reason]: n for reason, n in zip(RULE_DROPS, drops, strict=True) if n > 0},
        "outputs": [
            _output(to, links, slots.links[rule.name, to], states.outputs.get(to, STARTING))
            for to in map(str, rule.to)
        ],
    }


def _output(to: str, links: U64, slot: Slot, state: str) -> Table:
    packets, octets, errors = _above_base(links, slot)
    return {"to": to, "state": state, "packets": packets, "bytes": octets, "errors": errors}


def _above_base(counts: U64, slot: Slot) -> list[int]:
    return [now - base for now, base in zip(counts[:, slot.index].tolist(), slot.base, strict=True)]


def _busiest(
    tables: dict[int, FlowTable], rates: dict[int, NDArray[np.float64]], limit: int
) -> tuple[dict[int, FlowTable], dict[int, NDArray[np.float64]]]:
    """So many flows of all workers, by packets a second."""
    pps = np.concatenate([np.zeros(0), *(found[0] for found in rates.values())])
    if len(pps) <= limit:
        return tables, rates
    keep = np.zeros(len(pps), bool)
    keep[np.argpartition(pps, -limit)[-limit:]] = True
    ends = np.cumsum([len(table.slots) for table in tables.values()])[:-1]
    kept = dict(zip(tables, np.split(keep, ends), strict=True))
    return (
        {
            worker: FlowTable(
                table.slots[kept[worker]], table.keys[:, kept[worker]], table.counts[:, kept[worker]]
            )
            for worker, table in tables.items()
        },
        {worker: found[:, kept[worker]] for worker, found in rates.items()},
    )


@dataclass(frozen=True, slots=True)
class Names:
    """What turns a flow's numbers into words."""

    rules: RuleSet
    rule: dict[int, str]  # by slot
    output: dict[int, str]  # by link slot
    interface: Callable[[int], str]
    health: dict[FlowKey, str]

    def rules_of(self, flow: FlowKey) -> list[str]:
        """The names of the rules that take a flow."""
        return [self.rule[slot] for slot in self.rules.resolve(flow).rules if slot in self.rule]


def _flows(
    tables: dict[int, FlowTable],
    rates: dict[int, NDArray[np.float64]],
    names: Names,
    fast: FastPath | None,
    no_xdp: dict[int, str],
) -> list[Table]:
    states = None if fast is None else fast.states()
    flows = [
        _flow(worker, flow_key(key), numbers, names) | _engine(flow_key(key), names, states, fast, no_xdp)
        for worker, table in tables.items()
        for key, *numbers in zip(
            table.keys.T.tolist(), *table.counts.tolist(), *rates[worker].tolist(), strict=True
        )
    ]
    return sorted(flows, key=lambda flow: (flow["interface"], flow["group"], flow["port"], flow["source"]))


def _flow(worker: int, flow: FlowKey, numbers: list[float], names: Names) -> Table:
    packets, octets, pps, octets_ps = numbers
    route = names.rules.resolve(flow)
    links = [link for served in route.links for link in served]
    return {
        "interface": names.interface(flow.ifindex),
        "vlan": flow.vlan or None,
        "source": address_text(flow.family, flow.source),
        "group": address_text(flow.family, flow.group),
        "port": flow.port,
        "worker": worker,
        "packets": packets,
        "bytes": octets,
        "pps": round(pps, 1),
        "bps": round(octets_ps * 8, 1),
        "rules": [names.rule[slot] for slot in route.rules if slot in names.rule],
        "outputs": [names.output[link] for link in links if link in names.output],
        "health": names.health.get(flow),
    }


def _engine(
    key: FlowKey, names: Names, states: States | None, fast: FastPath | None, no_xdp: dict[int, str]
) -> Table:
    at_ingress = fast is not None and fast.is_at(key.ifindex)
    engine, why = engine_of(key, names.rules.resolve(key), states, no_xdp.get(key.ifindex), at_ingress)
    return {"engine": engine, "why": why}


def flow_key(words: list[int]) -> FlowKey:
    """The flow in the five words of counters.Counters.keys."""
    source_high, source_low, group_high, group_low, rest = words
    return FlowKey(
        ifindex=rest >> 40,
        vlan=rest >> 16 & 0xFFFF,
        family=rest >> 32 & 0xFF,
        source=source_high << 64 | source_low,
        group=group_high << 64 | group_low,
        port=rest & 0xFFFF,
    )
