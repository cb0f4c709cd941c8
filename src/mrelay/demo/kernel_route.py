"""Kernel multicast routing for one stream: what smcroute would set up, for comparison.

Owns the mroute socket. Called by the demo. Needs CAP_NET_ADMIN in the namespace it is made in; never blocks.
"""

import socket
import struct
from typing import Self

MRT_INIT, MRT_DONE, MRT_ADD_VIF, MRT_ADD_MFC = 200, 201, 202, 204  # <linux/mroute.h>
VIFF_USE_IFINDEX = 0x8  # <linux/mroute.h>
MAXVIFS = 32  # <linux/mroute.h>


class KernelRoute:
    """Forwards (source, group) from `iif` to `oifs` in the kernel while entered."""

    def __init__(self, source: str, group: str, iif: str, oifs: list[str]) -> None:
        """Install the entry. Raises OSError (ENOPROTOOPT: a kernel without CONFIG_IP_MROUTE)."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_IGMP)
        try:
            self._set(MRT_INIT, struct.pack("@i", 1))
            for vif, interface in enumerate([iif, *oifs]):
                self._set(MRT_ADD_VIF, _vifctl(vif, interface))
            self._set(MRT_ADD_MFC, _mfcctl(source, group, outputs=len(oifs)))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.setsockopt(socket.IPPROTO_IP, MRT_DONE, 0)
        self._socket.close()

    def _set(self, option: int, value: bytes) -> None:
        self._socket.setsockopt(socket.IPPROTO_IP, option, value)


def _vifctl(vif: int, interface: str) -> bytes:
    """struct vifctl: index, flags, TTL threshold, rate limit, interface index, remote address."""
    return struct.pack("@HBBIi4x", vif, VIFF_USE_IFINDEX, 1, 0, socket.if_nametoindex(interface))


def _mfcctl(source: str, group: str, outputs: int) -> bytes:
    """struct mfcctl: from vif 0 to the vifs 1..`outputs`, whatever the TTL; 0 in `ttls` means not there."""
    ttls = bytes([0] + [1] * outputs).ljust(MAXVIFS, b"\0")
    addresses = socket.inet_aton(source), socket.inet_aton(group)
    return struct.pack(f"@4s4sH{MAXVIFS}sIIIi", *addresses, 0, ttls, 0, 0, 0, 0)
