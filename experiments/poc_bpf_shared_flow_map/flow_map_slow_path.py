"""The slow path: an unprivileged process that forwards what the fast path leaves, and installs flows.

Owns its end of the channel, and works with nothing but the descriptors that came over it: an AF_PACKET ring, an
egress socket, the maps. Started by flow_map_relay.py with the channel's descriptor as argument; it drops every
privilege first. Waits in select; ends when the channel does.

Requests are JSON objects, one a datagram: `do` names the method below, the rest are its arguments; the answer
is an object too.
"""

import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import libbpf
from flow_map_layout import FLOW_FAST, Flow
from libbpf import Map

from mrelay.kernel.caps import drop_privileges, set_parent_death_signal
from mrelay.kernel.packet import SLOT, TP_STATUS_KERNEL, TP_STATUS_LOSING, TP_STATUS_USER, map_ring, ring_drops

NOBODY: Final = 65534
ROUND: Final = 256  # frames between two looks at the clock
SO_DETACH_FILTER: Final = 27  # asm-generic/socket.h
_TPACKET2_START: Final = struct.Struct("=IIIHH")  # linux/if_packet.h, struct tpacket2_hdr, as far as used
_DATAGRAM: Final = struct.Struct("!8s2x2sH")  # both addresses, destination port, UDP length; options: none
_RETURN_0: Final = bytes.fromhex("b700000000000000 9500000000000000")  # BPF: r0 = 0; exit
_fence = threading.Lock()  # taking a lock orders our reads of a slot after that of its status


