"""The load and the count: paced UDP frames from the kernel or from a socket, and a sink that counts datagrams.

Owns the kernel programs of load.bpf.c and their maps; measure.py drives them. `XdpSource` runs a program on live
frames: it rewrites each frame's headers from a table (the receiving side may have changed them), goes through that
flow by flow, writes the time into the payload, and paces itself in the kernel, so that Python's speed is no
matter. Frames carry right checksums, for GRO merges only such as have one, and DF unless told otherwise, as from
Linux senders. `UdpSource` sends from a socket, a frame a datagram or merged by UDP_SEGMENT. Leaving `offering`
ends the load.
"""

import contextlib
import errno
import functools
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np

import histogram
import lab as labs
import scheduling
from live import compiled, run_live
from mrelay.kernel import bpf, libbpf
from mrelay.traffic.mmsg import SendBatch
from mrelay.traffic.stream import new_stream_id

HEADERS: Final = 14 + 20 + 8  # Ethernet, IPv4, UDP
BURST: Final = 64  # frames that leave together, unless told otherwise
LONGEST: Final = 3400  # bytes of payload: a live frame has to fit a page, with the kernel's own
_INTERFACES: Final = 2048  # load.bpf.c, for all of these
_LOAD: Final = [("next", "<u8"), ("gap", "<u8"), ("sent", "<u8"), ("stop", "<u8"), ("flows", "<u4"),
                ("flow", "<u4"), ("ifindex", "<u4"), ("pad", "<u4", 5), ("timed", "<u4")]  # fmt: skip
_HEAD: Final = [("bytes", "u1", 48), ("sum", "<u8")]
_TALLY: Final = [(name, "<u8") for name in ("datagrams", "bytes", "frames", "first", "last")]
_UNSUMMED: Final = (1 << 64) - 1
_UDP_SEGMENT: Final = 103  # linux/udp.h
_START: Final = 10.0  # seconds
_DRAIN: Final = 0.15  # seconds for what is under way


Enter = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Flow:
    """What a source sends: addresses as text, ports as numbers."""

    source: str
    group: str
    port: int


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(flow: Flow, payload: int, *, df: bool = True) -> bytes:
    """An Ethernet frame of `flow` with `payload` zero bytes, TTL 16, checksums complete."""
    source, group = socket.inet_aton(flow.source), socket.inet_aton(flow.group)
    ethernet = bytes((1, 0, 0x5E, group[1] & 0x7F, group[2], group[3])) + b"\2\0\0\0\0\1\x08\0"
    fragment = 0x4000 if df else 0  # RFC 791 §3.1
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28 + payload, 0, fragment, 16, 17, 0) + source + group
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    udp = struct.pack("!HHHH", 4000, flow.port, 8 + payload, 0)
    pseudo = source + group + struct.pack("!HH", 17, 8 + payload)
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp) or 0xFFFF)
    return ethernet + ip + udp + bytes(payload)


@functools.cache
def _elf() -> bytes:
    return compiled(Path(__file__).with_name("load.bpf.c"))


class Programs:
    """Source and sink, loaded, for frames with at least `payload` bytes. A context manager."""

    def __init__(self, payload: int, flows: int = 1) -> None:
        self.payload, self.indexes, self._stack = payload, list[int](), ExitStack()
        try:
            self._load(flows)
        except BaseException:
            self._stack.close()
            raise

    def _load(self, flows: int) -> None:
        made = self._stack.enter_context(libbpf.Object(_elf(), "load"))
        made.set_max_entries("heads", flows)
        made.set_constants(payload=self.payload)
        made.load()
        self.source, self._sink, self._pass = (
            self._kept(made.program_fd(name)) for name in ("source", "sink", "pass")
        )
        self.load = self._array(made, "load", 1, _LOAD)
        self.heads = self._array(made, "heads", flows, _HEAD)
        self.tallies = self._array(made, "tallies", _INTERFACES, _TALLY)
        self.delays, self.gaps = (self._array(made, name, histogram.BUCKETS, "<u8") for name in ("delays", "gaps"))

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

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unload; closing twice is fine."""
        self._stack.close()

    def keep_polling(self, ifindex: int) -> None:
        """A veth of the caller's namespace takes XDP's frames without GRO, too: while there is an XDP program."""
        try:
            link = libbpf.attach_xdp(self._pass, ifindex)
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: the relay has one there
                raise
        else:
            self._stack.callback(link.close)

    # ---- the sink ----------------------------------------------------------------------------------

    def attach(self, ifindexes: Sequence[int]) -> None:
        """Count at these interfaces of the caller's namespace, one an output."""
        for ifindex in ifindexes:
            self._stack.callback(libbpf.attach_ingress(self._sink, ifindex).close)
        self.indexes += ifindexes

    def datagrams(self) -> list[int]:
        """So far, for each output, by the kernel's count of segments."""
        return [int(n) for n in self.tallies["datagrams"][self.indexes]]

    def payload_bytes(self) -> list[int]:
        """Of these, for each output."""
        return [int(n) for n in self.tallies["bytes"][self.indexes]]

    def frames(self) -> int:
        """All so far as they came, merged ones as one."""
        return int(self.tallies["frames"][self.indexes].sum())

    def first(self) -> int:
        """CLOCK_MONOTONIC of the first that came since `forget`, ns; 0 when none did."""
        return int(self.tallies["first"][self.indexes].max())

    def sink_seconds(self) -> float:
        """What it takes the sink to count a frame; NaN for frames too long to try that."""
        if self.payload > LONGEST:
            return math.nan
        trial = frame(Flow(labs.SOURCE_ADDRESS, "239.0.0.1", 1), self.payload)
        counted = self.tallies.copy()
        taken = libbpf.test_run(self._sink, trial, repeat=10_000).nanoseconds / 1e9
        self.tallies[:] = counted
        return taken

    def forget(self) -> None:
        """Count anew."""
        for array in (self.tallies, self.delays, self.gaps):
            array[:] = 0

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """`delays` and `gaps` are kept for the block."""
        self.load["timed"] = 1
        try:
            yield
        finally:
            self.load["timed"] = 0

    def drained(self) -> None:
        """Return when nothing more comes."""
        before = -1
        while (now := sum(self.datagrams())) != before:
            before = now
            time.sleep(_DRAIN)


