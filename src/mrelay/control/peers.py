"""Who is at the other end of a connection to the API's Unix socket, and whether they may change anything.

Owns that rule. Called by server for each connection and by guard for each request. Nothing here blocks, and no
user database is read: the kernel says who connected, with which groups, as of then.
"""

import logging
import socket
import struct
from typing import Final, NamedTuple, Protocol

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from mrelay.control.answers import error
from mrelay.control.guard import LOOKING

log = logging.getLogger(__name__)

SO_PEERGROUPS: Final = 59  # asm-generic/socket.h
_MOST_GROUPS: Final = 256  # that Python's getsockopt has room for


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


class UnixDoor:
    """Lets everyone look who could connect, and those change things who have `access`."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def refusal(self, scope: Scope, _: Headers) -> Response | None:
        """As guard.Door has it."""
        peer: Peer = scope["state"]["peer"]
        scope["state"]["problem"] = problem = self._problem(peer)
        if problem is None or scope["method"] in LOOKING:
            return None
        log.warning("refused to %s: %s %.200r", peer, scope["method"], scope["path"])
        return error(403, "", "", *problem)

    def _problem(self, peer: Peer) -> tuple[str, str] | None:
        if self._access.may_change(peer):
            return None
        remedy = f"try again as root, or as a member of group {self._access.group}"
        return f"uid {peer.uid} may look, but not change anything", remedy


def peer_of(sock: HasOptions) -> Peer:
    """Who connected. A member of more than 256 groups counts by the primary one."""
    size = struct.calcsize("=iII")  # struct ucred, linux/socket.h
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:  # ERANGE: more than fit; ENOPROTOOPT before 4.13
        groups = b""
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"={len(groups) // 4}I", groups)}))
