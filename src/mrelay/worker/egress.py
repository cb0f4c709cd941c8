"""A worker's outputs: the sockets, the entries that routes point to, and sending on them one by one.

Owns the egress sockets that the supervisor passed. An entry is one concrete destination; its columns are
NumPy arrays, so that the vector path can gather them. Sends never block. Called by both paths.
"""

import ctypes
import errno
import socket
from collections.abc import Sequence
from typing import Final

import numpy as np

from mrelay.counters import NO_NEIGHBOUR, TOO_BIG, TX_ERROR
from mrelay.kernel.udp import (
    hop_control,
    packed_address,
    segment_control,
    set_hop_defaults,
    socket_address,
    source_control,
)
from mrelay.model.ruleset import Destination

_REASONS: Final = {
    errno.EMSGSIZE: TOO_BIG,
    errno.EHOSTUNREACH: NO_NEIGHBOUR,
    errno.ENETUNREACH: NO_NEIGHBOUR,
}
# An ICMP error that an earlier datagram caused is reported once, instead of sending this one.
_STALE: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH})
# What the kernel says when it can't segment: larger than the MTU, or no checksum offload on the way.
_UNSEGMENTED: Final = frozenset({errno.EMSGSIZE, errno.EINVAL, errno.EIO})
_ADAPTATIONS: Final = 64  # how often an entry's socket follows a stream whose TTL or TOS changed

Payload = memoryview | bytes | ctypes.Array[ctypes.c_char]


def drop_reason(error: int) -> int:
    """The drop reason that an errno of a send means."""
    return _REASONS.get(error, TX_ERROR)


class Entry:
    """One destination of a route. `hop` is what its socket sends with unless told: TTL << 8 | TOS, -1 unset."""

    def __init__(self, index: int, destination: Destination, sock: socket.socket | None) -> None:
        self.index, self.to, self.sock = index, destination, sock
        to = destination
        self.address = socket_address(to.address, to.port, to.oif) if to.named else None
        packed = packed_address(to.address, to.port, to.oif) if to.named else b""
        self.name = ctypes.create_string_buffer(packed, len(packed))
        self.hop = -1
        self.adaptations = 0

    def out_hop(self, hop: int) -> int:
        """TTL << 8 | TOS to leave with, for what came in with `hop`; below 256 when the TTL ran out."""
        ttl = self.to.ttl or (hop >> 8) - 1
        tos = hop & 0xFF if self.to.dscp < 0 else self.to.dscp << 2 | (hop & 3)
        return ttl << 8 | tos

    def needs_nothing(self, hop: int) -> bool:
        """Whether a send of what came in with `hop` need not name an address, a TTL or a source."""
        return not self.to.named and not self.to.keep and self.out_hop(hop) == self.hop

    @property
    def adopts(self) -> bool:
        """Whether `adopt` may be called: not when other entries share the socket, for they would not know."""
        return self.sock is not None and not self.to.named and self.adaptations < _ADAPTATIONS

    def adopt(self, hop: int) -> None:
        """Make `hop` what the socket sends with, so that most sends need not say it."""
        assert self.sock is not None  # noqa: S101  it adopts
        self.adaptations += 1
        set_hop_defaults(self.sock, hop >> 8, hop & 0xFF)
        self.hop = hop

    def send(self, payloads: Sequence[Payload], segment: int, hop: int, source: bytes) -> None:
        """One send: one datagram, or several of `segment` bytes. OSError when the kernel refuses it."""
        if self.sock is None:
            raise OSError(errno.EBADF, "the output's socket is not here")
        control = [segment_control(segment)] if segment else []
        if hop != self.hop:
            control += hop_control(self.to.family, hop >> 8, hop & 0xFF)
        if self.to.keep:
            control.append(source_control(self.to.family, source, self.to.oif))
        self.sock.sendmsg(payloads, control, 0, self.address)

    def deliver(self, payloads: Sequence[Payload], segment: int, hop: int, source: bytes) -> tuple[int, int]:
        """Send, by smaller steps where the kernel wants them; (datagrams that failed, errno), (0, 0) when none.

        `segment` is 0 for one datagram. A refused merged send goes out datagram by datagram.
        """
        if hop < 256:
            return _count(payloads, segment), errno.ETIME
        try:
            self.send(payloads, segment, hop, source)
            return 0, 0
        except OSError as failure:
            error = failure.errno or errno.EIO
        if error in _STALE:
            error = self._try(payloads, segment, hop, source)
            if error == 0:
                return 0, 0
        if not segment or error not in _UNSEGMENTED:
            return _count(payloads, segment), error
        errors = [self._try([p], 0, hop, source) for p in _split(payloads, segment)]
        return sum(e != 0 for e in errors), max(errors)

    def _try(self, payloads: Sequence[Payload], segment: int, hop: int, source: bytes) -> int:
        """The errno of one send, 0 when it went."""
        try:
            self.send(payloads, segment, hop, source)
        except OSError as error:
            return error.errno or errno.EIO
        return 0


