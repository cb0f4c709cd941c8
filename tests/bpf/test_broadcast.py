"""A worker's share of broadcasts: which routes have one, when one is written anew, and when its place is free."""

import os
import struct
from itertools import combinations
from typing import Final

import pytest

from bpf_rig import FastPath
from mrelay.ebpf import load
from mrelay.ebpf.layout import BROADCAST_HOP, BROADCASTS, HOP_READY, HOP_XDP, MAX_COPIES
from mrelay.ebpf.maps import Maps
from mrelay.worker.broadcast import Broadcasts
from netns.lab import Namespace

pytestmark = pytest.mark.netns
LINKS: Final = 18
READY: Final = HOP_READY | HOP_XDP


@pytest.fixture
def maps(home: Namespace) -> Maps:
    """With a hop for each of some interfaces, which has the hop's number and 100."""
    home.ip(*(f"link add d{n} index {100 + n} type veth peer name p{n}" for n in range(LINKS)))
    with FastPath(routes=512, workers=2) as path:
        made = Maps([os.dup(fd) for fd in path.maps.values()] + [load.load_copy(path.maps)], path.sizes)
    for number in range(LINKS):
        set_hop(made, number)
    return made


def set_hop(maps: Maps, number: int, flags: int = READY, changes: int = 1) -> None:
    """As control does it."""
    maps.hops["ifindex"][number], maps.hops["changes"][number] = 100 + number, changes
    maps.hops["flags"][number] = flags


def devmap(maps: Maps, number: int) -> list[int]:
    """The interfaces in it."""
    found = (maps.devmaps[number].lookup(struct.pack("=I", place)) for place in range(MAX_COPIES))
    return [struct.unpack_from("=I", value)[0] for value in found if value is not None]


def row(maps: Maps, number: int) -> list[int]:
    """The same, as the programs read it."""
    return [ifindex for ifindex in maps.broadcasts["ifindex"][number].tolist() if ifindex]


def at(maps: Maps, start: int) -> int:
    """What the route there says."""
    return int(maps.route["broadcast"][start])


def test_routes_by_the_same_interfaces_share_one(maps: Maps) -> None:
    """In the same order; the kernel and the programs are told alike."""
    made = Broadcasts(maps, 0)
    made.add(0, [1, 2, 3])
    made.add(10, [3, 2, 1])
    made.add(20, [1, 2, 3])
    first, second = at(maps, 0) - 1, at(maps, 10) - 1
    assert at(maps, 20) - 1 == first != second
    assert devmap(maps, first) == row(maps, first) == [101, 102, 103]
    assert devmap(maps, second) == row(maps, second) == [103, 102, 101]


def test_several_by_one_interface(maps: Maps) -> None:
    """The devmap has it as often, and the programs know."""
    made = Broadcasts(maps, 0)
    made.add(0, [1, 2, 1])
    made.add(10, [1, 2])
    numbers = at(maps, 0) - 1, at(maps, 10) - 1
    assert devmap(maps, numbers[0]) == row(maps, numbers[0]) == [101, 102, 101]
    assert maps.broadcasts["repeats"][list(numbers)].tolist() == [1, 0]


def test_what_has_none(maps: Maps) -> None:
    """One output; too many; an interface that takes no frames."""
    made = Broadcasts(maps, 0)
    set_hop(maps, 9, HOP_READY)
    for start, hops in enumerate(([1], list(range(MAX_COPIES + 1)), [8, 9])):
        made.add(start, hops)
    assert maps.route["broadcast"][:3].tolist() == [0, 0, BROADCAST_HOP]
    made.add(4, list(range(MAX_COPIES - 8)) + list(range(10, 18)))
    assert len(devmap(maps, at(maps, 4) - 1)) == MAX_COPIES


def test_a_hop_that_changes(maps: Maps) -> None:
    """What it says is followed at the next look, and what the kernel took out of a devmap is put there again."""
    made = Broadcasts(maps, 0)
    made.add(0, [1, 2])
    number = at(maps, 0) - 1
    maps.devmaps[number].delete(struct.pack("=I", 1))
    made.refresh()
    made.refresh()
    assert devmap(maps, number) == [101]
    set_hop(maps, 2, changes=7)
    made.refresh()
    assert (devmap(maps, number), int(maps.broadcasts["changes"][number])) == ([101, 102], 7)
    set_hop(maps, 2, HOP_READY, changes=8)
    made.refresh()
    assert at(maps, 0) == BROADCAST_HOP
    set_hop(maps, 2, changes=8)
    made.refresh()
    assert row(maps, at(maps, 0) - 1) == [101, 102]


def test_an_interface_that_is_gone(maps: Maps, home: Namespace) -> None:
    """Nothing half done is left: tc carries the route, until the interface is there."""
    made = Broadcasts(maps, 0)
    home.ip("link del d2")
    made.add(0, [1, 2])
    assert at(maps, 0) == 0
    home.ip("link add d2 index 102 type veth peer name p2")
    set_hop(maps, 2, changes=2)
    made.refresh()
    assert devmap(maps, at(maps, 0) - 1) == [101, 102]


def test_room_is_found_again(maps: Maps) -> None:
    """A worker has its share; what no route uses is free after one more look, for frames that are on their way."""
    made, pairs = Broadcasts(maps, 1), list(combinations(range(LINKS), 2))
    share = BROADCASTS // 2
    for start, pair in enumerate(pairs[: share + 1]):
        made.add(start, list(pair))
    numbers = maps.route["broadcast"][: share + 1].tolist()
    assert sorted(numbers) == [0, *range(share + 1, BROADCASTS + 1)]
    made.forget()
    made.add(100, list(pairs[-1]))
    made.refresh()
    assert at(maps, 100) == 0
    made.refresh()
    assert row(maps, at(maps, 100) - 1) == [100 + n for n in pairs[-1]]


def test_the_next_worker_goes_on(maps: Maps) -> None:
    """With what is there, as it is."""
    Broadcasts(maps, 0).add(0, [1, 2])
    number = at(maps, 0)
    after = Broadcasts(maps, 0)
    after.add(50, [3, 4])
    after.add(60, [1, 2])
    assert at(maps, 60) == number != at(maps, 50)
