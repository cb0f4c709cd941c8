"""What the API can do: look at the rules, and change them.

Owns the order of a change: checked, saved, in force, answered; but a rule that is added is saved while it is put
in force. Called by api and by main (reload). Nothing blocks: large requests are parsed in a thread.
"""

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from mrelay import __version__, logs
from mrelay.control.events import EventLog
from mrelay.control.fastpath import EBPF, URING
from mrelay.control.history import History
from mrelay.control.metrics import Facts, exposition
from mrelay.control.observe import NoRule, Observe
from mrelay.control.proc import Usage, usage
from mrelay.control.reconcile import Reconciler
from mrelay.control.rulebook import Rulebook, difference, merge
from mrelay.control.stats import Stats
from mrelay.control.supervisor import Supervisor
from mrelay.control.want import STARTING, RulePlan, output_state, rule_state
from mrelay.control.why import Why
from mrelay.control.workers import Workers
from mrelay.messages import Resource
from mrelay.model.config import parse_rules
from mrelay.model.issue import ConfigError, Issue
from mrelay.model.rule import Rule

Table = dict[str, Any]


class Exists(Exception):
    """There is a rule of this name."""


class Host(NamedTuple):
    """What control saw before it was confined: when its supervisor started (CLOCK_BOOTTIME, seconds), its own and
    the supervisor's statm (proc.open_statm), and how it was: the Landlock ABI version in use, 0 for none."""

    supervisor_started: float
    statm: int | None
    supervisor_statm: int | None
    landlock: int


