"""What a route and a neighbour say of a next hop; and looking at real ones, which needs no privilege."""

import asyncio

import pytest
from pyroute2 import AsyncIPRoute

from fake_roles import run
from mrelay.control.routes import NUD_FAILED, NUD_INCOMPLETE, RTM_F_FIB_MATCH, Hop, Neighbour, NextHops, judge

NUD_REACHABLE = 0x02  # include/uapi/linux/neighbour.h
HOP = Hop(3, "10.0.0.9", noarp=False)
DIRECT = {"attrs": [("RTA_DST", "10.0.0.9"), ("RTA_OIF", 3)]}
VIA = {"attrs": [("RTA_DST", "10.0.0.9"), ("RTA_GATEWAY", "10.0.0.1")]}


@pytest.mark.parametrize(
    ("route", "neighbours", "before", "problem"),
    [
        (DIRECT, {}, False, ""),
        (DIRECT, {(3, "10.0.0.9"): NUD_REACHABLE}, True, ""),
        (DIRECT, {(3, "10.0.0.9"): NUD_FAILED}, False, "no neighbour: 10.0.0.9 does not answer"),
        (DIRECT, {(4, "10.0.0.9"): NUD_FAILED}, False, ""),
        (DIRECT, {(3, "10.0.0.9"): NUD_INCOMPLETE}, False, ""),
        (DIRECT, {(3, "10.0.0.9"): NUD_INCOMPLETE}, True, "no neighbour: 10.0.0.9 does not answer"),
        (None, {}, False, "no route to 10.0.0.9 through this interface"),
        (None, {(3, "10.0.0.9"): NUD_FAILED}, False, "no route to 10.0.0.9 through this interface"),
        (None, {(3, "10.0.0.9"): NUD_REACHABLE}, True, ""),
        (
            VIA,
            {(3, "10.0.0.1"): NUD_FAILED, (3, "10.0.0.9"): NUD_REACHABLE},
            False,
            "no neighbour: 10.0.0.1, the gateway to 10.0.0.9, does not answer",
        ),
    ],
)
def test_judge(
    route: dict[str, object] | None, neighbours: dict[tuple[int, str], int], before: bool, problem: str
) -> None:
    assert judge(HOP, route, {who: Neighbour(state, b"") for who, state in neighbours.items()}, before) == problem


def test_a_tunnel_has_no_neighbours_and_needs_no_route() -> None:
    assert judge(HOP._replace(noarp=True), None, {(3, "10.0.0.9"): Neighbour(NUD_FAILED, b"")}, True) == ""


def test_the_kernel_is_asked_again_when_other_hops_are_followed() -> None:
    async def work() -> None:
        changed = asyncio.Event()
        hops = NextHops(changed.set)
        task = asyncio.create_task(hops.run())
        nowhere = Hop(1, "203.0.113.9", noarp=False)  # out of the loopback interface
        hops.follow({Hop(1, "127.0.0.1", noarp=False), nowhere})
        await asyncio.wait_for(changed.wait(), 10)
        assert hops.problems.keys() == {nowhere}
        assert hops.problems[nowhere].startswith("no route to 203.0.113.9")
        changed.clear()
        hops.follow({Hop(1, "127.0.0.1", noarp=False)})
        assert hops.problems == {}
        hops.follow({nowhere})
        await asyncio.wait_for(changed.wait(), 10)
        assert hops.problems.keys() == {nowhere}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(work)


def test_an_answer_of_the_kernel_has_what_judge_reads() -> None:
    async def work() -> None:
        async with AsyncIPRoute(groups=0) as netlink:
            (route,) = await netlink.route("get", dst="127.0.0.1", oif=1, flags=RTM_F_FIB_MATCH)
        assert "RTA_DST" in dict(route["attrs"])

    run(work)
