"""Routes and neighbours by rtnetlink, one message at a time: for what must cost microseconds.

Owns the few messages it takes (linux/rtnetlink.h, linux/neighbour.h). Control asks for routes and hears of
neighbours with it, thousands at once, which a general library makes slow; lists come from pyroute2. The supervisor
has neighbours probed, which needs CAP_NET_ADMIN. Standard library only; nothing here blocks.
"""

import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

# linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h
NLM_F_REQUEST: Final = 1
NLMSG_ERROR: Final = 2
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE, RTM_NEWNEIGH, RTM_DELNEIGH = 24, 25, 26, 28, 29
RTM_F_FIB_MATCH: Final = 0x2000  # the route itself; without it, any IPv4 address would be "on link"
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_VIA = 1, 4, 5, 7, 8, 18
RTAX_MTU: Final = 2
NDA_DST, NDA_LLADDR = 1, 2
NTF_USE: Final = 1
_NLMSGHDR: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RTATTR: Final = struct.Struct("=HH")  # length, type
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # family, dst_len, …, flags
_NDMSG: Final = struct.Struct("=B3xiHBB")  # family, ifindex, state, flags, type


class Route(NamedTuple):
    """What a datagram to some address would take. Addresses are empty, `mtu` 0, where the kernel names none."""

    gateway: str = ""
    source: str = ""
    mtu: int = 0


class Neighbour(NamedTuple):
    """`state` is NUD_*; `mac` its link-layer address, empty while unknown."""

    state: int
    mac: bytes


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message in a datagram."""
    while len(data) >= _NLMSGHDR.size:
        length, kind, *_ = _NLMSGHDR.unpack_from(data)
        yield kind, data[_NLMSGHDR.size : length]
        data = data[max(-(-length // 4) * 4, _NLMSGHDR.size) :]


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= _RTATTR.size:
        length, kind = _RTATTR.unpack_from(data)
        found[kind] = data[_RTATTR.size : length]
        data = data[max(-(-length // 4) * 4, _RTATTR.size) :]
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    return _RTATTR.pack(_RTATTR.size + len(value), kind) + value


def _address(data: bytes) -> str:
    return str(ipaddress.ip_address(data)) if len(data) in (4, 16) else ""


def read_neighbour(body: bytes) -> tuple[tuple[int, str], Neighbour]:
    """(ifindex, address) and state in the body of RTM_NEWNEIGH or RTM_DELNEIGH."""
    _, ifindex, state, _, _ = _NDMSG.unpack_from(body)
    found = _attributes(body[_NDMSG.size :])
    return (ifindex, _address(found.get(NDA_DST, b""))), Neighbour(state, found.get(NDA_LLADDR, b""))


def get_route(sock: socket.socket, address: str, ifindex: int, *, match: bool) -> Route | None:
    """The route out of this interface, None when there is none. `sock`: a non-blocking one of NETLINK_ROUTE.

    `match`: the table's entry, so that an address that is only assumed to be on the link has none; otherwise what
    a send would use, with its source address. OSError when the kernel does not answer.
    """
    target = ipaddress.ip_address(address)
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, target.max_prefixlen, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH if match else 0)
    body += _attribute(RTA_DST, target.packed) + _attribute(RTA_OIF, struct.pack("=I", ifindex))
    sock.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + body)
    for kind, answer in messages(sock.recv(65536)):  # it is there: the kernel answers within the send
        if kind == RTM_NEWROUTE:
            return _read_route(answer)
    return None


def _read_route(body: bytes) -> Route:
    found = _attributes(body[_RTMSG.size :])
    via = found.get(RTA_GATEWAY) or found.get(RTA_VIA, b"")[2:]  # struct rtvia: family, address
    mtu = _attributes(found.get(RTA_METRICS, b"")).get(RTAX_MTU, b"")
    return Route(_address(via), _address(found.get(RTA_PREFSRC, b"")), int.from_bytes(mtu, "little"))


def probe(ifindex: int, address: str) -> None:
    """Use the neighbour's entry as a send would: a stale one is asked for. Nothing if there is no entry."""
    target = ipaddress.ip_address(address)
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    body = _NDMSG.pack(family, ifindex, 0, NTF_USE, 0) + _attribute(NDA_DST, target.packed)
    header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), RTM_NEWNEIGH, NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
        sock.send(header + body)
