"""How large the fast path's maps are, and how its structs lie in memory: bpf/mrelay.h in Python.

Standard library only, because the supervisor, which makes the maps, has no NumPy; the struct layouts are
NumPy dtype descriptions all the same. Tests compare them with the compiled programs' BTF.
"""

from dataclasses import dataclass
from typing import Final

from mrelay import reasons
from mrelay.counters_size import MAX_LINKS, MAX_RULES

HALVES: Final = 2  # of a worker's routes and outputs: one in use while the other is built anew
HOPS: Final = 2 * MAX_LINKS  # numbers of egress sockets
RANGES: Final = 1 << 16
PATIENCE: Final = 16384
TAIL_UNKNOWN: Final = (1 << 64) - 1
NO_PLACE: Final = 0xFFFFFFFF
HOP_READY: Final = 1
HOP_XDP: Final = 2
DSCP_KEEP: Final = 0xFF
PASSED: Final = tuple(reasons.PASSED)
PASSED_REASONS: Final = 8
CARRIED: Final = PASSED_REASONS  # flow.state: this path sent its last frame on, at tc
CARRIED_XDP: Final = CARRIED + 1  # the same by XDP
WHY_NOT_XDP: Final = ("saw_none", "order", "outputs", "hop", "partial", "no_room", "rate", "merged")
BROADCASTS: Final = 32
BROADCAST_HOP: Final = 0xFFFFFFFF
MAX_COPIES: Final = 16
SINGLE: Final = 16
LOOPBACK: Final = 1  # ifindex of lo in every namespace: LOOPBACK_IFINDEX, net/net_namespace.h
HELD_MARK: Final = 0x6D72656C
VLAN_MARK: Final = 0x65726D02

Fields = list[tuple[str, str] | tuple[str, str, int]]
FLOW4_KEY: Final[Fields] = [
    ("source", ">u4"), ("group", ">u4"), ("ifindex", "<u4"), ("port", ">u2"), ("vlan", "<u2"),
]  # fmt: skip
FLOW6_KEY: Final[Fields] = [
    ("source", "u1", 16), ("group", "u1", 16), ("ifindex", "<u4"), ("port", ">u2"), ("vlan", "<u2"),
]  # fmt: skip
FLOW: Final[Fields] = [
    ("tail", "<u8"), ("worker", "<u4"), ("slot", "<u4"), ("start", "<u4"), ("length", "<u4"),
    ("waited", "<u4"), ("state", "<u4"), ("given", "<u8"), ("seen", "<u8"), ("why", "<u4"),
    ("left", "<u4"), ("entered", "<u4"), ("unheard", "<u4"),
    ("limit", "<u4"), ("single", "<u4"),
]  # fmt: skip
PLACE: Final[Fields] = [("output", "<u4"), ("broadcast", "<u4")]
BROADCAST: Final[Fields] = [("changes", "<u4"), ("repeats", "<u4"), ("ifindex", "<u4", MAX_COPIES)]
OUTPUT: Final[Fields] = [
    ("address", "u1", 16), ("source", "u1", 16), ("port", ">u2"), ("source_port", ">u2"), ("hop", "<u4"),
    ("ttl", "u1"), ("dscp", "u1"), ("keep", "u1"), ("multicast", "u1"), ("reserved", "<u4"),
    ("errors", "<u8"), ("reserved2", "<u8"),
]  # fmt: skip
HOP: Final[Fields] = [
    ("flags", "<u4"), ("ifindex", "<u4"), ("mtu", "<u4"), ("mac", "u1", 6), ("own_mac", "u1", 6),
    ("source", "u1", 16), ("changes", "<u4"), ("reserved", "<u4"),
]  # fmt: skip
TRIP: Final[Fields] = [
    ("moved", "<u8"), ("again", "<u8"), ("away", "<u4"), ("place", "<u4"), ("ifindex", "<u4"), ("iif", "<u4"),
]  # fmt: skip
COUNT: Final[Fields] = [("packets", "<u8"), ("bytes", "<u8"), ("limited", "<u8")]
METER: Final[Fields] = [("cost", "<u8"), ("burst", "<u8"), ("due", "<u8")]
LIMIT: Final = [("datagrams", METER), ("bytes", METER)]
PROGRESS: Final[Fields] = [
    ("accepted", "<u8"), ("accepted_long", "<u8"), ("pad", "<u8", 6),
    ("drained", "<u8"), ("half", "<u8"), ("sent", "<u8"), ("sent_long", "<u8"), ("room", "<u8"),
    ("room_long", "<u8"), ("pad2", "<u8", 2),
]  # fmt: skip
RANGE_KEY: Final[Fields] = [("prefixlen", "<u4"), ("ifindex", "<u4"), ("family", "<u4"), ("address", "u1", 16)]

