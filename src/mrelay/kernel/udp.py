"""Egress UDP sockets, and the control messages that go with a send.

Owns the constants of linux/in.h, linux/in6.h and linux/udp.h that sending needs. The supervisor opens the
sockets (source=keep needs CAP_NET_ADMIN or CAP_NET_RAW for IP_TRANSPARENT); workers send on them. Nothing
here blocks: the sockets are non-blocking.
"""

import ipaddress
import socket
import struct
from typing import Final

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103  # linux/udp.h
UDP_MAX_SEGMENTS: Final = 64  # linux/udp.h, kernels before 6.9; later ones allow more
IP_TOS, IP_TTL, IP_PKTINFO, IP_TRANSPARENT = 1, 2, 8, 19  # linux/in.h
IP_MULTICAST_IF, IP_MULTICAST_TTL = 32, 33  # linux/in.h
IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS, IPV6_V6ONLY = 16, 17, 18, 26  # linux/in6.h
IPV6_PKTINFO, IPV6_HOPLIMIT, IPV6_TCLASS, IPV6_TRANSPARENT = 50, 52, 67, 75  # linux/in6.h
SO_BINDTOIFINDEX: Final = 62  # asm-generic/socket.h
SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_SNDBUF: Final = 32 << 20  # bytes: room for a burst of superpackets; memory only while they wait


def open_egress(
    ifindex: int, family: int, address: str | None, port: int | None, source: str, share: int | None
) -> socket.socket:
    """A sending socket on `ifindex`, connected when the destination is known.

    `source` is "egress", "keep" or an address. `share` is the source port to take, None for a new one.
    OSError as the kernel says it (no route, no such device, address not ours).
    """
    inet = socket.AF_INET if family == 4 else socket.AF_INET6
    sock = socket.socket(inet, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, ifindex)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, _SNDBUF)
        _choose_interface(sock, ifindex)
        if source != "egress":
            _allow_foreign_source(sock)
        own = source if source not in ("egress", "keep") else ("0.0.0.0", "::")[family == 6]  # noqa: S104
        sock.bind((own, share or 0))
        if address is not None and port is not None:
            sock.connect(socket_address(address, port, ifindex))
        return sock
    except BaseException:
        sock.close()
        raise


def _choose_interface(sock: socket.socket, ifindex: int) -> None:
    if sock.family == socket.AF_INET:
        request = struct.pack("=4s4si", bytes(4), bytes(4), ifindex)  # struct ip_mreqn
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_IF, request)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_IF, ifindex)


def _allow_foreign_source(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


def socket_address(address: str, port: int, ifindex: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """What bind and connect take; IPv6 link-local scopes get `ifindex`."""
    if ":" not in address:
        return address, port
    return address, port, 0, ifindex if needs_scope(ipaddress.IPv6Address(address)) else 0


def needs_scope(address: ipaddress.IPv6Address) -> bool:
    """Whether the address means nothing without an interface (RFC 4007 §6)."""
    return address.is_link_local or (address.is_multicast and address.packed[1] & 0xF <= 2)


def packed_address(address: str, port: int, ifindex: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6, as msg_name takes it."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return struct.pack("=H2s4s8x", socket.AF_INET, port.to_bytes(2), ip.packed)
    scope = ifindex if needs_scope(ip) else 0
    return struct.pack("=H2sI16sI", socket.AF_INET6, port.to_bytes(2), 0, ip.packed, scope)


def set_hop_defaults(sock: socket.socket, ttl: int, tos: int) -> None:
    """What the socket's datagrams carry when a send names no TTL (1..255) or TOS (whole byte)."""
    if sock.family == socket.AF_INET:
        for option, value in ((IP_TTL, ttl), (IP_MULTICAST_TTL, ttl), (IP_TOS, tos)):
            sock.setsockopt(socket.IPPROTO_IP, option, value)
    else:
        for option, value in ((IPV6_UNICAST_HOPS, ttl), (IPV6_MULTICAST_HOPS, ttl), (IPV6_TCLASS, tos)):
            sock.setsockopt(socket.IPPROTO_IPV6, option, value)


def hop_control(family: int, ttl: int, tos: int) -> list[tuple[int, int, bytes]]:
    """Ancillary data for one send with this TTL and TOS."""
    if family == 4:
        return [(socket.IPPROTO_IP, IP_TTL, _int(ttl)), (socket.IPPROTO_IP, IP_TOS, _int(tos))]
    level = socket.IPPROTO_IPV6
    return [(level, IPV6_HOPLIMIT, _int(ttl)), (level, IPV6_TCLASS, _int(tos))]


def source_control(family: int, source: bytes, ifindex: int) -> tuple[int, int, bytes]:
    """Ancillary data that makes `source` (packed) the source address of one send."""
    if family == 4:
        return socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", ifindex, source, bytes(4))
    return socket.IPPROTO_IPV6, IPV6_PKTINFO, struct.pack("=16si", source, ifindex)  # struct in6_pktinfo


def segment_control(size: int) -> tuple[int, int, bytes]:
    """Ancillary data that has the kernel cut one send into datagrams of `size` bytes of payload."""
    return SOL_UDP, UDP_SEGMENT, struct.pack("=H", size)


def _int(value: int) -> bytes:
    return struct.pack("=i", value)
