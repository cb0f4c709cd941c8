"""The relay's privileged half: loads and attaches, opens ring and egress socket, and gives away descriptors.

Owns the objects and sockets of one `Way` of deciding, and the slow path's process. Requests to that process
block until it answers.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from flow_map_lab import GROUP, HERE, OUT_GROUPS, PORT, RELAY_CORE, Lab, detach, loaded
from flow_map_layout import (
    FAST_TTL,
    FIRST_PORT,
    SLOW_TTL,
    Address,
    Counters,
    Flow,
    Mac,
    Output,
    Port,
    Route,
    flow_key,
)
from libbpf import Object
from pyroute2 import IPRoute

from mrelay.kernel.packet import (
    ETH_P_ALL,
    PACKET_IGNORE_OUTGOING,
    PACKET_RX_RING,
    PACKET_VERSION,
    SLOT,
    SOL_PACKET,
    TPACKET_V2,
)
from mrelay.kernel.udp import open_egress, set_hop_defaults

ETH_P_IP: Final = 0x0800  # linux/if_ether.h
SLOTS: Final = 32768  # of the slow path's ring: 0.3 s at 100,000 frames a second
_BLOCK: Final = 1 << 16  # bytes
_ANSWER: Final = 20.0  # seconds


class Way(NamedTuple):
    """Who decides whether a frame goes the fast way: programs of flow_map.bpf.c, and the ring's protocol,
    which says whether the ring's filter runs before tc (ETH_P_ALL) or after it."""

    name: str
    tc: str
    filter: str
    protocol: int


TC_DECIDES: Final = Way("tc", "relay", "after", ETH_P_IP)
FILTER_DECIDES: Final = Way("filter", "obey", "mark", ETH_P_ALL)
BOTH_LOOK_UP: Final = Way("both", "relay", "lookup", ETH_P_ALL)


class SlowProcess:
    """The unprivileged process. A context manager; leaving it ends the process."""

    def __init__(self, *, drop: bool) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_ANSWER)
        with theirs:
            program, fd = HERE / "flow_map_slow_path.py", theirs.fileno()
            command = [sys.executable, str(program), str(fd), "drop" if drop else "keep"]
            self._process = subprocess.Popen(command, pass_fds=[fd])
        os.sched_setaffinity(self._process.pid, {RELAY_CORE})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, do: str, fds: list[int] | None = None, **arguments: object) -> dict[str, Any]:
        """One request, with descriptors; its answer. EOFError if the process has ended."""
        request = json.dumps({"do": do, **arguments}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        self._channel.sendmsg([request], rights, socket.MSG_NOSIGNAL)
        if not (answer := self._channel.recv(4096)):
            raise EOFError("the slow path has ended; see its message above")
        result: dict[str, Any] = json.loads(answer)
        return result


class Relay:
    """One way of deciding, at work between in0 and the outputs."""

    def __init__(self, lab: Lab, way: Way, stack: contextlib.ExitStack) -> None:
        self.object = stack.enter_context(loaded("flow_map"))
        with lab.relay.inside():
            self.ifindex = socket.if_nametoindex("in0")
            self.ring = stack.enter_context(_open_ring(self.object, way))
            self.link = self.object.program(way.tc).attach_ingress(self.ifindex)
            stack.callback(detach, self.link, lab.relay)
            outputs = [_output(lab, number, stack) for number in range(len(OUT_GROUPS))]
        self.egress = outputs[0][0]
        self.flows, self.counter_map = self.object.map("flows"), self.object.map("counters")
        for route in range(len(outputs)):  # route 0 goes to the first output, route 1 to both
            chosen = [output for _, output in outputs[: route + 1]]
            value = Route(len(chosen), (Output * 4)(*chosen))
            self.object.map("routes").update(route.to_bytes(4, sys.byteorder), bytes(value))

    def key(self, flow: int = 0, source: str | None = None) -> bytes:
        """Of the load's flow number `flow`, or of another source's datagrams to the same group."""
        address = source or f"10.99.{(flow + 1) >> 8}.{(flow + 1) & 0xFF}"
        return flow_key(self.ifindex, address, GROUP, PORT)

    def install(self, key: bytes, state: int, route: int) -> None:
        """From this side; the slow path's process does it otherwise."""
        self.flows.update(key, bytes(Flow(0, state, route)))

    def counters(self) -> dict[str, int]:
        """The sums over all CPUs."""
        values = [Counters.from_buffer_copy(value) for value in self.counter_map.lookup(bytes(4))]
        return {name: sum(getattr(value, name) for value in values) for name, _ in Counters._fields_}


@contextlib.contextmanager
def relaying(lab: Lab, way: Way, process: SlowProcess, *, one_map: bool = True) -> Iterator[Relay]:
    """`way` at work with `process` as its slow path. Without `one_map` that writes a map of its own."""
    with contextlib.ExitStack() as stack:
        relay = Relay(lab, way, stack)
        flows = relay.flows if one_map else stack.enter_context(loaded("flow_map")).map("flows")
        read_only = relay.counter_map.open_read_only()
        stack.callback(os.close, read_only)
        fds = [relay.ring.fileno(), relay.egress.fileno(), flows.fd, relay.object.map("progress").fd]
        process.ask("take", [*fds, relay.counter_map.fd, read_only], ifindex=relay.ifindex, slots=SLOTS)
        try:
            yield relay
        finally:
            process.ask("drop")


def _open_ring(programs: Object, way: Way) -> socket.socket:
    """A TPACKET_V2 ring of short slots on in0. It is in no fanout group: what is bound in one stays bound to
    its protocol."""
    ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    ring.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
    ring.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    request = struct.pack("=IIII", _BLOCK, SLOTS * SLOT // _BLOCK, SLOT, SLOTS)  # struct tpacket_req
    ring.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
    programs.program(way.filter).attach_to(ring, lock=True)
    ring.bind(("in0", way.protocol))
    return ring


def _output(lab: Lab, number: int, stack: contextlib.ExitStack) -> tuple[socket.socket, Output]:
    """The slow path's socket, and how the fast path makes the same datagrams: but for the TTL, which is to
    tell the paths apart."""
    interface, group, port = f"out{number + 1}", OUT_GROUPS[number], FIRST_PORT + number
    ifindex = socket.if_nametoindex(interface)
    egress = stack.enter_context(open_egress(ifindex, 4, group, port, "egress", None))
    set_hop_defaults(egress, SLOW_TTL, 0)
    address, source_port = egress.getsockname()
    ip = socket.inet_aton(group)
    group_mac = bytes((0x01, 0x00, 0x5E, ip[1] & 0x7F, ip[2], ip[3]))  # RFC 1112 §6.4
    with IPRoute() as route:
        own_mac = route.get_links(ifindex)[0].get_attr("IFLA_ADDRESS")
    return egress, Output(
        ifindex,
        Address(*socket.inet_aton(address)),
        Address(*ip),
        Port(*source_port.to_bytes(2)),
        Port(*port.to_bytes(2)),
        Mac(*group_mac),
        Mac(*bytes.fromhex(own_mac.replace(":", ""))),
        FAST_TTL,
    )
