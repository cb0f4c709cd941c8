"""Want minus have, against a fake supervisor and fake workers on real channels: what, and in which order."""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fake_roles import Roles, Said, run, until
from mrelay.control import reconcile, workers
from mrelay.control.events import EventLog
from mrelay.control.links import Link, LinkTable
from mrelay.control.reconcile import Reconciler
from mrelay.control.routes import Hop, NextHops
from mrelay.control.rulebook import Rulebook
from mrelay.control.state import State, StateFile
from mrelay.control.stats import RuleStates
from mrelay.control.want import UP, RulePlan, Settings, plan_rules, rule_state
from mrelay.messages import (
    AttachXdp,
    Committed,
    HoldUnicast,
    JoinGroup,
    OpenEgress,
    OpenIngress,
    Resource,
    SetGro,
    WorkerDown,
)
from mrelay.model.rule import Rule

ETH0 = Link("eth0", 2, True, frozenset({"10.0.0.1"}))
ETH1 = Link("eth1", 3, True, frozenset({"10.0.1.1"}))
A = "eth0:239.1.1.1:5000"
JOIN = JoinGroup(2, "239.1.1.1", None)
RING = OpenIngress(2, 1024)
GRO = SetGro(2)
GRO_AUTO = Settings("auto", 1024)
EGRESS = OpenEgress(0, 3, 4, "239.2.2.2", 6000, "egress", 0)


def rule(name: str = "a", origin: str = A, *outputs: str) -> Rule:
    return Rule.model_validate({"name": name, "from": origin, "to": outputs or ["eth1:239.2.2.2:6000"]})


class Scene(Roles):
    """A running Reconciler between the fakes. Links and rules are set by hand."""

    def __init__(self, workers: int = 1, held: Iterable[Resource] = (), settings: Settings = GRO_AUTO) -> None:
        super().__init__(workers)
        self.links = LinkTable(what for what in held if isinstance(what, OpenEgress))
        self.links.update([ETH0, ETH1])
        file = Mock(spec=StateFile)
        events = EventLog()
        self.book = Rulebook(State(), file, self.workers.read_rules, self.workers.read_links, events)
        self.hops = NextHops(Mock())
        self.reconciler = Reconciler(
            self.supervisor,
            self.workers,
            self.links,
            self.book,
            self.hops,
            settings=settings,
            events=events,
            held=held,
        )

    async def rules(self, *rules: Rule) -> list[Said]:
        """Let these run; what was said on the way there."""
        self.book.adopt(self.book.checked(rules))
        return await self.settle()

    async def see(self, *links: Link) -> list[Said]:
        """Let these be the links; what was said on the way there."""
        if self.links.update(links):
            self.reconciler.links_changed()
        return await self.settle()

    async def settle(self) -> list[Said]:
        self.fake.events.clear()
        await self.reconciler.settled()
        return list(self.fake.events)

    def state(self, number: int = 0) -> str:
        return rule_state(self.reconciler.plans[number], self.reconciler.trouble())


@asynccontextmanager
async def scene(
    workers: int = 1, held: Iterable[Resource] = (), settings: Settings = GRO_AUTO
) -> AsyncIterator[Scene]:
    it = Scene(workers, held, settings)
    task = asyncio.create_task(it.reconciler.run())
    yield it
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_rule_comes_up_sockets_first_membership_last() -> None:
    async def work() -> None:
        async with scene() as it:
            assert await it.rules(rule()) == [
                ("grant", EGRESS),
                ("grant", GRO),
                ("grant", RING),
                ("commit", (0,)),
                ("grant", JOIN),
            ]
            assert it.state() == UP

    run(work)


def test_a_rule_goes_membership_first_sockets_last() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            assert await it.rules() == [
                ("release", JOIN),
                ("commit", ()),
                ("release", EGRESS),
                ("release", GRO),
                ("release", RING),
            ]
            assert it.fake.held == set()

    run(work)


def test_a_new_output_s_addresses_are_own_to_all_rules() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            assert [put.own for put in it.reconciler.running] == [(int(IPv4Address("10.0.1.1")),)]
            await it.rules(rule(), rule("b", A, "eth0:239.3.3.3:6000"))
            both = tuple(int(IPv4Address(address)) for address in ("10.0.0.1", "10.0.1.1"))
            assert [put.own for put in it.reconciler.running] == [both, both]

    run(work)


def test_what_was_made_of_a_rule_is_kept_while_the_rule_is() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            (before,) = it.reconciler.running
            await it.rules(rule(), rule("b", A, "eth1:239.3.3.3:6000"))
            assert it.reconciler.running[0] is before

    run(work)


