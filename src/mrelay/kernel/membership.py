"""Group memberships and unicast holds: helper sockets that are never read.

Owns the MCAST_* socket options. The supervisor keeps one MembershipPool an interface and one
UnicastPool. A membership makes the kernel send IGMPv3 and MLDv2 reports and program the interface's
filter; a hold keeps the host from answering unicast input with port-unreachable. The data itself is
taken elsewhere, so every helper socket drops all it gets. Nothing here blocks.
"""

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from mrelay.ebpf.layout import HELD_MARK
from mrelay.kernel import cbpf

# linux/in.h, linux/in6.h
MCAST_JOIN_GROUP: Final = 42
MCAST_LEAVE_GROUP: Final = 45
MCAST_JOIN_SOURCE_GROUP: Final = 46
MCAST_LEAVE_SOURCE_GROUP: Final = 47
MCAST_MSFILTER: Final = 48
MCAST_EXCLUDE: Final = 0
IP_MULTICAST_ALL: Final = 49
IPV6_MULTICAST_ALL: Final = 29

Address = IPv4Address | IPv6Address
_FULL: Final = (errno.ENOBUFS, errno.ENOMEM)
_GONE: Final = (errno.ENODEV, errno.EADDRNOTAVAIL)
_LIMITS: Final = {
    # by IP version: what bounds the groups of a socket, and the sources of a group on a socket
    4: ("net.ipv4.igmp_max_memberships", "net.ipv4.igmp_max_msf"),
    6: ("net.core.optmem_max", "net.ipv6.mld_max_msf"),
}


_MOST_SOURCES: Final = 512  # of one group on one socket; igmp_max_msf is 10 and mld_max_msf 64 by default
_libc = ctypes.CDLL(None, use_errno=True)


class MembershipError(OSError):
    """A fresh socket cannot take even one membership; `sysctl` names what may be too low."""

    def __init__(self, group: Address, source: Address | None) -> None:
        self.sysctl = " or ".join(_LIMITS[group.version][: 1 if source is None else 2])
        super().__init__(errno.ENOBUFS, f"no membership of {group} to be had: raise the sysctl {self.sysctl}")


