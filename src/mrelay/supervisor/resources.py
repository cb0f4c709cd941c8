"""What the supervisor holds open for the others, and the table of how each kind is opened.

Owns every ring, membership, held port, egress socket and changed offload setting; they outlive control and
workers. Each request is checked here again: whoever asks may have been taken over, so no number is in range and
no text is an address before this says so. Called by supervisor.requests and main; nothing blocks.
"""

import contextlib
import errno
import ipaddress
import resource
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from mrelay.addresses import address_of
from mrelay.counters_size import MAX_LINKS
from mrelay.kernel import ethtool, packet, rtnetlink, udp
from mrelay.kernel.membership import MembershipPool, UnicastPool
from mrelay.messages import AttachXdp, HoldUnicast, JoinGroup, OpenEgress, OpenIngress, Resource, SetGro
from mrelay.supervisor import fdstore
from mrelay.supervisor.fastpath import FastPath

_GRO: Final = {"rx-gro": True, "rx-udp-gro-forwarding": True}
# XDP sees no tag that the interface takes off: a tagged frame would be taken for an untagged one.
_TAGS: Final = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")
_MROUTE: Final = (Path("/proc/net/ip_mr_vif"), Path("/proc/net/ip6_mr_vif"))
_MAX_PORT: Final = 65535
_MAX_INT: Final = (1 << 31) - 1
_SLOTS: Final = tuple(1 << n for n in range(8, 17))
# More of a kind than any set of rules can need: control that asks for more has been taken over, or has a bug.
_MOST: Final[dict[type, int]] = {
    JoinGroup: 1 << 16,
    HoldUnicast: 1 << 14,
    OpenIngress: 1 << 12,
    OpenEgress: 2 * MAX_LINKS,  # while addresses change, the old and the new
    SetGro: 1 << 12,
    AttachXdp: 1 << 12,
}
_SPARE: Final = 128  # descriptors that stay free, to start children and answer with


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

    def __init__(self, pins: Path | None = None) -> None:
        """`pins`: where the fast path is pinned, if anywhere."""
        self.held: dict[Resource, Opened] = {}
        self._count = dict.fromkeys(_MOST, 0)
        self.workers = 0
        self._joins: dict[int, MembershipPool] = {}
        self._unicast = UnicastPool()
        self.fast = FastPath(pins)

    def open(self, what: Resource) -> Opened:
        """Open it, or return what is open already. OSError and Refused leave nothing behind."""
        opened = self.held.get(what)
        if opened is None:
            self._check_room(what)
            opened = self.held[what] = _OPENERS[type(what)](self, what)
            self._count[type(what)] += 1
        return opened

    def _check_room(self, what: Resource) -> None:
        kind, count = type(what), self._count
        if count[kind] >= _MOST[kind]:
            raise Refused(f"{_MOST[kind]} {kind.__name__}: no rules need more")
        # Every worker has its own rings and egress sockets; several joins share a socket, if the kernel lets them.
        used = count[HoldUnicast] + (2 * count[OpenIngress] + count[OpenEgress]) * self.workers
        used += sum(map(len, self._joins.values()))
        more = {OpenIngress: 2 * self.workers, OpenEgress: self.workers}.get(kind, 1)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if used + more > limit - _SPARE:
            raise Refused(f"{used} of {limit} descriptors are in use", "raise ulimit -n, or LimitNOFILE=")

    def close(self, what: Resource) -> None:
        """Close it; closing what is not open is fine."""
        opened = self.held.pop(what, None)
        if opened is not None:
            self._count[type(what)] -= 1
            opened.close()

    def close_all(self) -> None:
        """In the order that stops traffic first: memberships, then rings, outputs and settings.

        Helper sockets are closed as they are, so that what the service manager keeps of them is left whole.
        """
        for pool in self._joins.values():
            pool.close()
        for kind in _OPENERS:
            for what in [w for w in self.held if type(w) is kind]:
                self.close(what)

    def adopt(self) -> None:
        """Take back the helper sockets of the supervisor before us; a join that they hold is found there."""
        for ifindex, sock in fdstore.take_back():
            self._pool(ifindex).adopt(sock)

    def leave_unclaimed(self) -> None:
        """Leave what was taken back and nobody asked for since."""
        for pool in self._joins.values():
            pool.leave_unclaimed()

    def _pool(self, ifindex: int) -> MembershipPool:
        if ifindex not in self._joins:
            opened, closing = partial(fdstore.keep, ifindex), partial(fdstore.release, ifindex)
            self._joins[ifindex] = MembershipPool(ifindex, opened, closing)
        return self._joins[ifindex]

    # ---- one opener a kind -----------------------------------------------------------------

    def _join_group(self, what: JoinGroup) -> Opened:
        group = _address(what.group)
        if not group.is_multicast:
            raise Refused(f"{group} is not a multicast group")
        source = None if what.source is None else _address(what.source)
        _require(source is None or source.version == group.version, "source and group of different families")
        pool = self._pool(_number(what.ifindex))  # the kernel refuses one that is not there
        pool.join(group, source)
        return Opened([], lambda: pool.leave(group, source))

    def _hold_unicast(self, what: HoldUnicast) -> Opened:
        address = _address(what.address)
        _require(not address.is_multicast, f"{address} is a multicast group")
        _require(not address.is_unspecified, f"{address} is every address of this host")
        self._unicast.hold(address, _port(what.port))
        return Opened([], lambda: self._unicast.release(address, what.port))

    def _open_ingress(self, what: OpenIngress) -> Opened:
        _interface(what.ifindex)
        _require(what.slots in _SLOTS, f"{what.slots} slots: not a power of two from 256 to 65536")
        _require(what.family in packet.PROTOCOLS, f"family {what.family}")
        here = {
            held.family for held in self.held if isinstance(held, OpenIngress) and held.ifindex == what.ifindex
        }
        _require(not here or 0 not in {*here, what.family}, f"interface {what.ifindex} has its rings already")
        _require(what.family not in here, f"interface {what.ifindex} has such rings already")
        _require(self.workers > 0, "no worker was started yet")
        if what.family == 0:
            return Opened(self._open_rings(what), _nothing)
        _require(bool(self.fast.maps), "there is no fast path")
        self.fast.attach(what.ifindex)
        try:
            return Opened(self._open_rings(what), lambda: self.fast.detach(what.ifindex))
        except BaseException:
            self.fast.detach(what.ifindex)
            raise

    def _open_rings(self, what: OpenIngress) -> list[list[socket.socket]]:
        """Each worker's short and long ring."""
        shapes = ((what.slots, packet.SLOT), (packet.LONG_SLOTS, packet.LONG_SLOT))
        rings: list[list[socket.socket]] = [[] for _ in range(self.workers)]
        try:
            for slots, size in shapes:
                fanout: int | None = None
                for number, mine in enumerate(rings):
                    ring, fanout = packet.open_ring(
                        what.ifindex,
                        slots,
                        size,
                        fanout,
                        shared=self.workers > 1,
                        protocol=packet.PROTOCOLS[what.family],
                        program=self.fast.filter(number, size) if what.family else None,
                    )
                    mine.append(ring)
        except BaseException:
            for several in rings:
                _close_each(several)
            raise
        return rings

    def _attach_xdp(self, what: AttachXdp) -> Opened:
        name = socket.if_indextoname(_interface(what.ifindex))
        rings = (held for held in self.held if isinstance(held, OpenIngress) and held.family)
        _require(what.ifindex in {held.ifindex for held in rings}, f"no fast path at interface {what.ifindex}")
        before = _keep_tags(name)
        try:
            self.fast.attach_xdp(what.ifindex)
        except OSError as error:
            _put_back(what.ifindex, before)
            raise Refused(*_no_xdp(error)) from error

        def end() -> None:
            if self.fast.detach_xdp(what.ifindex):
                _put_back(what.ifindex, before)

        return Opened([], end)

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
        name = socket.if_indextoname(_interface(what.ifindex))
        if any(_has_rows(path) for path in _MROUTE):
            raise Refused(
                "kernel multicast routing is active here, and drops merged frames that have DF set",
                "stop smcrouted, pimd or the like, or set gro = false under [relay]",
            )
        before = ethtool.set_features(name, _GRO)
        return Opened([], lambda: _put_back(what.ifindex, before))