def test_plans_are_made_anew_when_a_link_changes_while_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "PART", 1)

    async def work() -> None:
        async with scene() as it:
            await it.settle()

            def change() -> None:
                it.links.update([ETH0, replace(ETH1, up=False)])
                it.reconciler.links_changed()

            def plan_first(rules: Sequence[Rule], *facts: Any) -> list[RulePlan]:
                if rules[0].name == "a" and it.links.by_name["eth1"].up:
                    asyncio.get_running_loop().call_soon(change)
                return plan_rules(rules, *facts)

            monkeypatch.setattr(reconcile, "plan_rules", plan_first)
            await it.rules(rule(), rule("b", A, "eth1:239.3.3.3:6000"))
            await it.settle()
            assert [it.state(0), it.state(1)] == ["waiting: eth1 is down"] * 2

    run(work)


def test_a_second_pass_says_nothing() -> None:
    async def work() -> None:
        async with scene(workers=2) as it:
            await it.rules(rule(), rule("b"))
            assert await it.settle() == []

    run(work)


def test_a_changed_output_leaves_the_input_alone() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            new = OpenEgress(1, 3, 4, "239.2.2.9", 6000, "egress", 0)
            said = await it.rules(rule("a", A, "eth1:239.2.2.9:6000"))
            assert said == [("grant", new), ("commit", (0,)), ("release", EGRESS)]

    run(work)


def test_a_failed_output_stops_no_other() -> None:
    async def work() -> None:
        async with scene() as it:
            it.fake.refuse(EGRESS, "no buffer space")
            await it.rules(rule("a", A, "eth1:239.2.2.2:6000", "eth1:239.2.2.3:6000"), rule("b", A, "eth1:*:*"))
            assert [it.state(0), it.state(1)] == ["error: no buffer space", UP]
            (worker,) = it.fake.workers
            assert [len(put.outputs) for put in worker.rules.values()] == [1, 1]

    run(work)


def test_an_output_without_a_route_says_so_and_stays_open() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule("a", A, "eth1:10.9.9.9:6000", "eth1:239.2.2.2:6000"))
            assert it.hops._hops == {Hop(3, "10.9.9.9", noarp=False)}, "groups need no next hop"
            it.hops.problems = {Hop(3, "10.9.9.9", noarp=False): "no route to 10.9.9.9"}
            it.reconciler.hops_changed()
            assert it.state() == "no route to 10.9.9.9"
            (plan,) = it.reconciler.plans
            states = RuleStates.of(plan, it.reconciler.trouble())
            assert states.outputs == {"eth1:10.9.9.9:6000": "no route to 10.9.9.9", "eth1:239.2.2.2:6000": "up"}
            assert len(it.reconciler.running[0].outputs) == 2
            it.hops.problems = {}
            assert it.state() == "up"

    run(work)


def test_a_failed_membership_shows_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "BACK_OFF", 0.01)

    async def work() -> None:
        async with scene() as it:
            it.fake.refuse(JOIN, "too many memberships")
            await it.rules(rule())
            assert it.state() == "error: too many memberships"
            del it.fake.refuses[JOIN]
            await until(lambda: JOIN in it.fake.held)
            await until(lambda: it.state() == UP)

    run(work)


def test_a_failure_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(reconcile, "BACK_OFF", 0.01)

    async def work() -> None:
        async with scene() as it:
            it.fake.refuse(RING, "no memory")
            await it.rules(rule())
            await until(lambda: it.fake.said("refuse").count(RING) > 3)
            assert it.fake.workers[0].rules == {}

    run(work)
    assert [record.message for record in caplog.records] == ["rule 'a': error: no memory"]


def test_gro_that_is_refused_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work() -> None:
        async with scene() as it:
            it.fake.refuse(GRO, "kernel multicast routing is active")
            await it.rules(rule())
            assert it.state() == UP
            assert await it.settle() == []  # not asked for again until a link changes
            said = await it.see(ETH0, ETH1, Link("eth2", 4, True))
            assert said == [("refuse", GRO)]

    run(work)
    assert "eth0: no UDP GRO forwarding" in caplog.text


def test_a_port_that_another_program_holds_is_no_error() -> None:
    async def work() -> None:
        async with scene() as it:
            hold = HoldUnicast("10.0.0.1", 5000)
            it.fake.refuse(hold, "in use", errno.EADDRINUSE)
            await it.rules(rule("a", "eth0:10.0.0.1:5000"))
            assert it.state() == UP
            it.fake.refuse(HoldUnicast("10.0.0.1", 5001), "not here", errno.EADDRNOTAVAIL)
            await it.rules(rule("a", "eth0:10.0.0.1:5001"))
            assert it.state() == "error: not here"

    run(work)


def test_a_rule_waits_for_its_interface() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.see(ETH1)
            await it.rules(rule())
            assert it.state() == "waiting: no interface eth0"
            said = await it.see(ETH0, ETH1)
            assert said[-2:] == [("commit", (0,)), ("grant", JOIN)]
            assert it.state() == UP
            said = await it.see(ETH1)
            assert said == [("release", JOIN), ("commit", ()), ("release", GRO), ("release", RING)]

    run(work)