class MembershipPool:
    """The memberships of one interface, spread over as many sockets as the kernel's limits ask for."""

    def __init__(
        self,
        ifindex: int,
        opened: Callable[[socket.socket], object] = lambda _: None,
        closing: Callable[[socket.socket], object] = lambda _: None,
    ) -> None:
        """`opened` is told of each new socket, `closing` of each that has nothing left to hold."""
        self.ifindex = ifindex
        self._opened, self._closing = opened, closing
        self._helpers: list[_Helper] = []
        self._roomy: list[_Helper] = []  # those that the kernel has not refused one more group, as far as we know
        self._adopted: list[_Helper] = []  # they may have joined more than we know of, and take no new groups
        self._held: dict[tuple[Address, Address | None], _Helper] = {}
        self._of_group: dict[Address, list[_Helper]] = {}  # every helper that holds something of the group

    def __len__(self) -> int:
        """How many sockets it has."""
        return len(self._helpers)

    @property
    def sockets(self) -> list[socket.socket]:
        return [helper.sock for helper in self._helpers]

    def join(self, group: str | Address, source: str | Address | None = None) -> None:
        """Join `group`, from `source` only when given. Joining again does nothing.

        OSError: ENODEV for a missing interface, EINVAL for what is no group; MembershipError.
        """
        key = _key(group, source)
        if key in self._held:
            return
        if self._take_over(*key):
            return
        for helper in self._candidates(*key):
            if self._join_on(helper, *key):
                return
        self._join_on_new(*key)

    def _candidates(self, group: Address, source: Address | None) -> "list[_Helper]":
        """The helpers worth asking the kernel about: those that hold the group before, then those with room.

        Any-source and source-specific membership of one group never share a socket: the kernel refuses.
        """
        holders = self._of_group.get(group, [])
        sharing = [h for h in holders if source is not None and None not in h.groups[group]]
        roomy = [h for h in self._roomy if h.version == group.version and h not in holders]
        return [helper for helper in sharing if helper not in self._adopted] + roomy

    def leave(self, group: str | Address, source: str | Address | None = None) -> None:
        """Undo that join. Leaving what was not joined, or an interface that is gone, does nothing."""
        key = _key(group, source)
        helper = self._held.pop(key, None)
        if helper is None:
            return
        helper.leave(self.ifindex, *key)
        self._forget(helper, key[0])
        if helper in self._adopted:
            return
        if not helper.groups:
            self._drop(helper)
        elif key[0] not in helper.groups:
            self._has_room(helper)

    def _has_room(self, helper: "_Helper") -> None:
        if helper not in self._roomy:
            self._roomy.append(helper)

    def _hold(self, helper: "_Helper", group: Address, source: Address | None) -> None:
        self._held[group, source] = helper
        holders = self._of_group.setdefault(group, [])
        if helper not in holders:
            holders.append(helper)

    def _forget(self, helper: "_Helper", group: Address) -> None:
        """Once it holds nothing of the group any more."""
        if group not in helper.groups:
            self._of_group[group].remove(helper)
            if not self._of_group[group]:
                del self._of_group[group]

    def adopt(self, sock: socket.socket) -> None:
        """Take a pool's socket from an earlier life, and with it what it has joined: `join` finds that there."""
        version = 4 if sock.family == socket.AF_INET else 6
        helper = _Helper(version, sock)
        self._helpers.append(helper)
        self._adopted.append(helper)

    def leave_unclaimed(self) -> None:
        """Leave what adopted sockets have joined and nobody asked for since."""
        adopted, self._adopted = self._adopted, []
        for helper in adopted:
            for group in _groups_on(self.ifindex, helper.version):
                for source in helper.joined(self.ifindex, group) - helper.groups.get(group, set()):
                    helper.groups.setdefault(group, set()).add(source)
                    helper.leave(self.ifindex, group, source)
            if helper.groups:
                self._has_room(helper)
            else:
                self._drop(helper)

    def close(self) -> None:
        """Close every socket: that leaves everything, unless a service manager keeps copies."""
        for helper in self._helpers:
            helper.sock.close()
        for helpers in (self._helpers, self._roomy, self._adopted):
            helpers.clear()
        self._held.clear()
        self._of_group.clear()

    def _take_over(self, group: Address, source: Address | None) -> bool:
        """Whether an adopted socket holds this already, and the interface agrees."""
        for helper in self._adopted:
            held = helper.version == group.version and source in helper.joined(self.ifindex, group)
            if held and group in _groups_on(self.ifindex, group.version):
                helper.groups.setdefault(group, set()).add(source)
                self._hold(helper, group, source)
                return True
        return False

    def _drop(self, helper: "_Helper") -> None:
        self._helpers.remove(helper)
        if helper in self._roomy:
            self._roomy.remove(helper)
        self._closing(helper.sock)
        helper.sock.close()

    def _join_on(self, helper: "_Helper", group: Address, source: Address | None) -> bool:
        """False when the kernel has no more room on this socket."""
        try:
            helper.join(self.ifindex, group, source)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if group not in helper.groups and helper in self._roomy:
                self._roomy.remove(helper)
            return False
        self._hold(helper, group, source)
        return True

    def _join_on_new(self, group: Address, source: Address | None) -> None:
        helper = _Helper(group.version)
        try:
            if not self._join_on(helper, group, source):
                raise MembershipError(group, source)
        except OSError:
            helper.sock.close()
            raise
        self._helpers.append(helper)
        self._roomy.append(helper)
        self._opened(helper.sock)


