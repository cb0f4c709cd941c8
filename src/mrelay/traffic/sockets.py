"""Opens the UDP sockets that test traffic is sent and received on, from endpoints as rules write them.

Called by sender and receiver. Opening may wait for the kernel (a join programs the NIC), never for a
peer. Needs no privilege; with CAP_NET_ADMIN the receive buffer may exceed net.core.rmem_max.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

from mrelay.kernel.udp import UDP_SEGMENT, socket_address
from mrelay.model.endpoint import Input, Output
from mrelay.traffic.mmsg import SO_TIMESTAMPNS_NEW

MCAST_JOIN_GROUP = 42  # <linux/in.h>
MCAST_JOIN_SOURCE_GROUP = 46  # <linux/in.h>
IP_MULTICAST_ALL = 49  # <linux/in.h>
IPV6_MULTICAST_ALL = 29  # <linux/in6.h>
SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
SO_MEMINFO = 55  # <asm-generic/socket.h>
SK_MEMINFO_DROPS = 8  # <linux/sock_diag.h>: index in SO_MEMINFO's array of u32
SK_MEMINFO_VARS = 9
RECEIVE_BUFFER = 32 << 20  # bytes; a 1,000-byte datagram takes about 2,300 of them

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TrafficError(Exception):
    """A stream can't be sent or received; the text says why and what to do."""


def open_sending(output: Output, ttl: int | None = None, gso_size: int = 0) -> socket.socket:
    """A socket connected to `output`; with `gso_size`, each write is cut into datagrams of that size.

    `ttl` (1..255) wins over the endpoint's own; without either a group gets the kernel's 1.
    Raises TrafficError.
    """
    address, port = _destination(output)
    with _explained(f"cannot send to {output}"), contextlib.ExitStack() as on_failure:
        sock = on_failure.enter_context(_udp_socket(address))
        _bind_to_device(sock, output.interface)
        _set_ttl(sock, address, ttl or output.ttl)
        _set_dscp(sock, address, output.dscp)
        if output.source not in ("egress", "keep"):
            sock.bind((str(output.source), 0))
        if gso_size:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, gso_size)
        sock.connect(_sockaddr(address, port, output.interface))
        on_failure.pop_all()
        return sock


def open_receiving(wanted: Input) -> socket.socket:
    """A bound socket, joined when `wanted` names a group, that timestamps what it receives.

    Raises TrafficError.
    """
    address, port, source = _single(wanted)
    with _explained(f"cannot receive {wanted}"), contextlib.ExitStack() as on_failure:
        sock = on_failure.enter_context(_udp_socket(address))
        _grow_receive_buffer(sock)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS_NEW, 1)
        if address.is_multicast:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            _bind_to_device(sock, wanted.interface)
        sock.bind(_sockaddr(address, port, wanted.interface))
        if address.is_multicast:
            _join(sock, wanted.interface, address, source)
        elif source:
            sock.connect(_sockaddr(source, 0, wanted.interface))
        on_failure.pop_all()
        return sock


def socket_drops(sock: socket.socket) -> int:
    """Datagrams the kernel dropped because this socket's buffer was full (SO_MEMINFO, Linux 4.12)."""
    values = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * SK_MEMINFO_VARS)
    return int(struct.unpack_from("=I", values, 4 * SK_MEMINFO_DROPS)[0])


def _destination(output: Output) -> tuple[Address, int]:
    if output.address is None or output.port is None:
        raise TrafficError(f"{output}: `*` has no input to copy from — name an address and a port")
    if output.source == "keep":
        raise TrafficError(f"{output}: source=keep has no source to keep — leave it out or name an address")
    return output.address, output.port


