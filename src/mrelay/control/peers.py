"""Who is at the other end of an API connection, and whether they may change anything.

Owns that rule. Called by api for each connection and each request. Nothing here blocks, and no user database is
read: the kernel says who connected, with which groups, as of then.
"""

import socket
import struct
from typing import Final, NamedTuple, Protocol

SO_PEERGROUPS: Final = 59  # asm-generic/socket.h
_MOST_GROUPS: Final = 256  # that Python's getsockopt has room for
LOOKING: Final = frozenset({"GET", "HEAD"})  # the methods that change nothing


class HasOptions(Protocol):
    """A socket, or asyncio's view of one."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As socket.socket has it."""


class Peer(NamedTuple):
    """A client; `pid` is 0 when it lives in a process namespace that we can't see into."""

    pid: int
    uid: int
    groups: frozenset[int]

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


class Access(NamedTuple):
    """The API socket's file: its mode says who may connect, and `owner` and `group` who may change the rules."""

    owner: int
    group: int

    def may_change(self, peer: Peer) -> bool:
        """Root, the socket's owner (the supervisor's user) and the members of its group; all others may look."""
        return peer.uid in (0, self.owner) or self.group in peer.groups


def peer_of(sock: HasOptions) -> Peer:
    """Who connected. A member of more than 256 groups counts by the primary one."""
    size = struct.calcsize("=iII")  # struct ucred, linux/socket.h
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:  # ERANGE: more than fit; ENOPROTOOPT before 4.13
        groups = b""
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"={len(groups) // 4}I", groups)}))
