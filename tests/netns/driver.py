"""What tests of XDP share: a star whose links can do it, and waiting until it carries a flow.

Sources send whole checksums (`ethtool -K s0 tx off`), as a network does; a veth takes frames from XDP while its
peer has GRO on, which gives that its NAPI.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from mrelay.ebpf import load
from mrelay.kernel import libbpf, netdev
from netns.lab import Lab, Namespace, Star, eventually
from netns.relay import Relay
from netns.traffic import PROBE, Sender

XDP: Final = '[relay]\nengine = "ebpf"\nxdp = true\n\n'


def require() -> None:
    """Skip where there is no XDP for us, by name of what lacks."""
    for lacking in (libbpf.available(), load.missing()):
        if lacking:
            pytest.skip(lacking)
    try:
        netdev.Watch().close()
    except OSError as error:
        pytest.skip(f"needs generic netlink's family netdev (Linux 6.3): {error}")


def xdp_star(lab: Lab, outputs: int, *, mtu: int = 1500) -> Star:
    """One whose outputs take frames from XDP."""
    made = lab.star(outputs, mtu=mtu)
    made.source.run("ethtool", "-K", "s0", "tx", "off")
    for i in range(outputs):
        made.sink.run("ethtool", "-K", f"k{i}", "gro", "on")
    return made


@contextmanager
def piling_up(star: Star) -> Iterator[None]:
    """What is sent at once piles up before in0, until we wait: a thread receives, on our core, when it is idle."""
    star.relay.run("sh", "-c", "echo 1 > /sys/class/net/in0/threaded")
    before = os.sched_getaffinity(0)
    core = {min(before)}
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if comm.read_text().startswith("napi/in0-"):
                os.sched_setaffinity(int(comm.parent.name), core)
                os.sched_setscheduler(int(comm.parent.name), os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(0, core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def counted(namespace: Namespace, interface: str, name: str) -> int:
    """One of an interface's statistics. A veth counts in `rx_packets` what its NAPI has taken, if it has one."""
    return int(namespace.run("cat", f"/sys/class/net/{interface}/statistics/{name}"))


def engines(relay: Relay) -> dict[str, tuple[str, str]]:
    """Which engine carries each flow, and why not a faster one, by group."""
    return {flow["group"]: (flow["engine"], flow["why"]) for flow in relay.flows()}


def await_engine(relay: Relay, sender: Sender, group: str, engine: str, why: str = "") -> None:
    """Send to the group, a probe at a time, until this engine carries the flow, for this reason.

    Each probe is counted by then, but its copies may still be on their way to receivers.
    """
    before, sent = relay.stats()["received"], itertools.count()

    def is_there() -> object:
        sender.send(group, 5000, [PROBE])
        next(sent)
        found = engines(relay).get(group, ("", ""))
        return found if found[0] == engine and why in found[1] else None

    eventually(is_there, f"{group} is carried by {engine}, {why!r}")
    wanted = before + next(sent)
    relay.await_stats(lambda stats: stats["received"] >= wanted, f"received >= {wanted}")