# The maps in the order in which their descriptors are passed to control and workers (messages.FastPath).
DEVMAPS: Final = tuple(f"devmap{n}" for n in range(BROADCASTS))
MAPS: Final = (
    *("flows4", "flows6", "route", "outputs", "hops", "broadcasts", "counts", "passed", "limits", "progress"),
    *("ranges", "turns", "trips", *DEVMAPS),
)  # fmt: skip
PROGRAMS_OWN: Final = ("turns", "trips")  # that neither control nor workers read


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the maps of a relay with these workers hold.

    `slots`: flows of one worker that the fast path can carry (its slots 0 … slots - 1). `routes`, `outputs`:
    places in one half of one worker. `cpus`: possible processors (of `counts` and `passed`).
    """

    workers: int
    slots: int
    routes: int
    outputs: int
    cpus: int

    @property
    def flows(self) -> int:
        """Entries of each flow map, and of `counts` for one processor."""
        return self.workers * self.slots

    def entries(self) -> dict[str, int]:
        """max_entries of each map."""
        return {
            "flows4": self.flows,
            "flows6": self.flows,
            "route": self.workers * HALVES * self.routes,
            "outputs": self.workers * HALVES * self.outputs,
            "hops": HOPS,
            "broadcasts": BROADCASTS,
            "counts": self.cpus * self.flows,
            "passed": self.cpus * PASSED_REASONS,
            "limits": self.workers * MAX_RULES,
            "progress": self.workers,
            "ranges": RANGES,
            "turns": BROADCASTS * MAX_COPIES,
            "trips": self.flows,
            **dict.fromkeys(DEVMAPS, MAX_COPIES),
        }

    def first_slot(self, worker: int) -> int:
        """Slot 0 of a worker in `counts` of one processor."""
        return worker * self.slots

    def first_limit(self, worker: int) -> int:
        """Rule slot 0 of a worker in `limits`."""
        return worker * MAX_RULES

    def broadcasts(self, worker: int) -> range:
        """A worker's share of them; none for some where there are more workers."""
        share = max(1, BROADCASTS // self.workers)
        return range(BROADCASTS)[worker * share : (worker + 1) * share]

    def first_route(self, worker: int, half: int) -> int:
        """Where a half of a worker's lists begins in `route`."""
        return (worker * HALVES + half) * self.routes

    def first_output(self, worker: int, half: int) -> int:
        """The same for `outputs`."""
        return (worker * HALVES + half) * self.outputs


_COUNTS_MOST: Final = 1 << 23  # entries of `counts`, 200 MB at most; bpf/round.h, SLOT_BITS


def sizes(workers: int, flow_limit: int, cpus: int) -> Sizes:
    """For so many workers with tables of `flow_limit` flows."""
    slots = max(1, min(flow_limit, _COUNTS_MOST // (cpus * workers)))
    lists = MAX_LINKS // 4  # room for rules with thousands of outputs, however few flows there may be
    return Sizes(workers, slots, routes=2 * slots + lists, outputs=slots + lists, cpus=cpus)