def test_a_flap_opens_and_closes_nothing() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            down = Link("eth1", 3, False)
            assert await it.see(ETH0, down) == [("commit", (0,))]
            assert it.state() == "waiting: eth1 is down"
            assert it.fake.workers[0].rules[0].outputs == ()
            assert await it.see(ETH0, ETH1) == [("commit", (0,))]
            assert it.state() == UP

    run(work)


def test_a_new_address_makes_a_new_socket_before_the_old_one_goes() -> None:
    async def work() -> None:
        async with scene() as it:
            await it.rules(rule())
            said = await it.see(ETH0, Link("eth1", 3, True, frozenset({"10.0.1.2"})))
            new = OpenEgress(1, 3, 4, "239.2.2.2", 6000, "egress", 1)
            assert said == [("grant", new), ("commit", (0,)), ("release", EGRESS)]

    run(work)


def test_a_restarted_control_disturbs_nothing() -> None:
    async def work() -> None:
        async with scene(held=[EGRESS, GRO, RING, JOIN, JoinGroup(2, "239.9.9.9", None)]) as it:
            said = await it.rules(rule())
            assert said == [("release", JoinGroup(2, "239.9.9.9", None)), ("commit", (0,))]

    run(work)


def test_a_restarted_worker_gets_all_rules() -> None:
    async def work() -> None:
        async with scene(workers=2) as it:
            await it.rules(rule(), rule("b"))
            worker = it.fake.workers[1]
            worker.count(5)
            it.workers.down(WorkerDown(1, 1, "signal SIGKILL", "", 0.0))
            assert it.workers.by_number[1].state == "restarting"
            it.workers.up(*worker.connect(restarts=1))
            assert await it.settle() == [("commit", (0, 1))]
            assert sorted(worker.rules) == [0, 1]
            again = it.workers.by_number[1]
            await until(lambda: again.state == "running")
            assert (again.restarts, again.counters.received) == (1, 5)

    run(work)


def test_a_worker_that_dies_before_it_answers_holds_nobody_up() -> None:
    async def work() -> None:
        async with scene(workers=2) as it:
            it.fake.workers[1].silent = True
            change = asyncio.create_task(it.rules(rule()))
            await until(lambda: len(it.fake.said("commit")) == 2)
            assert JOIN not in it.fake.held
            it.fake.workers[1].channel.close()
            await change
            assert JOIN in it.fake.held

    run(work)


def test_a_stuck_worker_delays_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(workers, "COMMIT_DEADLINE", 0.01)

    async def work() -> None:
        async with scene(workers=2) as it:
            it.fake.workers[1].silent = True
            await it.rules(rule())
            assert JOIN in it.fake.held

    run(work)
    assert "worker 1 did not take generation" in caplog.text


@pytest.mark.parametrize(
    "message", [WorkerDown(0, 1, "not for a worker to say", "", 0.0), Committed(1, "\ud800", 0)]
)
def test_a_worker_that_says_nonsense_is_reported(message: WorkerDown | Committed) -> None:
    async def work() -> None:
        async with scene() as it:
            it.fake.workers[0].channel.send(message)
            await until(lambda: bool(it.bad))

    run(work)


def test_more_rules_than_a_channel_holds_at_once() -> None:
    async def work() -> None:
        async with scene(workers=2) as it:
            many = [rule(f"r{n}", f"eth0:239.1.{n // 250}.{n % 250}:5000", "eth1:*:*") for n in range(2000)]
            await it.rules(*many)
            assert all(len(worker.rules) == 2000 for worker in it.fake.workers)
            assert all(plan.state == UP for plan in it.reconciler.plans)

    run(work)


def test_rules_are_saved_before_they_run(tmp_path: Path) -> None:
    async def work() -> None:
        async with scene() as it:
            it.book._file.save.side_effect = OSError(errno.ENOSPC, "full")  # type: ignore[attr-defined]
            with pytest.raises(OSError, match="full"):
                await it.book.change(it.book.checked([rule()]))
            assert it.book.rules == ()

    run(work)


def test_xdp_is_done_without_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Refused, said once, the rule is up; a link that changes is a reason to try; its end comes before tc's."""
    xdp, ring = AttachXdp(2), OpenIngress(2, 1024, family=4)
    ether = replace(ETH0, kind=1)

    async def work() -> None:
        async with scene(settings=Settings("auto", 1024, fast=True, xdp=True)) as it:
            await it.see(ether, ETH1)
            it.fake.refuse(xdp, "another XDP program is there")
            await it.rules(rule())
            assert (it.state(), it.reconciler.xdp_at(2)) == (UP, "another XDP program is there")
            await it.see(ether, ETH1, Link("eth7", 7, True))
            assert len([r for r in caplog.records if "no XDP" in r.message]) == 1
            del it.fake.refuses[xdp]
            assert await it.see(ether, ETH1) == [("grant", xdp)]
            assert (it.reconciler.xdp_at(2), it.reconciler.xdp_at(3)) == ("", None)
            said = await it.rules()
            assert said.index(("release", xdp)) < said.index(("release", ring))

    run(work)
