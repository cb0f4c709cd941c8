"""What a helper socket gets of the stream that it brings in, and who else on the host gets it.

Called by poc_helper_socket_igmp.py, in the relay's namespace and on the plain link, where a datagram that
passes AF_PACKET reaches the sockets too.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from helper_filters import COUNT, count, pending
from helper_lab import PORT, Lab, Sender
from helper_wire import Ingress, udp_counter

from experiment import Experiment
from mrelay.kernel import cbpf
from mrelay.kernel.membership import IP_MULTICAST_ALL, IPV6_MULTICAST_ALL, MembershipPool

SO_MEMINFO: Final = 55  # asm-generic/socket.h: u32[9]
SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_DROPS = 0, 8  # linux/sock_diag.h
GROUPS: Final = {4: "239.2.2.2", 6: "ff1e::2:2"}


class Seen(NamedTuple):
    """One kind of socket after `COUNT` datagrams."""

    kind: str
    version: int
    ring: int
    queued: int  # bytes
    memory: int  # bytes of kernel memory
    drops: int
    errors: int  # UDP's InErrors, which monitoring watches


def measure(sender: Sender, ring: Ingress) -> list[Seen]:
    """The helper as the relay makes it, and bound ones, for contrast."""
    seen = []
    for version in (4, 6):
        for kind, make in (("helper", _unbound), ("bound + cBPF", _muted), ("bound", _bound)):
            with make(version) as sock:
                before = udp_counter(version, "InErrors")
                at_ring = count(ring, sender, GROUPS[version])
                memory = struct.unpack("=9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))
                errors = udp_counter(version, "InErrors") - before
                row = pending(sock), memory[SK_MEMINFO_RMEM_ALLOC], memory[SK_MEMINFO_DROPS], errors
                seen.append(Seen(kind, version, at_ring, *row))
    return seen


@contextlib.contextmanager
def _unbound(version: int) -> Iterator[socket.socket]:
    pool = MembershipPool(socket.if_nametoindex("wire0"))
    pool.join(GROUPS[version])
    yield pool.sockets[0]
    pool.close()


@contextlib.contextmanager
def _bound(version: int, *, mute: bool = False) -> Iterator[socket.socket]:
    """Bound to the stream's port and joined, as a receiver would be."""
    with _unbound(version), listener(version, every_group=True) as sock:
        if mute:
            cbpf.attach(sock, cbpf.DROP_ALL)
        yield sock


def _muted(version: int) -> contextlib.AbstractContextManager[socket.socket]:
    return _bound(version, mute=True)


def listener(version: int, *, every_group: bool) -> socket.socket:
    """A program's socket on the stream's port that joined nothing."""
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    level, option = (
        (socket.IPPROTO_IP, IP_MULTICAST_ALL) if version == 4 else (socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL)
    )
    sock.setsockopt(level, option, int(every_group))
    sock.bind(("", PORT))
    return sock


def bystander(sender: Sender, ring: Ingress, version: int, *, every_group: bool, joined: bool) -> int:
    """Datagrams that such a program gets, with or without a helper's membership."""
    membership = _unbound(version) if joined else contextlib.nullcontext()
    with listener(version, every_group=every_group) as sock, membership:
        count(ring, sender, GROUPS[version])
        got = 0
        while pending(sock):
            sock.recv(2048)
            got += 1
        return got


def show(experiment: Experiment, lab: Lab) -> None:
    """The table, and what it proves."""
    with lab.relay.inside(), Sender(lab, lab.wire) as sender, Ingress("wire0") as ring:
        seen = measure(sender, ring)
        # by (IP_MULTICAST_ALL, joined): IPv4 and IPv6
        cases = {
            (every, joined): [bystander(sender, ring, v, every_group=every, joined=joined) for v in (4, 6)]
            for every in (True, False)
            for joined in (True, False)
        }
    experiment.table(
        f"A joined socket after {COUNT} datagrams of its group, never read",
        ("socket", "at the ring", "queued", "memory", "drops", "InErrors"),
        [(f"{s.kind}, v{s.version}", *s[2:]) for s in seen],
    )
    unbound, muted, bound = (seen[n::3] for n in range(3))
    experiment.claim(
        "The unbound helper gets none of it: nothing is queued, dropped or counted as an error",
        all((s.ring, s.queued, s.memory, s.drops, s.errors) == (COUNT, 0, 0, 0, 0) for s in unbound),
        f"(ring, queued, memory, drops, InErrors) {[tuple(s[2:]) for s in unbound]}",
    )
    experiment.claim(
        "Bound and never read, a socket keeps kernel memory full; a filter makes that harmless drops",
        all(s.memory > 0 for s in bound) and all((s.memory, s.drops) == (0, COUNT) for s in muted),
        f"kernel memory {[s.memory for s in bound]} bytes without, {[s.memory for s in muted]} with the filter, "
        f"which counts {[s.drops for s in muted]} drops and {[s.errors for s in muted]} UDP InErrors",
    )
    experiment.claim(
        "A membership is the host's: a program that listens on the port and joined nothing gets the stream by it",
        cases == {(True, True): [COUNT] * 2, (True, False): [0, 0], (False, True): [0, 0], (False, False): [0, 0]},
        f"a listener got {cases[True, True]} with the helper, {cases[True, False]} without, "
        f"{cases[False, True]} with IP_MULTICAST_ALL off",
    )
