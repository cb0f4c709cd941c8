"""Three network namespaces of our own: source - relay - sink, one veth in and N out, and who works on which core.

Owns the namespaces and everything in them, named after this process; a measurement makes a `Lab` and always
removes it. Interfaces: `s0` to `r0` (10.200.0.0/24), `rN` to `dN` (10.200.N.0/24; N = 1, 2, …). Every function
runs `ip` or `ethtool` and waits for it.
"""

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import scheduling

SOURCE_ADDRESS: Final = "10.200.0.1"
INGRESS_ADDRESS: Final = "10.200.0.2"
HOSTS: Final = "10.201.0.0/16"  # unicast receivers, all behind d1
BACKLOG: Final = Path("/proc/sys/net/core/netdev_max_backlog")  # frames
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_serial = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def egress_address(output: int) -> str:
    """The relay's address on output 1, 2, …"""
    return f"10.200.{output}.1"


@dataclass(frozen=True)
class Cores:
    """Who works where. `second`: for a second worker; None where there is no core left for one."""

    source: int
    relay: int
    sink: int
    second: int | None

    @classmethod
    def chosen(cls, usable: set[int]) -> Self:
        """ValueError where there are not two. With two, relay and sink share one."""
        cores = sorted(usable)
        if len(cores) < 2:
            raise ValueError(f"needs two cores, may use {cores}; remedy: run it where there are two")
        return cls(
            cores[0], cores[1], cores[2] if len(cores) > 2 else cores[1], cores[3] if len(cores) > 3 else None
        )

    @property
    def shared(self) -> bool:
        """Whether relay and sink are on one."""
        return self.relay == self.sink


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread's sockets and interface numbers are those of `namespace` for the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        yield
    finally:
        _enter(home)
        os.close(home)
        os.close(there)


