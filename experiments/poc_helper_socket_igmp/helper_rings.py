"""One ring for all the groups of an interface, against a packet socket for each.

Called by poc_helper_socket_igmp.py. On two plain links, one for each way, so that both can be measured in
turn. Blocks for as long as it sends.
"""

import contextlib
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final

from helper_lab import Lab, Sender
from helper_wire import MARKERS, Ingress

from experiment import Experiment
from mrelay.kernel import cbpf, packet
from mrelay.kernel.membership import MembershipPool

WANTED: Final = [f"239.7.0.{n + 1}" for n in range(64)]
OTHERS: Final = [f"239.7.1.{n + 1}" for n in range(64)]
NOBODYS: Final = "239.8.8.8"
DATAGRAMS: Final = 100  # a turn: short against a scheduler's slice, so that most turns are undisturbed


def one_ring(lab: Lab) -> tuple[int, int, int, int]:
    """Helpers, and of one datagram to each of the wanted and other groups: wanted, twice, others at the ring."""
    with (
        Sender(lab, lab.wire) as sender,
        contextlib.closing(MembershipPool(socket.if_nametoindex("wire0"))) as pool,
        Ingress("wire0", tuple(WANTED)) as ring,
    ):
        for group in WANTED:
            pool.join(group)
        for group in (*WANTED, *OTHERS):
            sender.send(group, 1, 1)
        sender.send_marker(MARKERS[4], b"the end")
        found = ring.receive(b"the end") or Counter[tuple[str, str]]()
        by_group = {group: n for (group, _), n in found.items()}
        wanted = sum(1 for group in WANTED if by_group.get(group) == 1)
        return len(pool.sockets), wanted, sum(1 for n in by_group.values() if n > 1), len(by_group) - wanted


def cost(lab: Lab, rounds: int) -> tuple[float, float]:
    """Microseconds to send a datagram that no rule names past one ring, and past a packet socket a group.

    On a veth pair the sender's CPU does the receiver's work, so the difference is what receiving costs.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with (
        Sender(lab, lab.wire) as to_ring,
        Sender(lab, lab.second) as to_sockets,
        Ingress("wire0", tuple(WANTED)),
        _socket_each("second0"),
    ):
        for _ in range(rounds):
            for sender, taken in zip((to_ring, to_sockets), times, strict=True):
                start = time.perf_counter()
                sender.send(NOBODYS, DATAGRAMS, 1)
                taken.append((time.perf_counter() - start) / DATAGRAMS * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


@contextlib.contextmanager
def _socket_each(interface: str) -> Iterator[None]:
    """A packet socket for every wanted group, each with its own filter."""
    with contextlib.ExitStack() as stack:
        for group in WANTED:
            sock = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            number = int(ip_address(group))
            cbpf.attach_group_filter(sock, [(number, number)], [])
            sock.bind((interface, packet.ETH_P_ALL))
        yield


def show(experiment: Experiment, lab: Lab) -> float:
    """What it proves; how many times dearer a socket for each group is."""
    with lab.relay.inside():
        helpers, wanted, twice, others = one_ring(lab)
        ring, sockets = cost(lab, 35 if experiment.short else 125)
    experiment.claim(
        "One ring takes what all helpers of an interface brought in, each frame once, and no other group",
        (wanted, twice, others) == (len(WANTED), 0, 0) and helpers > 1,
        f"{wanted} of {len(WANTED)} groups of {helpers} helpers, {twice} twice, {others} of {len(OTHERS)} others",
    )
    experiment.claim(
        "A packet socket for each group makes every frame dearer, also those that nobody asked for",
        sockets > 1.3 * ring,
        f"a datagram past a ring of {len(WANTED)} groups {ring:.1f} us, past as many sockets {sockets:.1f} us",
    )
    return sockets / ring
