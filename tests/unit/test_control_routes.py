"""What a route and a neighbour say of a next hop; and looking at real ones, which needs no privilege."""

import asyncio
import socket

import pytest

from fake_roles import run
from mrelay.control.routes import NUD_FAILED, NUD_INCOMPLETE, Hop, NextHops, judge
from mrelay.kernel.rtnetlink import Neighbour, Route, get_route

NUD_REACHABLE = 0x02  # include/uapi/linux/neighbour.h
HOP = Hop(3, "10.0.0.9", noarp=False)
DIRECT = Route()
VIA = Route(gateway="10.0.0.1")


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
def test_judge(route: Route | None, neighbours: dict[tuple[int, str], int], before: bool, problem: str) -> None:
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


def test_the_kernel_says_which_source_a_send_would_have() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
        assert get_route(sock, "127.0.0.9", 1, match=False) == Route(source="127.0.0.1")
        assert get_route(sock, "203.0.113.9", 1, match=True) is None