def _count(payloads: Sequence[Payload], segment: int) -> int:
    size = sum(memoryview(p).nbytes for p in payloads)
    return max(1, -(-size // segment)) if segment else 1


def _split(payloads: Sequence[Payload], segment: int) -> list[memoryview]:
    views = [memoryview(p).cast("B") for p in payloads]
    return [view[at : at + segment] for view in views for at in range(0, max(len(view), 1), segment)]


class Egress:
    """The outputs' sockets, and every entry that some route uses.

    Columns, one value an entry: `fd` i32 (-1: no socket), `name` u64 address of a sockaddr (0: connected),
    `name_length` u64, `ttl` i32 (0: decrement), `dscp` i32 (-1: keep), `hop` i32, `keep` bool, `v6` bool,
    `oif` u64, `adopts` bool.
    """

    def __init__(self) -> None:
        self.generation = 0  # grows whenever a socket, or what it sends with, changes
        self._sockets: dict[int, socket.socket] = {}
        self._entries: dict[Destination, Entry] = {}
        self.entries: list[Entry] = []
        self._allocate(64)

    def _allocate(self, size: int) -> None:
        self.fd = np.full(size, -1, np.int32)
        self.name = np.zeros(size, np.uint64)
        self.name_length = np.zeros(size, np.uint64)
        self.ttl = np.zeros(size, np.int32)
        self.dscp = np.zeros(size, np.int32)
        self.hop = np.full(size, -1, np.int32)
        self.keep = np.zeros(size, np.bool_)
        self.v6 = np.zeros(size, np.bool_)
        self.adopts = np.zeros(size, np.bool_)
        self.oif = np.zeros(size, np.uint64)

    def grant(self, output: int, sock: socket.socket) -> None:
        """The socket of an output has come (again, after a restart)."""
        self.revoke(output)
        self._sockets[output] = sock
        self.generation += 1

    def revoke(self, output: int) -> None:
        """Close an output's socket; entries that still use it fail with EBADF and are counted."""
        sock = self._sockets.pop(output, None)
        self.generation += 1
        if sock is None:
            return
        for entry in self.entries:
            if entry.sock is sock:
                entry.sock, self.fd[entry.index], self.adopts[entry.index] = None, -1, False
        sock.close()

    def entry(self, destination: Destination) -> Entry:
        """The entry for a destination, made at first use."""
        found = self._entries.get(destination)
        if found is None or (found.sock is None and destination.output in self._sockets):
            found = self._add(destination)
        return found

    def _add(self, to: Destination) -> Entry:
        index = len(self.entries)
        entry = Entry(index, to, self._sockets.get(to.output))
        self.entries.append(entry)
        self._entries[to] = entry
        if index >= len(self.fd):
            old = {name: getattr(self, name) for name in _COLUMNS}
            self._allocate(2 * index)
            for name, column in old.items():
                getattr(self, name)[:index] = column
        self._fill(entry)
        return entry

    def _fill(self, entry: Entry) -> None:
        i, to = entry.index, entry.to
        self.fd[i] = -1 if entry.sock is None else entry.sock.fileno()
        self.name[i] = ctypes.addressof(entry.name) if to.named else 0
        self.name_length[i] = len(entry.name) if to.named else 0
        self.ttl[i], self.dscp[i], self.hop[i] = to.ttl, to.dscp, -1
        self.keep[i], self.v6[i], self.oif[i] = to.keep, to.family == 6, to.oif
        self.adopts[i] = entry.adopts

    def adopt(self, index: int, hop: int) -> None:
        """Let an entry that adopts have its socket send with `hop` by default."""
        entry = self.entries[index]
        entry.adopt(hop)
        self.generation += 1
        self.hop[index], self.adopts[index] = entry.hop, entry.adopts

    def forget_entries(self) -> None:
        """Before routes are built anew: no route points anywhere any more."""
        self._entries.clear()
        self.entries.clear()


_COLUMNS: Final = ("fd", "name", "name_length", "ttl", "dscp", "hop", "keep", "v6", "oif", "adopts")
