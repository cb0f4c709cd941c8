"""The network of poc_gro_gso, and the frames that it is loaded with.

Owns the namespaces (which vanish with this process), their links' offload switches and the load.
Interfaces: s0 to r0 (10.200.0.0/24), rN to dN (10.200.N.0/24). `Load` sends from a thread on a core of its
own; leaving `Load.running` waits until all is sent, which is a matter of tenths of a second.
"""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Final, Self

from mrelay.demo.topology import End, Namespace, connect
from mrelay.kernel.ethtool import features, set_features
from traffic import HEADERS, Flow, Programs, XdpSource, checksum, frame

SOURCE: Final = "10.200.0.1"
GROUP, PORT = "239.1.1.1", 5000  # of the first flow
OUT_GROUP, OUT_PORT = "239.2.1.1", 6000  # where the relay sends it
LOAD_CORE, RELAY_CORE = 0, 1
POLL: Final = 64  # frames of the load that arrive in one poll of NAPI, which is also its budget
# Offloads, as ethtool names them.
FORWARDING: Final = "rx-udp-gro-forwarding"
UDP_SEGMENTATION: Final = "tx-udp-segmentation"
GENERIC_SEGMENTATION: Final = "tx-generic-segmentation"
CHECKSUMMING: Final = "tx-checksum-ip-generic"


def flows(count: int, run: int = 1) -> list[Flow]:
    """`count` flows, one source's to 239.1.1.1, 239.1.1.2, … and one port; each `run` times in a row."""
    return [Flow(SOURCE, f"239.1.1.{n + 1}", PORT) for n in range(count) for _ in range(run)]


class Lab:
    """Source, relay and sink; `outputs` links from relay to sink."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            self.source, self.relay, self.sink = (on_failure.enter_context(Namespace()) for _ in range(3))
            self._build()
            self._stack = on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        for namespace in (self.source, self.relay, self.sink):
            with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                namespace.sysctl("ipv6/conf/default/disable_ipv6", 1)  # no MLD in the counts
            namespace.bring_up("lo")
        connect(End(self.source, "s0", SOURCE), End(self.relay, "r0", "10.200.0.2"))
        for n in range(1, self.outputs + 1):
            connect(End(self.relay, f"r{n}", f"10.200.{n}.1"), End(self.sink, f"d{n}", f"10.200.{n}.2"))
        self.switch(self.relay, "r0", {"rx-gro": True})  # gives a veth its NAPI

    def switch(self, namespace: Namespace, interface: str, wanted: dict[str, bool]) -> None:
        """Set offloads; RuntimeError when one does not come into force."""
        with namespace.inside():
            set_features(interface, wanted)
            have = features(interface)
        wrong = [name for name, on in wanted.items() if name not in have or have[name].active != on]
        if wrong:
            raise RuntimeError(f"{interface}: {', '.join(wrong)} cannot be set")

    def merge(self, *, on: bool) -> None:
        """UDP GRO forwarding at ingress; off is how Linux comes."""
        self.switch(self.relay, "r0", {FORWARDING: on})

    def offload(self, *, segmentation: bool = True, generic: bool = True, checksums: bool = True) -> None:
        """What the egress interfaces say that they can do."""
        wanted = {CHECKSUMMING: checksums, GENERIC_SEGMENTATION: generic, UDP_SEGMENTATION: segmentation}
        for n in range(1, self.outputs + 1):
            self.switch(self.relay, f"r{n}", wanted)

    def sink_indexes(self) -> list[int]:
        """Interface numbers of d1, d2, … in the sink namespace, where the caller is."""
        return [socket.if_nametoindex(f"d{n}") for n in range(1, self.outputs + 1)]


class Load:
    """Frames out of s0, `turns` in turn, from an XDP program on LOAD_CORE: POLL of them arrive at once."""

    def __init__(
        self, lab: Lab, turns: list[Flow], payload: int, pps: float, *, df: bool = True, checked: bool = True
    ) -> None:
        self._programs = Programs(payload, len(turns))
        self._programs.load["gap"] = round(1e9 / pps)
        frames = [_altered(frame(flow, payload), df, checked) for flow in turns]
        self._source = XdpSource(self._programs, frames, "s0", lab.source.inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._programs.close()

    @contextlib.contextmanager
    def running(self, frames: int) -> Iterator[threading.Thread]:
        """Send `frames` frames meanwhile. The thread ends when the last is on its way."""
        thread = threading.Thread(target=self._send, args=(frames,))
        thread.start()
        try:
            yield thread
        finally:
            thread.join()

    def send(self, frames: int) -> None:
        """Send `frames` frames and wait for it."""
        with self.running(frames):
            pass

    def _send(self, frames: int) -> None:
        os.sched_setaffinity(0, {LOAD_CORE})  # of this thread
        self._source.send(frames)


def _altered(data: bytes, df: bool, checked: bool) -> bytes:
    """The frame with DF and the UDP checksum, as it is, or without."""
    ip, udp = bytearray(data[14:34]), bytearray(data[34:HEADERS])
    if not df:
        ip[6:8] = ip[10:12] = bytes(2)
        ip[10:12] = struct.pack("!H", checksum(bytes(ip)))
    if not checked:
        udp[6:8] = bytes(2)  # RFC 768: the sender made none
    return data[:14] + ip + udp + data[HEADERS:]
