"""Control's view of its workers: rules that drifted are repaired, a new worker has its rules at once."""

import asyncio
import dataclasses
import logging

import pytest

from fake_roles import FakeWorker, run, until
from mrelay.control import workers as module
from mrelay.control.workers import Workers
from mrelay.messages import PutRule, RuleOutput, Synced, WorkerDown
from mrelay.wire import BadMessage

OUTPUT = RuleOutput(0, 0, 2, "239.2.2.2", 6000, 0, -1, False)
RULES = {
    slot: PutRule(slot, 1, 0, 4, slot, slot, 5000, 5000, 0, 2**32 - 1, 0, 0, (), (OUTPUT,)) for slot in range(3)
}
DIFFERENT = dataclasses.replace(RULES[1], port_high=5001)


class Scene:
    """Workers whose rules are put again whenever someone needs them, a pass at a time, as the reconciler does."""

    def __init__(self, count: int = 1) -> None:
        self.bad: list[BadMessage] = []
        self.wanted = RULES
        self.lock = asyncio.Lock()
        self.workers = Workers(self._needed, self.bad.append)
        self.fakes = [FakeWorker(number, []) for number in range(count)]
        self.tasks: list[asyncio.Task[None]] = []
        for fake in self.fakes:
            self.workers.up(*fake.connect())

    def _needed(self) -> None:
        self.tasks.append(asyncio.create_task(self.one_pass()))

    async def one_pass(self) -> None:
        async with self.lock:
            await self.workers.put(self.wanted)

    async def put(self, wanted: dict[int, PutRule]) -> None:
        await asyncio.gather(*self.tasks)
        self.wanted = wanted
        await self.one_pass()


LIES = {
    "lost": lambda rules: rules.pop(1),
    "changed": lambda rules: rules.update({1: DIFFERENT}),
    "surplus": lambda rules: rules.update({9: dataclasses.replace(RULES[1], rule=9)}),
    "empty": lambda rules: rules.clear(),
}


@pytest.mark.parametrize("corrupt", LIES.values(), ids=LIES)
def test_rules_that_drifted_are_found_and_repaired(corrupt: object, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        it = Scene(2)
        await it.put(RULES)
        fake, other = it.fakes
        assert callable(corrupt)
        corrupt(fake.rules)
        before = len(other.events)
        await it.workers.sync()
        await until(lambda: fake.rules == RULES)
        await asyncio.gather(*it.tasks)
        await it.workers.sync()
        assert [worker.repairs for worker in it.workers.by_number.values()] == [1, 0]
        assert len(other.events) == before, "the others are left alone"

    run(work)
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "worker 0 has other rules than it was told: telling it all of them"
    ]


def test_a_worker_that_takes_a_rule_wrongly_is_told_again() -> None:
    async def work() -> None:
        it = Scene()
        (fake,) = it.fakes
        await it.put({0: RULES[0]})
        fake.incoming[7] = dataclasses.replace(RULES[1], rule=7)  # a stray one, that no Commit meant
        await it.put({0: RULES[0], 1: RULES[1]})
        await until(lambda: fake.rules == it.wanted)
        assert it.workers.by_number[0].repairs == 1

    run(work)


def test_repairs_of_one_that_cannot_be_repaired_are_few_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        it = Scene()
        (fake,) = it.fakes
        monkeypatch.setattr(fake, "digest", lambda: 1)
        await it.put(RULES)
        for _ in range(20):
            await it.workers.sync()
        assert it.workers.by_number[0].repairs == 1
        monkeypatch.setattr(module, "REPAIR_PAUSE", 0.0)
        await it.workers.sync()
        assert it.workers.by_number[0].repairs > 1

    run(work)
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_an_answer_from_before_the_last_change_is_no_drift() -> None:
    async def work() -> None:
        it = Scene()
        await it.put({0: RULES[0]})
        (fake,) = it.fakes
        late = Synced(999, fake.generation, fake.digest())
        await it.put(RULES)
        fake.channel.send(late)
        await it.workers.sync()  # whose answer comes behind it
        assert it.workers.by_number[0].repairs == 0

    run(work)


def test_a_new_worker_has_its_rules_though_another_does_not_answer() -> None:
    """The reconciler's pass waits for the silent one; the restarted one must not."""

    async def work() -> None:
        it = Scene(2)
        await it.put({0: RULES[0]})
        silent, dies = it.fakes
        silent.silent = True
        it.wanted = RULES
        passing = asyncio.create_task(it.one_pass())
        await until(lambda: dies.rules == RULES)
        it.workers.down(WorkerDown(1, 1, "signal SIGKILL", "", 0.0))
        it.workers.up(*dies.connect(restarts=1))
        await until(lambda: it.workers.by_number[1].state == "running")
        assert dies.rules == RULES
        assert not passing.done()
        for task in (passing, *it.tasks):
            task.cancel()

    run(work)


def test_repairs_are_counted_over_restarts() -> None:
    async def work() -> None:
        it = Scene()
        (fake,) = it.fakes
        await it.put(RULES)
        fake.rules.clear()
        await it.workers.sync()
        await until(lambda: fake.rules == RULES)
        it.workers.up(*fake.connect(restarts=1))
        assert it.workers.by_number[0].repairs == 1

    run(work)


def test_what_keeps_a_worker_down_is_shown_until_it_is_up() -> None:
    async def work() -> None:
        it = Scene()
        (fake,) = it.fakes
        await it.put(RULES)
        worker = it.workers.by_number[0]
        assert worker.state_text() == "running"
        it.workers.down(WorkerDown(0, 6, "exit status 1", "crash loop (exit status 1)", 30.0))
        assert worker.state_text() == "crash loop (exit status 1): next try in 30 s"
        it.workers.up(*fake.connect(restarts=6))
        worker = it.workers.by_number[0]
        assert worker.state_text() == "restarting"
        await until(lambda: worker.state_text() == "running")

    run(work)
