"""The running rules, and how they change: every change is checked, saved, then in force.

A rule that is added is in force first. Owns the State in memory. Called by main (start, reload) and
relay (the API); read by reconcile and stats. Nothing blocks: the file is written in a thread.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from mrelay.control.events import EventLog, RuleAdded, RuleChanged, RuleRemoved
from mrelay.control.slots import NoSlots, ReadSlots, Slots
from mrelay.control.state import State, StateFile
from mrelay.model.config import RelaySettings
from mrelay.model.issue import ConfigError, Issue
from mrelay.model.rule import Rule, check_rules


def merge(running: Sequence[Rule], old: Sequence[Rule], new: Sequence[Rule]) -> tuple[Rule, ...]:
    """The running rules after the config file's rules went from `old` to `new`.

    What the file says wins for the rules that were edited in it; everything else stays as it runs.
    """
    was = {rule.name: rule for rule in old}
    says = {rule.name: rule for rule in new}
    merged = {rule.name: rule for rule in running if rule.name not in was or rule.name in says}
    merged |= {name: rule for name, rule in says.items() if was.get(name) != rule}
    return tuple(merged.values())


@dataclass(frozen=True, slots=True)
class Difference:
    """Names of rules, from one list of rules to another."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]


def difference(before: Sequence[Rule], after: Sequence[Rule]) -> Difference:
    """What it takes to come from `before` to `after`."""
    old = {rule.name: rule for rule in before}
    new = {rule.name: rule for rule in after}
    changed = {name for name, rule in new.items() if name in old and rule is not old[name] and rule != old[name]}
    return Difference(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name in new if name in changed),
        unchanged=tuple(name for name in new if name in old and name not in changed),
    )


class Rulebook:
    """The rules in force and their counter slots. `lock` is held by whoever changes them."""

    def __init__(
        self, state: State, file: StateFile, read_rules: ReadSlots, read_links: ReadSlots, events: EventLog
    ) -> None:
        self._state, self._file, self._events = state, file, events
        self._read_rules, self._read_links = read_rules, read_links
        self.lock = asyncio.Lock()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The running rules."""
        return self._state.rules

    @property
    def file_rules(self) -> tuple[Rule, ...]:
        """Those of the config file when it was last read."""
        return self._state.file_rules

    @property
    def relay(self) -> RelaySettings:
        """The settings that this relay was started with."""
        return self._state.relay

    @property
    def slots(self) -> Slots:
        """Where the running rules count."""
        return self._state.slots

    def interfaces(self) -> set[str]:
        """Those that the running rules name."""
        return {end.interface for rule in self.rules for end in (rule.from_, *rule.to)}

    def checked(self, rules: Iterable[Rule], file_rules: Iterable[Rule] | None = None, file: str = "") -> State:
        """The state with these rules running; ConfigError when they can't run together.

        A rule that is as before is the very object: what was made of it is still good.
        """
        before = {rule.name: rule for rule in self.rules}
        rules = tuple(was if (was := before.get(rule.name)) == rule else rule for rule in rules)
        if issues := check_rules(rules, file):
            raise ConfigError(issues)
        try:
            slots = self._state.slots.updated(rules, self._read_rules, self._read_links)
        except NoSlots as error:
            issue = Issue(file, "", "rule", str(error), "remove some rules or outputs")
            raise ConfigError([issue]) from error
        files = self._state.file_rules if file_rules is None else tuple(file_rules)
        return State(rules, files, slots, self._state.relay)

    async def change(self, state: State) -> None:
        """Save and adopt what `checked` gave; OSError when it can't be saved, then nothing is changed."""
        await asyncio.to_thread(self._file.save, state)
        self.adopt(state)

    async def extend(self, state: State, in_force: Callable[[], Awaitable[None]]) -> None:
        """Adopt what `checked` gave; when it is `in_force`, save it. OSError if that fails: then it is as before.

        For a state that has all of the rules that run: taking back what it adds harms none of them.
        """
        before = self._state
        self.adopt(state)
        await in_force()
        try:
            await asyncio.to_thread(self._file.save, state)
        except OSError:
            self.adopt(before)
            await in_force()
            raise

    def adopt(self, state: State) -> None:
        """Let it be in force, saved or not."""
        changes = difference(self._state.rules, state.rules)
        self._state = state
        self._events.add_many([(RuleAdded, {"rule": name}) for name in changes.added])
        self._events.add_many([(RuleRemoved, {"rule": name}) for name in changes.removed])
        self._events.add_many([(RuleChanged, {"rule": name}) for name in changes.changed])