class Source(Protocol):
    """What sends."""

    @property
    def sent(self) -> int:
        """Datagrams so far."""

    def offering(self, pps: float, seconds: float) -> contextlib.AbstractContextManager[None]:
        """`pps` datagrams a second for `seconds`, but no longer than the block, from a thread on this core."""


class XdpSource:
    """Sends `frames`, all of one length and with zeros as payload, in turn, `burst` at a time.

    Out of `interface` of the namespace that `enter` brings a thread into.
    """

    def __init__(
        self, programs: Programs, frames: Sequence[bytes], interface: str, enter: Enter, *, burst: int = BURST
    ) -> None:
        self._programs, self._burst, self._frame, self._enter = programs, burst, frames[0], enter
        for index, each in enumerate(frames):
            (check,) = struct.unpack_from("<H", each, HEADERS - 2)
            programs.heads["bytes"][index] = np.frombuffer(each[:48], "u1")
            programs.heads["sum"][index] = ~check & 0xFFFF if check else _UNSUMMED
        programs.load["flows"], programs.load["flow"] = len(frames), 0
        with enter():
            programs.load["ifindex"] = socket.if_nametoindex(interface)

    @property
    def sent(self) -> int:
        """Frames offered to the interface so far."""
        return int(self._programs.load["sent"][0])

    @contextlib.contextmanager
    def offering(self, pps: float, seconds: float) -> Iterator[None]:
        """See Source."""
        load = self._programs.load
        load["gap"], load["next"], load["stop"] = round(1e9 / pps), time.monotonic_ns(), 0
        thread = threading.Thread(target=self._send, args=(int(pps * seconds),), daemon=True)
        before, deadline = self.sent, time.monotonic() + _START
        with _above(thread):
            try:
                while self.sent == before and thread.is_alive() and time.monotonic() < deadline:
                    time.sleep(0.0005)  # the kernel makes ready first, the longer the busier it is
                yield
            finally:
                load["stop"] = 1  # by now all is sent, unless it was more than it can

    def _send(self, frames: int) -> None:
        with scheduling.real_time(1):
            self.send(frames)

    def send(self, frames: int) -> None:
        """Send so many as the calling thread, at the pace that was set last (at first: at once)."""
        with self._enter():
            run_live(self._programs.source, self._frame, frames, self._burst)


class UdpSource:
    """One flow from a socket, `BURST` datagrams a system call. `merged`: one frame for many (UDP_SEGMENT)."""

    def __init__(self, lab: labs.Lab, flow: Flow, payload: int, *, merged: bool = False) -> None:
        self._merged, self.sent = merged, 0
        count = min(BURST, 65000 // payload) if merged else BURST
        self._batch = SendBatch(new_stream_id(), payload, count)
        with labs.inside(lab.source):
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 16)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        if merged:
            self._sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, payload)
        self._sock.connect((flow.group, flow.port))
        self._stop = False

    @contextlib.contextmanager
    def offering(self, pps: float, seconds: float) -> Iterator[None]:
        """See Source."""
        self._stop = False
        thread = threading.Thread(target=self._send, args=(pps, seconds), daemon=True)
        with _above(thread):
            try:
                yield
            finally:
                self._stop = True

    def _send(self, pps: float, seconds: float) -> None:
        with scheduling.real_time(1):
            start, sent, total = time.monotonic(), 0, int(pps * seconds)
            while sent < total and not self._stop:
                count = min(self._batch.count, total - sent)
                while time.monotonic() < start + sent / pps:
                    pass
                send = self._batch.send_merged if self._merged else self._batch.send
                sent += send(self._sock, count)
                self.sent += count


@contextlib.contextmanager
def _above(thread: threading.Thread) -> Iterator[None]:
    """The thread runs; the caller, who shares its core, comes before it, for it must wake to count."""
    with scheduling.real_time(2):
        thread.start()
        try:
            yield
        finally:
            thread.join()
