"""The network and the load of poc_io_uring_af_packet: a veth pair, a source on one core, receivers on another.

Owns two nameless namespaces, which end with the process. The receiving interface's NAPI runs in a kernel
thread on the receivers' core, so that what a receiver costs the kernel there is seen, and the source has its
core for itself (bench/traffic.py: XDP frames, paced by the kernel). Blocks for some tens of milliseconds.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # the XDP source
from mrelay.demo.topology import End, Namespace, connect
from traffic import Flow, Programs, XdpSource, frame

FLOW: Final = Flow("10.99.0.1", "239.1.1.1", 5000)
# /sys shows the namespace that mounted it: a mount of our own, gone with the shell
_THREADED: Final = "mount -t sysfs none /sys && echo 1 > /sys/class/net/in0/threaded"


class Network:
    """`source` holds out0, `relay` holds in0 with its NAPI on a thread. A context manager."""

    def __init__(self, source_core: int, relay_core: int, *, merge: bool = False) -> None:
        """`merge`: UDP GRO forwarding on in0. OSError or CalledProcessError when the kernel refuses."""
        self.source_core, self.relay_core = source_core, relay_core
        self.source, self.relay = Namespace(), Namespace()
        for namespace in (self.source, self.relay):
            namespace.sysctl("ipv6/conf/default/disable_ipv6", 1)  # no frames of the kernel's own
        connect(End(self.source, "out0", "10.99.0.1"), End(self.relay, "in0", "192.0.2.1"))
        before = _napi_threads()
        merging = ["rx-udp-gro-forwarding", "on"] if merge else []
        with self.relay.inside():
            _run("ethtool", "-K", "in0", "gro", "on", *merging)
            _run("unshare", "--mount", "sh", "-c", _THREADED)
        (self.napi,) = _napi_threads() - before
        os.sched_setaffinity(self.napi, {self.relay_core})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (self.source, self.relay):
            os.close(namespace.fd)

    def sender(self) -> socket.socket:
        """A raw socket on the source's interface, for single frames."""
        with self.source.inside():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sock.bind(("out0", 0))
        return sock

    @contextlib.contextmanager
    def offering(self, payload: int, pps: float, seconds: float) -> Iterator[None]:
        """Frames of one flow meanwhile, from the source's core; this thread is on the receivers' one."""
        with Programs(payload) as programs:
            os.sched_setaffinity(0, {self.source_core})
            source = XdpSource(programs, [frame(FLOW, payload)], "out0", self.source.inside)
            with source.offering(pps, seconds):
                os.sched_setaffinity(0, {self.relay_core})
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # only the source is real-time
                yield

    def napi_seconds(self) -> float:
        """Processor time that the kernel's receive thread has used."""
        return int(Path(f"/proc/{self.napi}/schedstat").read_text().split()[0]) / 1e9


def _napi_threads() -> set[int]:
    """Kernel threads napi/in0-<id>; other namespaces may have such too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if (process / "comm").read_text().startswith("napi/in0-"):
                found.add(int(process.name))
    return found


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)