def _single(wanted: Input) -> tuple[Address, int, Address | None]:
    """The one address, port and source of `wanted`; a prefix or range is not one stream."""
    if wanted.vlan is not None:
        raise TrafficError(f"{wanted}: a socket sees no VLAN tags — name the VLAN's own interface instead")
    if wanted.address.num_addresses > 1 or wanted.ports.low != wanted.ports.high:
        raise TrafficError(f"{wanted}: a prefix or port range — name one address and one port")
    if wanted.source is not None and wanted.source.num_addresses > 1:
        raise TrafficError(f"{wanted}: the source is a prefix — name one source, or none")
    source = wanted.source.network_address if wanted.source is not None else None
    return wanted.address.network_address, wanted.ports.low, source


_REMEDIES = {
    errno.ENODEV: "no such interface here; `ip link` lists them",
    errno.ENXIO: "no such interface here; `ip link` lists them",
    errno.EADDRINUSE: "another program holds this port; stop it or choose another",
    errno.EADDRNOTAVAIL: "the address is not this host's; `ip address` lists them",
    errno.ENETUNREACH: "no route; add one, or send to a group",
    errno.ENOBUFS: "too many joins; raise net.ipv4.igmp_max_memberships",
    errno.EMSGSIZE: "too long for one datagram there; use a smaller --size",
    errno.EINVAL: "with --gso, datagram and headers must fit the MTU; use a smaller --size",
    errno.ENETDOWN: "the interface is down; `ip link set IFACE up`",
}


def explain(what: str, error: OSError) -> TrafficError:
    """A TrafficError that begins with `what`, says the kernel's reason and ends with the remedy."""
    remedy = _REMEDIES.get(error.errno or 0)
    return TrafficError(f"{what}: {error.strerror or error}" + (f" — {remedy}" if remedy else ""))


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(what, error) from error


def _udp_socket(address: Address) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def _sockaddr(address: Address, port: int, interface: str) -> tuple[str, int] | tuple[str, int, int, int]:
    return socket_address(str(address), port, _ifindex(interface))


def _ifindex(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:  # Python 3.11's has no errno
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None


def _bind_to_device(sock: socket.socket, interface: str) -> None:
    # Besides choosing the egress interface this lets a group be sent to without a route for it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")


def _set_ttl(sock: socket.socket, address: Address, ttl: int | None) -> None:
    if ttl is None:
        return
    if address.version == 4:
        option = socket.IP_MULTICAST_TTL if address.is_multicast else socket.IP_TTL
        sock.setsockopt(socket.IPPROTO_IP, option, ttl)
    else:
        option = socket.IPV6_MULTICAST_HOPS if address.is_multicast else socket.IPV6_UNICAST_HOPS
        sock.setsockopt(socket.IPPROTO_IPV6, option, ttl)


def _set_dscp(sock: socket.socket, address: Address, dscp: int | None) -> None:
    if dscp is None:
        return
    if address.version == 4:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)  # RFC 2474 §3: the upper six bits
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)


def _grow_receive_buffer(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # up to net.core.rmem_max


def _join(sock: socket.socket, interface: str, group: Address, source: Address | None) -> None:
    """Join `group` on `interface` (RFC 3678 §5.1) and take nothing that only others have joined."""
    level = socket.IPPROTO_IP if group.version == 4 else socket.IPPROTO_IPV6
    sock.setsockopt(level, IP_MULTICAST_ALL if group.version == 4 else IPV6_MULTICAST_ALL, 0)
    request = struct.pack("@I4x", _ifindex(interface)) + _sockaddr_storage(group)
    if source is None:
        sock.setsockopt(level, MCAST_JOIN_GROUP, request)
    else:
        sock.setsockopt(level, MCAST_JOIN_SOURCE_GROUP, request + _sockaddr_storage(source))


def _sockaddr_storage(address: Address) -> bytes:
    """struct sockaddr_storage (128 bytes) with port 0."""
    if address.version == 4:
        head = struct.pack("=H2x4s", socket.AF_INET, address.packed)
    else:
        head = struct.pack("=H2x4x16s", socket.AF_INET6, address.packed)
    return head.ljust(128, b"\0")