class SlowPath:
    """One ring at a time, and what to do with its frames."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.fds = channel, list[int]()
        self.ring, self.egress = socket.socket(), socket.socket()
        self.slot = self.slots = 0
        self.install_as: int | None = None
        self.keep: float | None = None
        self.patience: int | None = None
        self.remove_at = 0.0

    def run(self) -> None:
        """Serve until the channel closes."""
        while True:
            wait = max(0.0, self.remove_at - time.monotonic()) if self.keep and self.installed() else None
            ready, _, _ = select.select([self.channel, *([self.ring] if self.fds else [])], [], [], wait)
            if self.fds:
                self._forward(ROUND)
                self._remove_old()
            if self.channel in ready and not self._answer():
                return

    def installed(self) -> bool:
        return bool(self.fds and self.flows)

    # ---- frames ----

    def _forward(self, limit: int) -> int:
        """Send up to `limit` waiting frames on; how many."""
        count, words, stride = 0, self.words, SLOT // 4
        while count < limit and words[(self.slot + count) % self.slots * stride] & TP_STATUS_USER:
            count += 1
        with _fence:
            first = self.slot
        for slot in range(first, first + count):
            at = slot % self.slots * SLOT
            self._forward_one(at)
            words[at // 4] = TP_STATUS_KERNEL
        self.slot = (first + count) % self.slots
        self._say_how_far()
        return count

    def _forward_one(self, at: int) -> None:
        status, _, _, _, net = _TPACKET2_START.unpack_from(self.view, at)
        addresses, port, length = _DATAGRAM.unpack_from(self.view, at + net + 12)
        key = self.ifindex + addresses + port + b"\0\0"
        since = self.flows.get(key)
        if since is None:
            if self.install_as is not None:
                self._put(key, self.install_as)
        elif self.patience and self.consumed - since > self.patience:
            self._force(key)
        payload = at + net + 28
        self.egress.send(self.view[payload : payload + length - 8])
        self.consumed += 1
        if status & TP_STATUS_LOSING:
            self.lost += ring_drops(self.ring)

    def _say_how_far(self) -> None:
        """Only when all that was let in has been sent on: with several CPUs, numbers may overtake each other
        between the filter and the ring, so a count below the total says nothing about one frame."""
        accepted = self.progress[0]
        if self.consumed + self.lost == accepted:
            self.progress[8] = accepted

    # ---- flows ----

    def _put(self, key: bytes, state: int) -> None:
        if self.keep and not self.flows:
            self.remove_at = time.monotonic() + self.keep
        self.flow_map.update(key, bytes(Flow(0, state, 0)))
        self.flows[key] = self.consumed
        self.changes += 1

    def _force(self, key: bytes) -> None:
        """The flow outruns us: it would wait for ever, and what the ring can't hold would be lost."""
        self.flow_map.update(key, bytes(Flow(0, FLOW_FAST, 0)))
        self.flows[key] = sys.maxsize
        self.forced += 1

    def _remove_old(self) -> None:
        if self.keep and self.flows and time.monotonic() >= self.remove_at:
            self._remove_all()

    def _remove_all(self) -> None:
        for key in self.flows:
            self.flow_map.delete(key)
        self.changes += len(self.flows)
        self.flows.clear()

    # ---- requests ----

    def _answer(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.channel, 4096, 16)
        if not data:
            return False
        request = json.loads(data)
        method: Callable[..., dict[str, Any]] = getattr(self, request.pop("do"))
        self.channel.send(json.dumps(method(*([fds] if fds else []), **request)).encode())
        return True

    def take(self, fds: list[int], ifindex: int, slots: int) -> dict[str, Any]:
        """Work with these from now on: ring, egress socket, maps (flows, progress, counters, counters again)."""
        self.drop()
        self.fds = fds
        ring, egress, flows, progress, counters, counters_read_only = fds
        self.ring, self.egress = socket.socket(fileno=ring), socket.socket(fileno=egress)
        self.flow_map, self.counters, self.read_only = Map(flows), Map(counters), Map(counters_read_only)
        self.progress_map = Map(progress)
        self.progress_memory = self.progress_map.memory()
        self.progress = memoryview(self.progress_memory).cast("Q")
        self.memory = map_ring(ring, slots, SLOT)
        self.view = memoryview(self.memory)
        self.words = self.view.cast("I")
        self.ifindex, self.slots, self.slot = ifindex.to_bytes(4, sys.byteorder), slots, 0
        self.consumed = self.lost = self.changes = self.forced = 0
        self.flows: dict[bytes, int] = {}  # how many frames we had sent on when we installed it
        self.install_as = self.keep = self.patience = None
        return {}

    def drop(self) -> dict[str, Any]:
        """Let go of what `take` was given."""
        if self.fds:
            for view in (self.progress, self.words, self.view):
                view.release()
            self.memory.close()
            self.progress_memory.close()
            self.ring.detach()
            self.egress.detach()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        return {}

    def policy(
        self, install_as: int | None, keep: float | None = None, patience: int | None = None
    ) -> dict[str, Any]:
        """Install flows in that state at their first frame (None: never); remove all after `keep` seconds;
        give a flow that is still waiting after `patience` frames to the fast path, drained or not."""
        self._remove_all()
        self.install_as, self.keep, self.patience = install_as, keep, patience
        return {}

    def install(self, key: str) -> dict[str, Any]:
        """Install one flow now."""
        self._put(bytes.fromhex(key), FLOW_FAST)
        return {}

    def remove(self) -> dict[str, Any]:
        """Remove all flows now."""
        self._remove_all()
        return {}

    def report(self) -> dict[str, Any]:
        """Send on all that waits, then say what was done since `take`."""
        while self._forward(ROUND):
            pass
        self.lost += ring_drops(self.ring)
        self._say_how_far()
        return {name: getattr(self, name) for name in ("consumed", "lost", "changes", "forced")}

    def rights(self) -> dict[str, Any]:
        """What this process is and what the kernel lets it do: an errno's name, or `ok`."""
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        key = bytes(self.flow_map.key_size)
        tries: dict[str, Callable[[], object]] = {
            "update": lambda: self.flow_map.update(key, bytes(Flow())),
            "look up": lambda: self.flow_map.lookup(key),
            "delete": lambda: self.flow_map.delete(key),
            "read per-CPU counters": lambda: self.counters.lookup(bytes(4)),
            "mmap": self.progress_map.memory,
            "read by read-only fd": lambda: self.read_only.lookup(bytes(4)),
            "write by read-only fd": lambda: self.read_only.update(bytes(4), bytes(self.read_only.room)),
            "open a map by its id": self.flow_map.open_read_only,
            "create a map": lambda: libbpf.create_array(8),
            "load a program": lambda: libbpf.load_instructions(libbpf.BPF_PROG_TYPE_SOCKET_FILTER, _RETURN_0),
            "open a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
            "take the filter away": lambda: self.ring.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0),
        }
        capabilities = sorted({status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")})
        outcomes = {name: _outcome(attempt) for name, attempt in tries.items()}
        return {"uid": os.getuid(), "capabilities": capabilities, **outcomes}


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "ok"


def main() -> None:
    """Arguments: the channel's descriptor, and `drop` or `keep` for the privileges."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the experiment decides, by closing the channel
    if sys.argv[2] == "drop":
        drop_privileges(NOBODY, NOBODY)
    set_parent_death_signal(signal.SIGKILL)  # cleared by the change of uid, so set after it
    SlowPath(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
