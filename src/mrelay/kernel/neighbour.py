"""Neighbours by rtnetlink: having the kernel find out whether one is still there.

Owns the one message it takes (linux/neighbour.h). Needs CAP_NET_ADMIN; called by the supervisor. Nothing here
blocks.
"""

import ipaddress
import socket
import struct
from typing import Final

# linux/rtnetlink.h, linux/netlink.h, linux/neighbour.h
RTM_NEWNEIGH: Final = 28
NLM_F_REQUEST: Final = 1
NDA_DST: Final = 1
NTF_USE: Final = 1


def probe(ifindex: int, address: str) -> None:
    """Use the neighbour's entry as a send would: a stale one is asked for. Nothing if there is no entry."""
    packed = ipaddress.ip_address(address).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    # struct ndmsg: family, pad, ifindex, state, flags, type; then struct rtattr
    body = struct.pack("=B3xiHBB", family, ifindex, 0, NTF_USE, 0)
    body += struct.pack("=HH", 4 + len(packed), NDA_DST) + packed
    header = struct.pack("=IHHII", 16 + len(body), RTM_NEWNEIGH, NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
        sock.send(header + body)
