"""A load that numbers its datagrams and a sink that ticks the numbers off, both in the kernel (numbered.bpf.c).

Python could neither send nor count 100,000 datagrams a second beside the relay. Owns the programs and their maps;
`Load` is a thread that blocks in the kernel until all is sent, or `stop`.
"""

import os
import socket
import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from lab import BACKLOG, long_backlog  # bench/lab.py
from live import compiled as compiled_source  # bench/live.py
from live import run_live
from mrelay.ebpf import load
from mrelay.kernel import bpf, libbpf
from netns import frames
from netns.lab import Namespace, Star, eventually

PORT, FIRST_PORT = 5000, 6000  # in; out, of the first output
NUMBERS, OUTPUTS, FLOWS = 1 << 20, 2, 1024  # numbered.bpf.c
MOST_FLOWS: Final = FLOWS
_HEADERS: Final = 42
_SIZES: Final = {  # name: entries and the element's dtype
    "state": (1, [("next", "<u8"), ("gap", "<u8"), ("count", "<u8"), ("stop", "<u8"), ("flows", "<u4"),
                  ("ifindex", "<u4"), ("ip_sum", "<u2"), ("udp_sum", "<u2"), ("head", "u1", 44)]),
    "tallies": (NUMBERS * OUTPUTS, [("copies", "<u4"), ("ttl", "<u4")]),
    "came": (OUTPUTS, [("datagrams", "<u8"), ("late", "<u8")]),
    "last": (FLOWS * OUTPUTS, "<u8"),
}  # fmt: skip


def compiled() -> bytes:
    """The object file."""
    return compiled_source(Path(__file__).with_name("numbered.bpf.c"))


class Outcome(NamedTuple):
    """What became of so many numbers on one output. `late`: came after a higher one of their flow."""

    sent: int
    lost: int
    doubled: int
    late: int

    @property
    def perfect(self) -> bool:
        """Each came once, and in order."""
        return self.sent > 0 and not (self.lost or self.doubled or self.late)


class Numbers:
    """Load and sink in one star: source s0, sinks k0 (port 6000) and, if there is one, k1 (port 6001).

    A context manager.
    """

    def __init__(self, elf: bytes, star: Star, outputs: int = 1) -> None:
        self._stack = ExitStack()
        self._star = star
        try:
            # Sinks with RPS are behind the backlog of one CPU, which loses what comes while others have that CPU.
            self._stack.enter_context(long_backlog())
            self._load(elf, outputs)
        except BaseException:
            self._stack.close()
            raise

    def _load(self, elf: bytes, outputs: int) -> None:
        made = self._stack.enter_context(libbpf.Object(elf, "numbers"))
        made.load()
        self._source, sink = (self._kept(made.program_fd(name)) for name in ("source", "sink"))
        self.arrays = {name: self._array(made, name, *size) for name, size in _SIZES.items()}
        with self._star.source.inside():
            self.arrays["state"]["ifindex"] = socket.if_nametoindex("s0")
        # A veth with GRO has NAPI: it takes XDP's frames, and makes one queue of what two CPUs send.
        self._star.relay.run("ethtool", "-K", "in0", "gro", "on")
        for i in range(outputs):
            self._star.sink.run("ethtool", "-K", f"k{i}", "gro", "on")
            # Frames that are no XDP's have a queue for each CPU that sends; with RPS they have one.
            self._star.sink.run("sh", "-c", f"echo 1 >/sys/class/net/k{i}/queues/rx-0/rps_cpus")
            with self._star.sink.inside():
                link = libbpf.attach_ingress(sink, socket.if_nametoindex(f"k{i}"))
            assert isinstance(link, libbpf.TcxLink)
            self._stack.callback(link.close)

    def _kept(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _array(self, made: libbpf.Object, name: str, entries: int, dtype: Any) -> Any:
        fd = made.map_fd(name)
        memory = bpf.map_memory(fd, entries * np.dtype(dtype).itemsize)
        os.close(fd)
        return np.frombuffer(memory, dtype, entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, group: str, pps: int, *, flows: int = 1, seconds: float = 10.0, size: int = 200) -> "Load":
        """To be started: so many datagrams a second, of `flows` sources in turn; the numbers begin anew."""
        for array in ("tallies", "came", "last"):
            self.arrays[array][:] = 0
        frame = frames.ethernet(
            frames.multicast_mac(group),
            frames.ipv4("10.99.0.0", group, frames.udp("10.99.0.0", group, 4000, PORT, bytes(size))),
        )
        (state,) = self.arrays["state"]
        state["gap"], state["count"], state["stop"], state["next"] = round(1e9 / pps), 0, 0, 0
        state["flows"] = flows
        state["head"][:_HEADERS] = np.frombuffer(frame[:_HEADERS], "u1")
        (ip_sum,), (udp_sum,) = struct.unpack_from("<H", frame, 24), struct.unpack_from("<H", frame, 40)
        state["ip_sum"], state["udp_sum"] = ~ip_sum & 0xFFFF, ~udp_sum & 0xFFFF
        return Load(self._source, frame, self.arrays["state"], min(NUMBERS, int(pps * seconds)), self._star.source)

    def came(self, output: int = 0) -> int:
        """Datagrams so far, copies included."""
        return int(self.arrays["came"]["datagrams"][output])

    def tallies(self, output: int = 0) -> Any:
        """By number: copies and TTL."""
        return self.arrays["tallies"][output * NUMBERS : (output + 1) * NUMBERS]

    def outcome(self, sent: int, output: int = 0, *, first: int = 0) -> Outcome:
        """Of the numbers from `first` on, once what is on its way has come."""
        copies = self.tallies(output)["copies"][first:sent]
        while not copies.all() and self._more_come(output):
            pass
        late = int(self.arrays["came"]["late"][output])
        return Outcome(sent - first, int((copies == 0).sum()), int((copies > 1).sum()), late)

    def _more_come(self, output: int) -> bool:
        """Whether any come within a second."""
        before = self.came(output)
        try:
            eventually(lambda: self.came(output) != before, "another datagram", 1.0)
        except AssertionError:
            return False
        return True


class Load(threading.Thread):
    """One run of the load. A context manager: started at entry, over at exit."""

    def __init__(self, program: int, frame: bytes, state: Any, count: int, source: Namespace) -> None:
        super().__init__(daemon=True)
        self._program, self._frame, self._count = program, frame, count
        self._state, self._namespace = state, source
        self._error: BaseException | None = None

    def run(self) -> None:
        """In the source's namespace."""
        try:
            with self._namespace.inside():
                run_live(self._program, self._frame, self._count)
        except BaseException as error:  # noqa: BLE001  it is raised where the test waits
            self._error = error

    @property
    def sent(self) -> int:
        """So far."""
        return int(self._state["count"][0])

    def await_sent(self, more: int) -> int:
        """Return when so many more were sent: how many in all."""
        start = self.sent
        eventually(lambda: self.sent >= start + more or not self.is_alive(), f"{more} more datagrams", 20)
        assert self.is_alive(), f"the load ended too soon: {self._error}"
        return self.sent

    def stop(self) -> int:
        """End it: how many were sent."""
        self._state["stop"] = 1
        self.join(20)
        assert not self.is_alive(), "the load goes on"
        if self._error is not None:
            raise self._error
        return self.sent

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._state["stop"] = 1
        self.join(20)


def why_not() -> str:
    """What this machine lacks for it; empty when nothing."""
    no_backlog = "" if os.access(BACKLOG, os.W_OK) else f"needs {BACKLOG}, writable"
    return libbpf.available() or load.missing() or no_backlog