class _Helper:
    """One socket and what it joined: for each group its sources, or None in their place for any source."""

    def __init__(self, version: int, sock: socket.socket | None = None) -> None:
        self.version = version
        self.sock = sock or _mute_socket(version)
        self.groups: dict[Address, set[Address | None]] = {}

    def joined(self, ifindex: int, group: Address) -> set[Address | None]:
        """What the kernel says this socket has joined of `group`: sources, or None for any source."""
        # struct group_filter (linux/in.h): interface, group, mode, count of sources, the sources
        head = struct.pack("@I4x", ifindex) + _sockaddr_storage(group) + struct.pack("=II", 0, _MOST_SOURCES)
        data = ctypes.create_string_buffer(head, len(head) + 128 * _MOST_SOURCES)
        size = ctypes.c_uint32(len(data))
        if _libc.getsockopt(self.sock.fileno(), _level(group), MCAST_MSFILTER, data, ctypes.byref(size)):
            number = ctypes.get_errno()
            if number in _GONE:
                return set()
            raise OSError(number, os.strerror(number), "MCAST_MSFILTER")
        mode, count = struct.unpack_from("=II", data.raw, len(head) - 8)
        if mode == MCAST_EXCLUDE:
            return {None}
        at, width = (4, 4) if group.version == 4 else (8, 16)  # of the address in its sockaddr
        starts = [len(head) + 128 * i + at for i in range(min(count, _MOST_SOURCES))]
        return {ip_address(data.raw[start : start + width]) for start in starts}

    def join(self, ifindex: int, group: Address, source: Address | None) -> None:
        option = MCAST_JOIN_GROUP if source is None else MCAST_JOIN_SOURCE_GROUP
        self.sock.setsockopt(_level(group), option, _request(ifindex, group, source))
        self.groups.setdefault(group, set()).add(source)

    def leave(self, ifindex: int, group: Address, source: Address | None) -> None:
        option = MCAST_LEAVE_GROUP if source is None else MCAST_LEAVE_SOURCE_GROUP
        try:
            self.sock.setsockopt(_level(group), option, _request(ifindex, group, source))
        except OSError as error:
            if error.errno not in _GONE:
                raise
        self.groups[group].discard(source)
        if not self.groups[group]:
            del self.groups[group]


class UnicastPool:
    """Bound sockets at unicast inputs, so that the host sends no ICMP port-unreachable for them."""

    def __init__(self) -> None:
        self._held: dict[tuple[Address, int], socket.socket] = {}

    def hold(self, address: str | Address, port: int) -> bool:
        """Bind there. False when a local listener is: then the host sends no ICMP either.

        Without SO_REUSEADDR: with it, a listener on the wildcard address would lose its datagrams to
        this socket without notice. OSError (EADDRNOTAVAIL: not an address of this host).
        """
        key = (ip_address(address), port)
        if key in self._held:
            return True
        sock = _mute_socket(key[0].version)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, HELD_MARK)
            sock.bind((str(key[0]), port))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        self._held[key] = sock
        return True

    def release(self, address: str | Address, port: int) -> None:
        """Undo `hold`; nothing if it is not held."""
        sock = self._held.pop((ip_address(address), port), None)
        if sock is not None:
            sock.close()

    def close(self) -> None:
        for sock in self._held.values():
            sock.close()
        self._held.clear()


def _groups_on(ifindex: int, version: int) -> set[Address]:
    """The groups that somebody on this host joined on the interface (/proc/net/igmp, /proc/net/igmp6)."""
    return set(_igmp(ifindex) if version == 4 else _igmp6(ifindex))


def _igmp(ifindex: int) -> Iterator[Address]:
    current = 0
    for line in Path("/proc/net/igmp").read_text(encoding="ascii").splitlines()[1:]:
        words = line.split()
        if not line.startswith("\t"):
            current = int(words[0])
        elif current == ifindex:
            yield IPv4Address(int(words[0], 16).to_bytes(4, sys.byteorder))


def _igmp6(ifindex: int) -> Iterator[Address]:
    for line in Path("/proc/net/igmp6").read_text(encoding="ascii").splitlines():
        words = line.split()
        if int(words[0]) == ifindex:
            yield IPv6Address(bytes.fromhex(words[2]))


def _mute_socket(version: int) -> socket.socket:
    """A UDP socket that never queues anything, and gets no groups that others joined."""
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    cbpf.attach(sock, cbpf.DROP_ALL)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel makes it its minimum
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
    return sock


def _request(ifindex: int, group: Address, source: Address | None) -> bytes:
    """struct group_req, or struct group_source_req (linux/in.h); the addresses are 8-byte aligned."""
    request = struct.pack("@I4x", ifindex) + _sockaddr_storage(group)
    return request if source is None else request + _sockaddr_storage(source)


def _sockaddr_storage(address: Address) -> bytes:
    if address.version == 4:
        return struct.pack("=HH4s120x", socket.AF_INET, 0, address.packed)
    return struct.pack("=HHI16sI100x", socket.AF_INET6, 0, 0, address.packed, 0)


def _level(group: Address) -> int:
    return socket.IPPROTO_IP if group.version == 4 else socket.IPPROTO_IPV6


def _key(group: str | Address, source: str | Address | None) -> tuple[Address, Address | None]:
    return _address(group), None if source is None else _address(source)


def _address(text: str | Address) -> Address:
    return ip_address(text) if isinstance(text, str) else text