def probe_neighbour(ifindex: int, address: str) -> None:
    """Best effort: what is gone by now needs no probe. Raises Refused for what is no unicast address."""
    target = _address(address)
    _require(not target.is_multicast and not target.is_unspecified, f"{target} is no neighbour")
    _require(0 < ifindex <= _MAX_INT, f"interface {ifindex}")
    with contextlib.suppress(OSError):
        rtnetlink.probe(ifindex, address)


def _nothing() -> None:
    """A resource that is nothing but its sockets."""


def _close_each(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _keep_tags(name: str) -> dict[str, bool]:
    """Have the interface leave VLAN tags where they are; what it did before. Refused if it won't."""
    before = ethtool.set_features(name, dict.fromkeys(_TAGS, False))
    now = ethtool.features(name)
    if any(now[tag].active for tag in _TAGS if tag in now):
        raise Refused(f"{name} takes VLAN tags off, and XDP would not see them")
    return before


def _no_xdp(error: OSError) -> tuple[str, str]:
    """Why there is no XDP at an interface, and the remedy."""
    leave_out = "leave it out of xdp under [relay]"
    match error.errno:
        case errno.EBUSY:
            return "another XDP program is there", f"remove it (ip link set … xdp off), or {leave_out}"
        case errno.EOPNOTSUPP | errno.ERANGE | errno.EINVAL | errno.E2BIG | errno.EMSGSIZE:
            said = error.strerror
            return (
                f"its driver refuses XDP, or refuses it with this MTU ({said})",
                f"lower its MTU, or {leave_out}",
            )
        case errno.ENOENT:
            return "it takes Linux 6.3 to know which interfaces take frames from XDP", leave_out
    return error.strerror or str(error), ""


def _put_back(ifindex: int, before: dict[str, bool]) -> None:
    """The interface may be gone or renamed by now; then there is nothing to put back."""
    try:
        ethtool.set_features(socket.if_indextoname(ifindex), before)
    except OSError:
        return


def _has_rows(path: Path) -> bool:
    try:
        return len(path.read_text(encoding="ascii").splitlines()) > 1
    except OSError:
        return False


def _check_egress(what: OpenEgress) -> None:
    _number(what.ifindex)  # the kernel refuses one that is not there
    _require(what.family in (4, 6), f"family {what.family}")
    _require(0 <= what.output <= _MAX_INT and 0 <= what.epoch <= _MAX_INT, "a number out of range")
    if what.address is not None:
        _host_or_group(what.address, what.family)
    if what.port is not None:
        _port(what.port)
    if what.source not in ("egress", "keep"):
        source = _host_or_group(what.source, what.family)
        _require(not source.is_multicast, f"{source} can't be a source")


def _host_or_group(text: str, family: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = _address(text)
    if address.version != family:
        raise Refused(f"{text} is not IPv{family}")
    if address.is_unspecified:
        raise Refused(f"{text} is neither a group nor a host")
    return address


def _require(fine: bool, problem: str) -> None:
    """For what is rare: the problem's text is made before it is known whether there is one."""
    if not fine:
        raise Refused(problem)


def _number(ifindex: int) -> int:
    if not 0 < ifindex <= _MAX_INT:
        raise Refused(f"interface {ifindex}")
    return ifindex


def _interface(ifindex: int) -> int:
    _number(ifindex)
    socket.if_indextoname(ifindex)  # OSError ENXIO when there is none
    return ifindex


def _port(port: int) -> int:
    if not 0 < port <= _MAX_PORT:
        raise Refused(f"port {port}")
    return port


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = address_of(text)
    except ValueError:
        raise Refused(f"{text!r:.50} is no address") from None
    _require("%" not in text, f"{text!r:.50} has a scope; the interface is named by its index")
    return address


# The one table of what may be opened; also the order in which it all ends.
_OPENERS: Final[dict[type, Callable[[Resources, Any], Opened]]] = {
    JoinGroup: Resources._join_group,
    HoldUnicast: Resources._hold_unicast,
    AttachXdp: Resources._attach_xdp,  # before the rings, whose end takes the program at tc away
    OpenIngress: Resources._open_ingress,
    OpenEgress: Resources._open_egress,
    SetGro: Resources._set_gro,
}
