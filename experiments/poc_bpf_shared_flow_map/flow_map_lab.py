"""The network of this experiment, its load, and its proof.

    source ── s0 ▸ in0 [relay] out1, out2 ▸ r1, r2 ── sink

Owns the namespaces (nameless: they go with this process) and the programs of numbered.bpf.c: the load numbers
its datagrams, the sink tallies the numbers. `Load.run` blocks until all is sent.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import bpf_build
import numpy as np
from flow_map_layout import NUMBERS, OUTPUTS, TALLY, TC_ACT_SHOT, SinkState, SourceState
from libbpf import ClsactFilter, Object, TcxLink
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from mrelay.demo.topology import End, Namespace, connect
from mrelay.kernel.ethtool import set_features
from traffic import Flow as Stream
from traffic import frame

HERE: Final = Path(__file__).resolve().parent
GROUP, PORT = "239.1.1.1", 5000
OUT_GROUPS: Final = ("239.2.1.1", "239.2.1.2")
OUT_ADDRESSES: Final = ("198.51.100.1", "203.0.113.1")
PAYLOAD: Final = 200  # bytes
LOAD_CORE, RELAY_CORE = (sorted(os.sched_getaffinity(0)) * 2)[:2]
_NEVER: Final = np.uint64(2**64 - 1)


def loaded(name: str) -> Object:
    """`name`.bpf.c compiled and in the kernel. BuildError, or OSError from the verifier."""
    return Object(bpf_build.compiled(HERE / f"{name}.bpf.c"), name)


def detach(link: TcxLink | ClsactFilter, namespace: Namespace) -> None:
    """Take a program away again: clsact is found by the interface, in its namespace."""
    with namespace.inside():
        link.close()


class Lab:
    """The links, the load and the sink. A context manager."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.numbered = stack.enter_context(loaded("numbered"))
            self.source, self.relay, self.sink = (stack.enter_context(Namespace()) for _ in range(3))
            for namespace in (self.source, self.relay, self.sink):
                namespace.sysctl("ipv6/conf/default/disable_ipv6", 1)  # no frames of the kernel's own
            connect(End(self.source, "s0", "10.99.255.1"), End(self.relay, "in0", "192.0.2.1"))
            connect(End(self.relay, "out1", OUT_ADDRESSES[0]), End(self.sink, "r1", "198.51.100.2"))
            connect(End(self.relay, "out2", OUT_ADDRESSES[1]), End(self.sink, "r2", "203.0.113.2"))
            self._set_offloads()
            self.load, self.tallies = Load(self), Tallies(self.numbered)
            with self.sink.inside():
                for interface in ("r1", "r2"):  # by clsact, so that both ways to attach are used
                    ifindex = socket.if_nametoindex(interface)
                    link = self.numbered.program("sink").attach_ingress(ifindex, tcx=False)
                    stack.callback(detach, link, self.sink)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set_offloads(self) -> None:
        """GRO gives a veth its NAPI. XDP frames need it at in0; at r1 it makes one queue of what two CPUs
        send, where their two backlogs could change the order."""
        for namespace, interface in ((self.relay, "in0"), (self.sink, "r1"), (self.sink, "r2")):
            with namespace.inside():
                set_features(interface, {"rx-gro": True})

    @contextlib.contextmanager
    def offload(self, interface: str, feature: str, on: bool) -> Iterator[None]:
        """A feature of one of the relay's interfaces set meanwhile."""
        with self.relay.inside():
            before = set_features(interface, {feature: on})
        try:
            yield
        finally:
            with self.relay.inside():
                set_features(interface, before)


class Load:
    """Numbered datagrams out of s0."""

    def __init__(self, lab: Lab) -> None:
        self._program = lab.numbered.program("source")
        self._state = SourceState.from_buffer(lab.numbered.map("source_state").memory())
        self._inside = lab.source.inside
        with self._inside():
            self._ifindex = socket.if_nametoindex("s0")
        self._frame = frame(Stream("10.99.0.0", GROUP, PORT), PAYLOAD)

    def run(self, count: int, pps: float, flows: int = 1, batch: int = 1) -> int:
        """Send `count` datagrams of `flows` flows in turn, `pps` a second, from a core of its own; how many.

        They leave `batch` at a time. The kernel waits some tens of ms before and after.
        """
        state, head = self._state, self._frame[:44]
        state.head[:] = head
        state.ip_sum, state.udp_sum = (~int.from_bytes(head[at : at + 2], sys.byteorder) for at in (24, 40))
        state.next, state.gap, state.count = 0, round(1e9 / pps), 0
        state.flows, state.ifindex = flows, self._ifindex
        with self._inside(), ThreadPoolExecutor(1) as core:  # its thread starts in this namespace
            core.submit(self._send, count, batch).result()
        return int(state.count)

    def _send(self, count: int, batch: int) -> None:
        os.sched_setaffinity(0, {LOAD_CORE})
        self._program.test_run(self._frame, count, batch)


@dataclass(frozen=True)
class Outcome:
    """What became of `sent` numbers. `late`: datagrams that a later one of their flow overtook, with how much
    later than it they came. Delays in ns, by path."""

    sent: int
    lost: int
    doubled: int
    late: NDArray[np.uint64]
    slow: NDArray[np.uint32]
    fast: NDArray[np.uint32]

    @property
    def mixed(self) -> bool:
        """Whether both paths had a part in it."""
        return len(self.slow) > 0 and len(self.fast) > 0

    @property
    def window(self) -> float:
        """The longest lateness in µs."""
        return float(self.late.max(initial=0)) / 1000


class Tallies:
    """What the sink wrote down."""

    def __init__(self, numbered: Object) -> None:
        memory = numbered.map("tallies").memory()
        self._rows = np.frombuffer(memory, TALLY, NUMBERS * OUTPUTS).reshape(OUTPUTS, NUMBERS)
        self._state = (SinkState * OUTPUTS).from_buffer(numbered.map("sink_state").memory())

    def clear(self, action: int = TC_ACT_SHOT) -> None:
        """Start anew; `action` is what the sink does with a datagram after noting it."""
        self._rows[:] = 0
        self._state[:] = [SinkState(0, 0, action)] * OUTPUTS

    def frames(self, output: int) -> tuple[int, int]:
        """Frames and datagrams that came in on r1 (0) or r2 (1)."""
        return int(self._state[output].frames), int(self._state[output].datagrams)

    def outcome(self, sent: int, flows: int = 1, output: int = 0) -> Outcome:
        """Of the numbers 0 … sent - 1, which went round `flows` flows."""
        rows = self._rows[output, : -(-sent // flows) * flows].copy()
        copies = rows["slow"].astype(int) + rows["fast"]
        arrived = np.where(copies > 0, rows["arrived"], _NEVER).reshape(-1, flows)
        # the earliest arrival of any later number of the flow
        later = np.minimum.accumulate(arrived[::-1])[::-1][1:]
        late = (arrived[:-1] > later) & (arrived[:-1] != _NEVER)
        return Outcome(
            sent,
            int((copies[:sent] == 0).sum()),
            int((copies > 1).sum()),
            (arrived[:-1] - later)[late],
            rows["delay"][(rows["slow"] > 0) & (rows["fast"] == 0)],
            rows["delay"][(rows["fast"] > 0) & (rows["slow"] == 0)],
        )
