"""Who owns a membership: the open file description, however many descriptors lead to it, in whatever process.

Called by poc_helper_socket_igmp.py. Everything is observed twice: in the kernel's tables and as a report on
the relay's cable. On the plain link.
"""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Final

from helper_lab import Lab
from helper_wire import (
    ALLOW_NEW_SOURCES,
    BLOCK_OLD_SOURCES,
    CHANGE_TO_EXCLUDE,
    CHANGE_TO_INCLUDE,
    Ingress,
    Reports,
    in_mac_filter,
    included,
    users,
)

from experiment import Experiment
from mrelay.kernel.membership import MembershipPool

INTERFACE: Final = "wire0"
GROUPS: Final = {4: "239.3.3.3", 6: "ff1e::3:3"}
BARRIERS: Final = {4: "239.3.3.99", 6: "ff1e::3:99"}
SSM: Final = {4: ("232.3.3.3", "10.9.9.9"), 6: ("ff3e::3:3", "fd99::9")}
NOBODY: Final = 65534


class Ownership:
    """The cases of one IP version; each returns what it saw."""

    def __init__(self, version: int, reports: Reports, broken: str | None) -> None:
        self.version, self.group = version, GROUPS[version]
        self._reports, self._broken = reports, broken

    def joined(self) -> MembershipPool:
        """A pool that joined the group, its report already seen."""
        self._reports.forget()
        pool = MembershipPool(socket.if_nametoindex(INTERFACE))
        pool.join(self.group)
        if self._reports.await_record(self.group, CHANGE_TO_EXCLUDE) is None:
            raise RuntimeError(f"no report of the join of {self.group}")
        return pool

    def held(self) -> int:
        return users(INTERFACE, self.group)

    def left(self) -> bool:
        """A leave is on the wire, and the kernel lists no membership any more."""
        return self._reports.await_record(self.group, CHANGE_TO_INCLUDE) is not None and self.held() == 0

    def stayed(self) -> bool:
        """Still listed; no leave before the report of something that was joined after."""
        with contextlib.closing(MembershipPool(socket.if_nametoindex(INTERFACE))) as other:
            other.join(BARRIERS[self.version])
            barrier = self._reports.await_record(BARRIERS[self.version], CHANGE_TO_EXCLUDE)
        leaves = [r for r in self._reports.seen if (str(r.group), r.kind) == (self.group, CHANGE_TO_INCLUDE)]
        return barrier is not None and not leaves and self.held() == 1

    # ---- the cases ------------------------------------------------------------------------

    def visible(self) -> dict[str, bool]:
        """One helper from its join to its close."""
        pool = self.joined()
        seen = {"listed": self.held() == 1, "in MAC filter": in_mac_filter(INTERFACE, self.group)}
        seen["join sent"] = True  # joined() saw it
        with self._leaked(pool) if self._broken == "owner" else contextlib.nullcontext():
            pool.close()
            seen["leave sent"] = self._reports.await_record(self.group, CHANGE_TO_INCLUDE) is not None
            seen["gone"] = self.held() == 0 and not in_mac_filter(INTERFACE, self.group)
        return seen

    def source_specific(self) -> dict[str, bool]:
        """The same of one source."""
        group, source = SSM[self.version]
        pool = MembershipPool(socket.if_nametoindex(INTERFACE))
        pool.join(group, source)
        allow = self._reports.await_record(group, ALLOW_NEW_SOURCES)
        seen = {"listed": included(INTERFACE, group, source), "in MAC filter": in_mac_filter(INTERFACE, group)}
        pool.close()
        block = self._reports.await_record(group, BLOCK_OLD_SOURCES)
        sent = [None if record is None else [str(s) for s in record.sources] for record in (allow, block)]
        seen["allow and block sent"] = sent == [[source], [source]]
        seen["gone"] = not included(INTERFACE, group, source) and not in_mac_filter(INTERFACE, group)
        return seen

    def two_sockets(self) -> bool:
        """Of two helpers that joined the same group, the last to close leaves."""
        first, second = self.joined(), MembershipPool(socket.if_nametoindex(INTERFACE))
        second.join(self.group)
        both = self.held() == 2
        first.close()
        one = self.stayed()
        second.close()
        return both and one and self.left()

    def duplicated(self) -> bool:
        """dup(2): the same open file description."""
        pool = self.joined()
        copy = pool.sockets[0].dup()
        pool.close()
        one = self.stayed()
        copy.close()
        return one and self.left()

    def inherited(self) -> bool:
        """A child has it too: the membership lives until that is killed."""
        pool = self.joined()
        with self._leaked(pool):
            pool.close()
            one = self.stayed()
        return one and self.left()

    def in_flight(self) -> bool:
        """Sent by SCM_RIGHTS and not yet received, then thrown away with the channel."""
        pool = self.joined()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(here, [b"helper"], [pool.sockets[0].fileno()])
        pool.close()
        here.close()
        one = self.stayed()
        there.close()
        return one and self.left()

    def leave_by_another(self) -> bool:
        """A process of user 65534 that has a copy of the descriptor leaves; the owner still has it open."""
        pool = self.joined()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                os.setresuid(NOBODY, NOBODY, NOBODY)
                pool.leave(self.group)
            os._exit(0)
        os.waitpid(pid, 0)
        gone = self.left()
        still_open = len(pool.sockets) == 1 and pool.sockets[0].fileno() >= 0
        pool.close()
        return gone and still_open

    def careless_child(self) -> bool:
        """A program started with every inheritable descriptor: the pool's are not (O_CLOEXEC)."""
        pool = self.joined()
        with _child(close_fds=False):
            pool.close()
            return self.left()

    def ring_closed(self) -> bool:
        """Opening and closing an AF_PACKET ring on the interface changes nothing."""
        pool = self.joined()
        with Ingress(INTERFACE, (self.group,)):
            during = self.held()
        one = self.stayed()
        pool.close()
        return during == 1 and one and self.left()

    def delays(self, rounds: int) -> tuple[float, float]:
        """Milliseconds from the join, and from the close, to its report on the wire: medians."""
        joins, leaves = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            pool = self.joined()
            joins.append(time.perf_counter() - start)
            start = time.perf_counter()
            pool.close()
            self.left()
            leaves.append(time.perf_counter() - start)
        return statistics.median(joins) * 1e3, statistics.median(leaves) * 1e3

    def _leaked(self, pool: MembershipPool) -> contextlib.AbstractContextManager[None]:
        return _child(pass_fds=[sock.fileno() for sock in pool.sockets])


