"""Offload features of an interface: read and set by name.

Owns the SIOCETHTOOL ioctls for features. The supervisor calls it for UDP GRO forwarding, the doctor to
show what is on. Works in the network namespace of the calling thread; reading needs no privilege,
setting needs CAP_NET_ADMIN. A call may wait for the kernel's RTNL lock and for the driver.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SIOCETHTOOL: Final = 0x8946  # linux/sockios.h
# linux/ethtool.h
ETHTOOL_GSTRINGS: Final = 0x1B
ETHTOOL_GSSET_INFO: Final = 0x37
ETHTOOL_GFEATURES: Final = 0x3A
ETHTOOL_SFEATURES: Final = 0x3B
ETH_SS_FEATURES: Final = 4
ETH_GSTRING_LEN: Final = 32
IFNAMSIZ: Final = 16  # linux/if.h


@dataclass(frozen=True, slots=True)
class Feature:
    """One offload: `available` can be switched, `requested` is what was asked for, `active` what is in
    force (it may need another feature), `never_changed` is fixed."""

    available: bool
    requested: bool
    active: bool
    never_changed: bool

    @property
    def changeable(self) -> bool:
        return self.available and not self.never_changed


def features(ifname: str) -> dict[str, Feature]:
    """Every feature that this kernel knows, by ethtool's name. OSError (ENODEV, EOPNOTSUPP)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return _features(sock, ifname, _bits(sock, ifname))


def set_features(ifname: str, wanted: Mapping[str, bool]) -> dict[str, bool]:
    """Request these features on or off; names that are unknown or fixed here are left out.

    Returns what was requested before, for each name that was set, fit to be passed in again to put it
    back. OSError (ENODEV, EPERM).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        bits = _bits(sock, ifname)
        have = _features(sock, ifname, bits)
        todo = {name: on for name, on in wanted.items() if name in have and have[name].changeable}
        if todo:
            _request(sock, ifname, _words(bits), {bits[name]: on for name, on in todo.items()})
        return {name: have[name].requested for name in todo}


def _request(sock: socket.socket, ifname: str, words: int, todo: Mapping[int, bool]) -> None:
    """ETHTOOL_SFEATURES: a mask and the values, in blocks of 32 bits."""
    blocks = [0] * 2 * words
    for bit, on in todo.items():
        blocks[bit // 32 * 2] |= 1 << bit % 32
        blocks[bit // 32 * 2 + 1] |= on << bit % 32
    _ioctl(sock, ifname, struct.pack(f"=II{2 * words}I", ETHTOOL_SFEATURES, words, *blocks))


def _features(sock: socket.socket, ifname: str, bits: Mapping[str, int]) -> dict[str, Feature]:
    words = _words(bits)
    reply = _ioctl(sock, ifname, struct.pack("=II", ETHTOOL_GFEATURES, words) + bytes(16 * words))
    blocks = list(struct.iter_unpack("=4I", reply[8:]))
    return {
        name: Feature(*(bool(mask >> bit % 32 & 1) for mask in blocks[bit // 32])) for name, bit in bits.items()
    }


def _bits(sock: socket.socket, ifname: str) -> dict[str, int]:
    """Bit numbers by name. Unused bits have an empty name, which may come many times."""
    request = struct.pack("=IIQI", ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0)
    (count,) = struct.unpack_from("=I", _ioctl(sock, ifname, request), 16)
    request = struct.pack("=III", ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count)
    reply = _ioctl(sock, ifname, request + bytes(count * ETH_GSTRING_LEN))[12:]
    strings = (reply[i : i + ETH_GSTRING_LEN] for i in range(0, len(reply), ETH_GSTRING_LEN))
    names = [string.split(b"\0")[0].decode() for string in strings]
    return {name: bit for bit, name in enumerate(names) if name}


def _words(bits: Mapping[str, int]) -> int:
    """32-bit blocks for all bits; the last bit always has a name."""
    return max(bits.values()) // 32 + 1


def _ioctl(sock: socket.socket, ifname: str, command: bytes) -> bytes:
    """Run one ethtool command in place: struct ifreq carries a pointer to it."""
    name = ifname.encode()
    if len(name) >= IFNAMSIZ:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), ifname)
    memory = ctypes.create_string_buffer(command, len(command))
    ifreq = struct.pack("@16sP16x", name, ctypes.addressof(memory))
    fcntl.ioctl(sock, SIOCETHTOOL, ifreq)
    return memory.raw
