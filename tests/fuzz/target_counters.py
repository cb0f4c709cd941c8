"""The counters' memory of a hostile worker: control's answers stay answers, and a successor starts on it.

Control reads it for stats, flows, workers and metrics; the next worker takes over the flows that stand in it.
"""

import asyncio
import json
import os
from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np

from fuzz.data import Data
from mrelay.control import stats, views
from mrelay.control.events import EventLog
from mrelay.control.links import LinkTable
from mrelay.control.metrics import Facts, exposition
from mrelay.control.notice import Noticer
from mrelay.control.reconcile import Reconciler
from mrelay.control.rulebook import Rulebook
from mrelay.control.sampler import Sampler, take
from mrelay.control.slots import Slots
from mrelay.control.workers import Worker, Workers
from mrelay.counters import Counters
from mrelay.model.rule import Rule
from mrelay.model.ruleset import RuleSet
from mrelay.supervisor.children import new_counters
from mrelay.worker.egress import Egress
from mrelay.worker.flows import FlowTable
from worker_rig import rule

FLOWS = 8
RULE = Rule.model_validate({"name": "a", "from": "lo:239.1.1.1:5000", "to": ["lo:239.2.2.2:6000"]})
SLOTS = Slots().updated(
    [RULE], lambda slots: [(1, 2, 3, 0, 0, 0, 9, 0)] * len(slots), lambda slots: [(3, 4, 5)] * len(slots)
)
VALUES = [0, 1, 1 << 31, (1 << 53) + 1, 1 << 63, (1 << 64) - 1]
FAMILIES = [0, 4, 6, 255]
LOOP = asyncio.new_event_loop()


def check(data: bytes) -> None:
    choices = Data(data)
    fd = new_counters(FLOWS)
    try:
        counters = Counters(fd, FLOWS, write=True)
        workers = Workers(lambda: None, lambda _: None)
        for number in range(2):
            workers.by_number[number] = Worker(number, number, None, 0, Counters(fd, FLOWS), None)
        sampler, noticer = Sampler(workers), Noticer(EventLog(), str, None)
        for _ in range(2):
            _scribble(counters, choices)
            sampler._old, sampler._new = sampler._new, take(workers)
            LOOP.run_until_complete(noticer.sampled(sampler._new))
        with mock.patch.object(stats, "SETTLE_PAUSE", 0.0):
            LOOP.run_until_complete(_read(workers, sampler))
        _take_over(counters)
    finally:
        os.close(fd)


def _scribble(counters: Counters, choices: Data) -> None:
    for column in (counters.totals, counters.drops, *counters.flows, *counters.folded, *counters.keys[:4]):
        if choices.integer(1) & 1:
            for at in range(min(len(column), FLOWS)):
                column[at] = choices.pick([*VALUES, choices.integer(8)])
    for table in (counters.rules, counters.links):
        table[:, 0] = [choices.pick(VALUES) for _ in range(len(table))]
    for at in range(FLOWS):
        last = choices.pick([0, 0xFFFF, 5000 | 7 << 40]) | choices.pick(FAMILIES) << 32
        counters.keys[4, at] = choices.pick([last, last, choices.integer(8)])


async def _read(workers: Workers, sampler: Sampler) -> None:
    """Everything that control says of the numbers, as the API would send it."""
    book = SimpleNamespace(rules=(RULE,), slots=SLOTS)
    reconciler = SimpleNamespace(running=[rule(0, "239.1.1.1/32", [0])], plans=[], trouble=dict)
    made = stats.Stats(workers, cast(Rulebook, book), LinkTable(), cast(Reconciler, reconciler), sampler)
    numbers, flows, states = await made.stats(), await made.flows(), await made.workers()
    for model, answer in ((views.Stats, numbers), (views.Flows, flows), (views.Workers, states)):
        text = json.dumps(answer, allow_nan=False)
        model.model_validate_json(text)
    health = {"version": "1", "engine": "uring", "egress": "sendmmsg"}
    facts = Facts(health, 0.0, numbers, states["workers"], {}, made.processes(), {}, 0, [])
    for accept in ("", "application/openmetrics-text"):
        assert exposition(facts, accept)[0]


def _take_over(counters: Counters) -> None:
    """As a worker that starts after one that went mad; then every flow goes."""
    rules = RuleSet()
    rules.put(rule(0, "239.1.1.1/32", []))
    table = FlowTable(counters, FLOWS, rules, Egress(), lambda: None)
    table.inherit()
    table.restore(FLOWS)
    assert not table.kept
    assert len(table.index) == sum(flow is not None for flow in table.flows)
    for slot in range(FLOWS):
        table.remove(slot)
    assert not np.any(counters.keys[4])
    assert sorted(table._free) == list(range(FLOWS))
