"""What interfaces can do for XDP, by generic netlink's family "netdev" (Linux 6.3).

Owns the few messages that it takes, and a socket that hears of changes. Unprivileged. The supervisor calls it, and
tells control, which may not open such sockets. Works in the network namespace of the thread that makes a Watch;
what is asked the kernel answers at once, nothing else blocks.
"""

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

NETLINK_GENERIC: Final = 16  # linux/netlink.h
NLM_F_REQUEST: Final = 1
NLM_F_DUMP: Final = 0x300
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
SOL_NETLINK: Final = 270  # linux/socket.h
NETLINK_ADD_MEMBERSHIP: Final = 1
NLA_TYPE_MASK: Final = 0x3FFF
GENL_ID_CTRL: Final = 16  # linux/genetlink.h
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2
CTRL_ATTR_MCAST_GROUPS: Final = 7
CTRL_ATTR_MCAST_GRP_NAME: Final = 1
CTRL_ATTR_MCAST_GRP_ID: Final = 2
FAMILY = "netdev"  # linux/netdev.h, NETDEV_FAMILY_NAME
NETDEV_CMD_DEV_GET: Final = 1
NETDEV_A_DEV_IFINDEX: Final = 1
NETDEV_A_DEV_XDP_FEATURES: Final = 3
NETDEV_XDP_ACT_BASIC: Final = 1
NETDEV_XDP_ACT_NDO_XMIT: Final = 4
NETDEV_MCGRP_MGMT: Final = b"mgmt\0"

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_GENERIC: Final = struct.Struct("=BBH")  # struct genlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_ROOM: Final = 1 << 17

Attributes = dict[int, bytes]


class Watch:
    """Interfaces that take frames from XDP; `fileno` is readable when it is time to look again."""

    def __init__(self) -> None:
        """OSError: ENOENT before Linux 6.3."""
        with _connect() as ask:
            attributes = _family(ask)
        self._family = _number(attributes[CTRL_ATTR_FAMILY_ID])
        groups = map(_attributes, _attributes(attributes[CTRL_ATTR_MCAST_GROUPS]).values())
        by_name = {group[CTRL_ATTR_MCAST_GRP_NAME]: _number(group[CTRL_ATTR_MCAST_GRP_ID]) for group in groups}
        self._events = _connect()
        self._events.bind((0, 0))  # a socket without an address hears nothing of the kernel
        self._events.setblocking(False)
        self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, by_name[NETDEV_MCGRP_MGMT])

    def fileno(self) -> int:
        return self._events.fileno()

    def close(self) -> None:
        self._events.close()

    def drain(self) -> None:
        """Whatever the events say, also that some were lost (ENOBUFS), means: look again."""
        with contextlib.suppress(OSError):  # BlockingIOError in the end
            while self._events.recv(_ROOM):
                pass

    def targets(self) -> frozenset[int]:
        """The interfaces as they are now: those with ndo_xdp_xmit that would work."""
        with _connect() as ask:
            found = _features(ask, self._family)
        return frozenset(ifindex for ifindex, bits in found.items() if bits & NETDEV_XDP_ACT_NDO_XMIT)


def xdp_features() -> dict[int, int]:
    """What each interface can do now, by its number: bits NETDEV_XDP_ACT_*. OSError: ENOENT before Linux 6.3."""
    with _connect() as ask:
        return _features(ask, _number(_family(ask)[CTRL_ATTR_FAMILY_ID]))


def _family(ask: socket.socket) -> Attributes:
    return next(_request(ask, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, _text(CTRL_ATTR_FAMILY_NAME, FAMILY)))


def _features(ask: socket.socket, family: int) -> dict[int, int]:
    found = list(_request(ask, family, NETDEV_CMD_DEV_GET, b"", NLM_F_DUMP))
    return {_number(each[NETDEV_A_DEV_IFINDEX]): _number(each[NETDEV_A_DEV_XDP_FEATURES]) for each in found}


def _connect() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
    sock.settimeout(1.0)  # the kernel has answered when send returns
    return sock


def _request(sock: socket.socket, family: int, command: int, body: bytes, flags: int = 0) -> Iterator[Attributes]:
    """The attributes of each message of the answer."""
    body = _GENERIC.pack(command, 1, 0) + body
    sock.send(_HEADER.pack(_HEADER.size + len(body), family, NLM_F_REQUEST | flags, 0, 0) + body)
    while True:
        for kind, data in _messages(sock.recv(_ROOM)):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                error = -int.from_bytes(data[:4], sys.byteorder, signed=True)
                raise OSError(error or errno.EPROTO, "generic netlink")
            yield _attributes(data[_GENERIC.size :])


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[max(_aligned(length), _HEADER.size) :]


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found[kind & NLA_TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[max(_aligned(length), _ATTRIBUTE.size) :]
    return found


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def _text(kind: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return attribute.ljust(_aligned(len(attribute)), b"\0")


def _number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)