class Relay:
    """All that a client may ask for. `ready` is set by main."""

    def __init__(
        self,
        book: Rulebook,
        reconciler: Reconciler,
        workers: Workers,
        stats: Stats,
        host: Host,
        supervisor: Supervisor,
        events: EventLog,
        observe: Observe,
        history: History,
        why: Why,
        no_fast_path: str,
    ) -> None:
        """`no_fast_path`: why there is none; empty when there is."""
        self._no_fast_path, self.observe = no_fast_path, observe
        self._book, self._reconciler, self._workers = book, reconciler, workers
        self.stats, self._host, self._supervisor = stats, host, supervisor
        self.events, self.history = events, history
        self.ready = False
        self._scraping = asyncio.Lock()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME) - host.supervisor_started
        self._started = round(time.time() - since_boot, 2)
        self._why = why

    def health(self) -> Table:
        """/v1/health; `pid` and `uptime` are the supervisor's."""
        kinds = {worker.egress for worker in self._workers.by_number.values() if worker.egress}
        return {
            "ready": self.ready,
            "version": __version__,
            "pid": os.getppid(),
            "engine": URING if self._no_fast_path else EBPF,
            "no_fast_path": self._no_fast_path,
            "egress": "io_uring" if kinds == {"io_uring"} else "sendmmsg",
            "uptime": round(time.clock_gettime(time.CLOCK_BOOTTIME) - self._host.supervisor_started, 1),
            "landlock": self._host.landlock,
        }

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """/metrics: the text and its media type. One is made at a time, however many ask."""
        async with self._scraping:
            facts = Facts(
                health=self.health(),
                started=self._started,
                stats=await self.stats.stats(),
                workers=(await self.stats.workers())["workers"],
                interfaces=self.stats.interfaces(),
                processes=self._processes(),
                events=dict(self.events.counts),
                followers=self.events.followers,
                streams=self.observe.streams.view()["streams"],
            )
            return await asyncio.to_thread(exposition, facts, accept)

    def _processes(self) -> dict[str, Usage]:
        host = self._host
        own = {
            "supervisor": usage(os.getppid(), host.supervisor_statm),
            "control": usage(os.getpid(), host.statm),
        }
        return own | self.stats.processes()

    def stop(self, *, flush: bool) -> Table:
        """/v1/stop: the flows that the kernel goes on to forward."""
        self._supervisor.quit(keep=not flush)
        return {"flows": 0 if flush else self.stats.outliving()}

    def set_log_levels(self, table: Table) -> Table:
        """/v1/log: these roles' levels from now on; all of them."""
        wrong = [
            role for role, level in table.items() if role not in logs.ROLES or level not in tuple(logs.LEVELS)
        ]
        if wrong or not table:
            problem = "these are no log levels" if wrong else "no role is named"
            remedy = f"name {', '.join(logs.ROLES)}, and for each one of {', '.join(logs.LEVELS)}"
            raise ConfigError([Issue("", "", ", ".join(wrong), problem, remedy)])
        for role, level in table.items():
            logs.set_level(role, level, mine=role == "control")
            self._supervisor.log_level(role, level)
        return logs.levels()

    def rules(self) -> Table:
        """/v1/rules"""
        return {"rules": self._views(self._book.rules)}

    def _views(self, rules: Iterable[Rule]) -> list[Table]:
        plans = {plan.rule.name: plan for plan in self._reconciler.plans}
        trouble = self._reconciler.trouble()
        return [_rule_view(rule, plans.get(rule.name), trouble) for rule in rules]

    async def add(self, table: Table) -> Table:
        """Add a rule; as in /v1/rules. Raises ConfigError, Exists, OSError (not saved).

        Its stream does not wait for the disk, nor for what it takes to write there; the answer does.
        """
        (rule,) = parse_rules([table], "")
        async with self._book.lock:
            if any(rule.name == other.name for other in self._book.rules):
                raise Exists(rule.name)
            state = self._book.checked([*self._book.rules, rule])
            await self._book.extend(state, self._reconciler.settled)
        return self.rule(rule.name)

    async def change(self, name: str, table: Table) -> Table:
        """Replace a rule; as in /v1/rules. Raises ConfigError, NoRule, OSError (not saved)."""
        (rule,) = parse_rules([table], "")
        if rule.name != name:
            remedy = "add it as another rule, and remove this one"
            raise ConfigError([Issue("", name, "name", "a rule keeps its name", remedy)])
        async with self._book.lock:
            if all(name != other.name for other in self._book.rules):
                raise NoRule(name)
            rules = [rule if name == other.name else other for other in self._book.rules]
            await self._book.change(self._book.checked(rules))
        await self._reconciler.settled()
        return self.rule(name)

    def rule(self, name: str) -> Table:
        """One rule as in /v1/rules; raises NoRule."""
        for view in self._views(rule for rule in self._book.rules if rule.name == name):
            return view
        raise NoRule(name)

    async def why(self, name: str, seconds: float) -> Table:
        """/v1/rules/NAME/why; raises NoRule."""
        for rule in self._book.rules:
            if rule.name == name:
                return await self._why.rule(rule, seconds)
        raise NoRule(name)

    async def why_all(self, seconds: float) -> Table:
        """/v1/why"""
        return await self._why.all(seconds)

    async def remove(self, name: str) -> None:
        """Remove a rule. Raises NoRule, OSError (not saved)."""
        async with self._book.lock:
            left = [rule for rule in self._book.rules if rule.name != name]
            if len(left) == len(self._book.rules):
                raise NoRule(name)
            await self._book.change(self._book.checked(left))
        await self._reconciler.settled()

    async def apply(self, tables: Sequence[Table], *, dry_run: bool) -> Table:
        """Make the running rules these; the difference, by name. Raises ConfigError, OSError (not saved)."""
        rules = await asyncio.to_thread(parse_rules, list(tables), "")
        async with self._book.lock:
            result = difference(self._book.rules, rules)
            state = self._book.checked(rules)
            if not dry_run:
                await self._book.change(state)
        if not dry_run:
            await self._reconciler.settled()
        return {field.name: list(getattr(result, field.name)) for field in fields(result)}

    async def reload(self, file_rules: Sequence[Rule], file: str) -> None:
        """Take over what was edited in the config file. Raises ConfigError, OSError (not saved)."""
        async with self._book.lock:
            rules = merge(self._book.rules, self._book.file_rules, file_rules)
            await self._book.change(self._book.checked(rules, file_rules, file))
        await self._reconciler.settled()


def _rule_view(rule: Rule, plan: RulePlan | None, trouble: dict[Resource, str]) -> Table:
    known = plan is not None and plan.rule == rule
    states = [output_state(output, trouble) for output in plan.outputs] if plan and known else []
    return {
        **rule.to_table(),
        "link_local": rule.link_local,
        "allow_loop": rule.allow_loop,
        "rate": str(rule.rate) if rule.rate else None,
        "health": str(rule.health) if rule.health else None,
        "state": rule_state(plan, trouble) if plan and known else STARTING,
        "outputs": [
            {"to": str(output), "state": states[number] if states else STARTING}
            for number, output in enumerate(rule.to)
        ],
    }
