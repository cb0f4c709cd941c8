"""What the supervisor holds open for the others, and the table of how each kind is opened.

Owns every ring, membership, held port, egress socket and changed offload setting; they outlive control and
workers. Each request is checked here again: whoever asks may have been taken over. Called by
supervisor.main; nothing blocks.
"""

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mrelay.kernel import ethtool, packet, udp
from mrelay.kernel.membership import MembershipPool, UnicastPool
from mrelay.messages import HoldUnicast, JoinGroup, OpenEgress, OpenIngress, Resource, SetGro

_GRO: Final = {"rx-gro": True, "rx-udp-gro-forwarding": True}
_MROUTE: Final = (Path("/proc/net/ip_mr_vif"), Path("/proc/net/ip6_mr_vif"))
_MAX_PORT: Final = 65535
_SLOTS: Final = tuple(1 << n for n in range(8, 17))


class Refused(Exception):
    """A request that no rule can need, or that would do harm. `remedy` may be empty."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class Opened:
    """What one resource consists of: every worker's sockets (or none at all), and how to end it."""

    def __init__(self, sockets: list[list[socket.socket]], end: Callable[[], None]) -> None:
        self.sockets, self._end = sockets, end

    def close(self) -> None:
        for several in self.sockets:
            _close_each(several)
        self._end()

    def fds(self, worker: int) -> list[int]:
        """The descriptors of a worker's copies."""
        return [sock.fileno() for sock in self.sockets[worker]]


class Resources:
    """Everything open, by the request that asked for it. `workers`: how many copies a socket needs."""

    def __init__(self) -> None:
        self.held: dict[Resource, Opened] = {}
        self.workers = 0
        self._joins: dict[int, MembershipPool] = {}
        self._unicast = UnicastPool()

    def open(self, what: Resource) -> Opened:
        """Open it, or return what is open already. OSError and Refused leave nothing behind."""
        opened = self.held.get(what)
        if opened is None:
            opened = self.held[what] = _OPENERS[type(what)](self, what)
        return opened

    def close(self, what: Resource) -> None:
        """Close it; closing what is not open is fine."""
        opened = self.held.pop(what, None)
        if opened is not None:
            opened.close()

    def close_all(self) -> None:
        """In the order that stops traffic first: leave groups, then rings, outputs and settings."""
        for kind in _OPENERS:
            for what in [w for w in self.held if type(w) is kind]:
                self.close(what)

    # ---- one opener a kind -----------------------------------------------------------------

    def _join_group(self, what: JoinGroup) -> Opened:
        group = _address(what.group)
        _require(group.is_multicast, f"{group} is not a multicast group")
        source = None if what.source is None else _address(what.source)
        _require(source is None or source.version == group.version, "source and group of different families")
        pool = self._joins.setdefault(what.ifindex, MembershipPool(_interface(what.ifindex)))
        pool.join(group, source)
        return Opened([], lambda: pool.leave(group, source))

    def _hold_unicast(self, what: HoldUnicast) -> Opened:
        address = _address(what.address)
        _require(not address.is_multicast, f"{address} is a multicast group")
        self._unicast.hold(address, _port(what.port))
        return Opened([], lambda: self._unicast.release(address, what.port))

    def _open_ingress(self, what: OpenIngress) -> Opened:
        _interface(what.ifindex)
        _require(what.slots in _SLOTS, f"{what.slots} slots: not a power of two from 256 to 65536")
        _require(self.workers > 0, "no worker was started yet")
        shapes = ((what.slots, packet.SLOT), (packet.LONG_SLOTS, packet.LONG_SLOT))
        rings: list[list[socket.socket]] = [[] for _ in range(self.workers)]
        try:
            for slots, size in shapes:
                fanout: int | None = None
                for mine in rings:
                    ring, fanout = packet.open_ring(what.ifindex, slots, size, fanout, shared=self.workers > 1)
                    mine.append(ring)
        except BaseException:
            for several in rings:
                _close_each(several)
            raise
        return Opened(rings, _nothing)

    def _open_egress(self, what: OpenEgress) -> Opened:
        _check_egress(what)
        _require(self.workers > 0, "no worker was started yet")
        sockets: list[socket.socket] = []
        try:
            for _ in range(self.workers):
                share = sockets[0].getsockname()[1] if sockets else None
                sockets.append(
                    udp.open_egress(what.ifindex, what.family, what.address, what.port, what.source, share)
                )
        except BaseException:
            _close_each(sockets)
            raise
        return Opened([[sock] for sock in sockets], _nothing)

    def _set_gro(self, what: SetGro) -> Opened:
        _require(socket.if_nametoindex(what.ifname) == what.ifindex, f"{what.ifname} is another interface now")
        if any(_has_rows(path) for path in _MROUTE):
            raise Refused(
                "kernel multicast routing is active here, and drops merged frames that have DF set",
                "stop smcrouted, pimd or the like, or set gro = false under [relay]",
            )
        before = ethtool.set_features(what.ifname, _GRO)
        return Opened([], lambda: _put_back(what, before))


def _nothing() -> None:
    """A resource that is nothing but its sockets."""


def _close_each(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _put_back(what: SetGro, before: dict[str, bool]) -> None:
    """The interface may be gone or renamed by now; then there is nothing to put back."""
    try:
        ethtool.set_features(socket.if_indextoname(what.ifindex), before)
    except OSError:
        return


def _has_rows(path: Path) -> bool:
    try:
        return len(path.read_text(encoding="ascii").splitlines()) > 1
    except OSError:
        return False


def _check_egress(what: OpenEgress) -> None:
    _interface(what.ifindex)
    _require(what.family in (4, 6), f"family {what.family}")
    if what.address is not None:
        _require(_address(what.address).version == what.family, f"{what.address} is not IPv{what.family}")
    if what.port is not None:
        _port(what.port)
    if what.source not in ("egress", "keep"):
        _require(_address(what.source).version == what.family, f"{what.source} is not IPv{what.family}")


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise Refused(problem)


def _interface(ifindex: int) -> int:
    socket.if_indextoname(ifindex)  # OSError ENXIO when there is none
    return ifindex


def _port(port: int) -> int:
    _require(0 < port <= _MAX_PORT, f"port {port}")
    return port


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise Refused(str(error)) from error


# The one table of what may be opened; also the order in which it all ends.
_OPENERS: Final[dict[type, Callable[[Resources, Any], Opened]]] = {
    JoinGroup: Resources._join_group,
    HoldUnicast: Resources._hold_unicast,
    OpenIngress: Resources._open_ingress,
    OpenEgress: Resources._open_egress,
    SetGro: Resources._set_gro,
}