class Lab:
    """The three namespaces, as a context manager. `segment`: the interfaces out of the relay segment for it."""

    def __init__(self, outputs: int = 1, *, mtu: int = 1500, segment: bool = True) -> None:
        self.outputs, self._mtu, self._segment = outputs, mtu, segment
        label = f"mrb{os.getpid()}-{next(_serial)}"
        self.source, self.relay, self.sink = (f"{label}-{x}" for x in ("src", "rel", "dst"))
        self.sinks = [f"d{i}" for i in range(1, outputs + 1)]
        self.napi: dict[str, int] = {}  # kernel threads that receive, by interface: see `thread_napi`

    def __enter__(self) -> Self:
        try:
            self._make()
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

    def _make(self) -> None:
        for namespace in (self.source, self.relay, self.sink):
            _run("ip", "netns", "add", namespace)
            with inside(namespace):
                Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")  # no MLD in the counts
            _ip(namespace, "link set lo up")
        pairs = [(f"r{i}", sink) for i, sink in enumerate(self.sinks, 1)]
        mtu, relay = self._mtu, self.relay
        _ip(self.source, f"link add s0 mtu {mtu} type veth peer name r0 mtu {mtu} netns {relay}")
        _ip(
            relay,
            *(f"link add {r} mtu {mtu} type veth peer name {d} mtu {mtu} netns {self.sink}" for r, d in pairs),
        )
        self._address(pairs)
        # NAPI, which XDP frames and threads need: a veth has it while GRO is on. Merging UDP is another feature.
        _shell(self.relay, "ethtool -K r0 gro on")
        _shell(self.sink, *(f"ethtool -K {name} gro on" for name in self.sinks))
        if not self._segment:
            _shell(self.relay, *(f"ethtool -K {r} tx-udp-segmentation off" for r, _ in pairs))

    def _address(self, pairs: list[tuple[str, str]]) -> None:
        _ip(self.source, *_up("s0", SOURCE_ADDRESS), "route add 224.0.0.0/4 dev s0")
        egress = [line for i, (r, _) in enumerate(pairs, 1) for line in _up(r, egress_address(i))]
        _ip(self.relay, *_up("r0", INGRESS_ADDRESS), *egress)
        _ip(self.sink, *(line for i, (_, d) in enumerate(pairs, 1) for line in _up(d, f"10.200.{i}.2")))
        _ip(self.relay, f"route add {HOSTS} via 10.200.1.2")

    def sink_indexes(self) -> list[int]:
        """Interface numbers of d1 … dN, in the sink's namespace."""
        with inside(self.sink):
            return [socket.if_nametoindex(name) for name in self.sinks]

    def gro_forwarding(self) -> None:
        """UDP GRO on at ingress, for relays that expect to be given merged frames."""
        _shell(self.relay, "ethtool -K r0 rx-udp-gro-forwarding on")

    def gro_off(self) -> None:
        """No GRO at ingress, of any kind. Only with an XDP program there it takes frames from XDP now."""
        _shell(self.relay, "ethtool -K r0 gro off")

    def thread_napi(self, cores: Cores) -> None:
        """Ingress receives in a kernel thread on the relay's core, next when it wakes, as softirqs would be.

        What the relay sends is received where it sends, unless the sink has a core of its own: then there.
        """
        self._thread(self.relay, ["r0"], cores.relay)
        if not cores.shared:
            self._thread(self.sink, self.sinks, cores.sink)  # for XDP's frames; RPS is for all others
            _shell(
                self.sink,
                *(f"echo {1 << cores.sink:x} >/sys/class/net/{d}/queues/rx-0/rps_cpus" for d in self.sinks),
            )

    def steer(self, core: int) -> None:
        """Frames that a socket sent are handled on the relay's core, too (RPS): they come without NAPI."""
        _shell(self.relay, f"echo {1 << core:x} >/sys/class/net/r0/queues/rx-0/rps_cpus")

    def _thread(self, namespace: str, names: list[str], core: int) -> None:
        before = _napi_threads()
        # /sys shows the namespace that mounted it, so this needs `ip netns exec`.
        _shell(namespace, *(f"echo 1 >/sys/class/net/{name}/threaded" for name in names))
        for pid, name in _napi_threads().items():
            if pid not in before and name in names:
                os.sched_setaffinity(pid, {core})
                scheduling.prompt(pid)
                self.napi[name] = pid


@contextlib.contextmanager
def long_backlog(frames: int = 16_384) -> Iterator[None]:
    """The queue of each core to the sinks (net.core.netdev_max_backlog, host-wide) is so long for the block.

    1,000, the default, is less than one poll of 64 frames makes for 16 outputs, and 10 ms of 100,000 a second.
    """
    before = BACKLOG.read_text()
    BACKLOG.write_text(str(frames))
    try:
        yield
    finally:
        BACKLOG.write_text(before)


@contextlib.contextmanager
def room_for_sinks(cores: Cores) -> Iterator[None]:
    """A long queue to the sinks, and the thread that empties it when softirqs are late has its share.

    That is as large as the relay's: else what it has sent is lost on a shared core.
    """
    with long_backlog(), scheduling.softirqs_preferred({cores.relay, cores.sink}):
        yield


def _napi_threads() -> dict[int, str]:
    """Kernel threads `napi/<interface>-<id>`, with the interface's name; other namespaces may have such too."""
    return {pid: name[5:].rpartition("-")[0] for pid, name in scheduling.threads() if name.startswith("napi/")}


def _up(interface: str, address: str) -> tuple[str, str]:
    return f"address add {address}/24 dev {interface}", f"link set {interface} up"


def _ip(namespace: str, *lines: str) -> None:
    _run("ip", "-n", namespace, "-batch", "-", text="\n".join(lines))


def _shell(namespace: str, *lines: str) -> None:
    _run("ip", "netns", "exec", namespace, "sh", "-e", "-c", "\n".join(lines))


def _run(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}: {done.stderr.strip() or done.stdout.strip()}")