@contextlib.contextmanager
def _child(*, pass_fds: list[int] | None = None, close_fds: bool = True) -> Iterator[None]:
    """Another program, until killed; it also ends when we do, by the end of its input."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=close_fds, pass_fds=pass_fds or ()) as child:
        try:
            yield
        finally:
            child.send_signal(signal.SIGKILL)


def show(experiment: Experiment, lab: Lab) -> str:
    """What it proves; the delays in words."""
    with lab.relay.inside(), lab.reports(lab.wire) as reports:
        families = [Ownership(version, reports, experiment.broken) for version in (4, 6)]
        _claim_visible(experiment, families)
        for text, case in _CASES.items():
            held = [case(family) for family in families]
            experiment.claim(text, all(held), f"IPv4 {_yes(held[0])}, IPv6 {_yes(held[1])}")
        delays = [family.delays(5 if experiment.short else 25) for family in families]
    names = ("IGMP", "MLD")
    return ", ".join(f"{name} {join:.0f}/{leave:.0f}" for name, (join, leave) in zip(names, delays, strict=True))


def _claim_visible(experiment: Experiment, families: list[Ownership]) -> None:
    seen = [family.visible() for family in families]
    experiment.claim(
        "A join is listed in igmp/igmp6 and dev_mcast and reported on the wire; a close ends all three",
        all(all(case.values()) for case in seen),
        "; ".join(f"IPv{f.version}: {_words(case)}" for f, case in zip(families, seen, strict=True)),
    )
    seen = [family.source_specific() for family in families]
    experiment.claim(
        "A source-specific join is listed in mcfilter/mcfilter6 and reported with its source",
        all(all(case.values()) for case in seen),
        "; ".join(f"IPv{f.version}: {_words(case)}" for f, case in zip(families, seen, strict=True)),
    )


def _words(case: dict[str, bool]) -> str:
    return ", ".join(f"{name} {_yes(value)}" for name, value in case.items())


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


_CASES: Final[dict[str, Callable[[Ownership], bool]]] = {
    "Two helpers of one group: only the last close sends a leave": Ownership.two_sockets,
    "A duplicate keeps the membership of a closed helper until it is closed too": Ownership.duplicated,
    "A child that inherited the descriptor keeps it, until it is killed": Ownership.inherited,
    "A descriptor in flight, never received, keeps it until the channel is closed": Ownership.in_flight,
    "Whoever has a copy can leave without any privilege; the owner's stays open": Ownership.leave_by_another,
    "The relay's helpers are close-on-exec: a careless child keeps nothing alive": Ownership.careless_child,
    "Opening and closing the AF_PACKET ring changes no membership and sends no report": Ownership.ring_closed,
}
