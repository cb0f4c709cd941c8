"""Three network namespaces of our own: source - relay - sink, one veth in and N out.

Owns the namespaces and everything in them, named after this process; relay_bench.py makes one for every
measurement and always removes it. Interfaces: `s0` to `r0` (10.200.0.0/24), `rN` to `dN`
(10.200.N.0/24). Every function runs `ip` or `ethtool` and waits for it.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

SOURCE_ADDRESS: Final = "10.200.0.1"
INGRESS_ADDRESS: Final = "10.200.0.2"
_CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)


def egress_address(output: int) -> str:
    """The relay's address on output 1, 2, …"""
    return f"10.200.{output}.1"


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread's sockets and interface numbers are those of `namespace` for the block."""
    home, there = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(there)
        yield
    finally:
        _enter(home)
        os.close(home)
        os.close(there)


@contextlib.contextmanager
def real_time(priority: int) -> Iterator[None]:
    """This thread runs before all others: the load is the outside world's, other work must not change it."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class Lab:
    """The three namespaces, as a context manager."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.source, self.relay, self.sink = (f"mrb{os.getpid()}-{x}" for x in ("src", "rel", "dst"))
        self.sinks = [f"d{i}" for i in range(1, outputs + 1)]

    def __enter__(self) -> Self:
        try:
            for namespace in (self.source, self.relay, self.sink):
                _run("ip", "netns", "add", namespace)
                _ip(f"-n {namespace} link set lo up")
                # No neighbour discovery or MLD in the counts.
                _exec(namespace, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
            _ip(f"link add s0 netns {self.source} type veth peer name r0 netns {self.relay}")
            _up(self.source, "s0", SOURCE_ADDRESS)
            _up(self.relay, "r0", INGRESS_ADDRESS)
            for i, sink in enumerate(self.sinks, 1):
                _ip(f"link add r{i} netns {self.relay} type veth peer name {sink} netns {self.sink}")
                _up(self.relay, f"r{i}", egress_address(i))
                _up(self.sink, sink, f"10.200.{i}.2")
            _ip(f"-n {self.source} route add 224.0.0.0/4 dev s0")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces, and with them the interfaces."""
        for namespace in (self.source, self.relay, self.sink):
            if Path(f"/run/netns/{namespace}").exists():
                _run("ip", "netns", "delete", namespace)

    def sink_indexes(self) -> list[int]:
        """Interface numbers of d1 … dN, in the sink namespace."""
        with inside(self.sink):
            return [socket.if_nametoindex(name) for name in self.sinks]

    def gro(self) -> None:
        """GRO on at ingress and sinks: gives a veth its NAPI, which XDP frames and threading need."""
        for namespace, name in self._receivers():
            _exec(namespace, "ethtool", "-K", name, "gro", "on")

    def gro_forwarding(self) -> None:
        """UDP GRO on at ingress, for relays that expect to be given merged frames."""
        _exec(self.relay, "ethtool", "-K", "r0", "gro", "on", "rx-udp-gro-forwarding", "on")

    def thread_napi(self, core: int) -> None:
        """Receive work of ingress and sinks in kernel threads on `core`: relay and sink share one core."""
        for namespace, name in self._receivers():
            before = _napi_threads(name)
            # /sys shows the namespace that mounted it, so this needs `ip netns exec`.
            _exec(namespace, "sh", "-c", f"echo 1 > /sys/class/net/{name}/threaded")
            for pid in _napi_threads(name) - before:
                os.sched_setaffinity(pid, {core})
                os.setpriority(os.PRIO_PROCESS, pid, -20)  # see systems.py, _prefer

    def _receivers(self) -> list[tuple[str, str]]:
        return [(self.relay, "r0"), *((self.sink, name) for name in self.sinks)]


def _napi_threads(interface: str) -> set[int]:
    """Kernel threads `napi/<interface>-<id>`; other namespaces may have such too."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if (process / "comm").read_text().startswith(f"napi/{interface}-"):
                found.add(int(process.name))
    return found


def _up(namespace: str, interface: str, address: str) -> None:
    _ip(f"-n {namespace} address add {address}/24 dev {interface}")
    _ip(f"-n {namespace} link set {interface} up")


def _ip(arguments: str) -> None:
    _run("ip", *arguments.split())


def _exec(namespace: str, *command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
