"""The supervisor's fast path when the kernel refuses a program, an interface goes, or pins do."""

import errno
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from descriptors import none_leaks
from mrelay.ebpf import layout, load
from mrelay.supervisor.fastpath import FastPath
from netns import fast
from netns.lab import Lab, Namespace

pytestmark = pytest.mark.netns
REFUSAL = OSError(errno.EACCES, "Permission denied\nR1 invalid mem access")


@pytest.fixture
def host(lab: Lab) -> Iterator[Namespace]:
    """A namespace with lo and in0; this thread is in it."""
    fast.require()
    namespace = lab.namespace("relay")
    namespace.ip("link add in0 up type veth peer name other")
    with namespace.inside():
        yield namespace


@pytest.fixture
def mine(host: Namespace, pins: Path) -> Path:
    """A folder to pin in."""
    return pins / "mine"


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int = 0) -> None:
    """Have a loader of `load` work so many times, and fail then."""
    loader: Callable[..., object] = getattr(load, name)
    left = [None] * after

    def refusing(*arguments: object, **named: object) -> object:
        if not left:
            raise REFUSAL
        left.pop()
        return loader(*arguments, **named)

    monkeypatch.setattr(load, name, refusing)


Places = Counter[tuple[str, int]]


def places() -> Places:
    """The links that this process holds, by type and ifindex (bpf_link_show_fdinfo, kernel/bpf/syscall.c)."""
    found: Places = Counter()
    for fd in os.listdir("/proc/self/fdinfo"):
        try:
            lines = Path("/proc/self/fdinfo", fd).read_text().splitlines()
        except FileNotFoundError:  # that of the listing
            continue
        told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if "link_type" in told:
            found[told["link_type"], int(told["ifindex"].split()[0])] += 1
    return found


@pytest.mark.parametrize(
    ("loader", "after"), [("load_copy", 0), ("load_rings", 1), ("load_land", 0), ("load_relay", 0)]
)
def test_a_program_refused_leaves_nothing(
    loader: str, after: int, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, loader, after=after)
    made = FastPath(mine)
    with none_leaks():
        made.start(2, 1000)
        assert made.problem == "the kernel refuses it: Permission denied"
        assert not made.fds()
    assert not list(mine.iterdir())


def test_it_is_at_lo_when_the_second_try_succeeds(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a control that died before workers ran. What goes round by lo needs a program there to send it on."""
    made, before = FastPath(mine), places()
    with monkeypatch.context() as once:
        refuse(once, "load_relay")
        made.start(1, 1000)
        assert not made.fds()
    made.start(1, 1000)
    assert made.problem == ""
    assert len(made.fds()) == len(layout.MAPS) + 1
    assert places() - before == {("tcx", layout.LOOPBACK): 1}
    made.end(keep=False)
    assert not mine.exists()


def test_a_refusal_leaves_what_forwards(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of a relay before us, by which the kernel still forwards, stay pinned."""
    first = FastPath(mine)
    first.start(1, 1000)
    first.attach(in0 := socket.if_nametoindex("in0"))
    first.end(keep=True)
    pinned = sorted(mine.rglob("*"))
    assert mine / f"link-{in0}" in pinned
    refuse(monkeypatch, "load_relay")
    second = FastPath(mine)
    second.start(1, 1000)
    assert second.problem
    assert sorted(mine.rglob("*")) == pinned


def test_an_interface_that_goes_while_its_program_is_replaced(host: Namespace, mine: Path) -> None:
    """One of another size was there; it goes between taking over and the rules: no end of the supervisor."""
    first, before = FastPath(mine), places()
    first.start(1, 1000)
    first.attach(in0 := socket.if_nametoindex("in0"))
    first.end(keep=True)
    second = FastPath(mine)
    second.start(1, 2000)
    second.attach(in0)
    host.ip("link del in0")
    second.leave_unclaimed()
    assert places() - before == {("tcx", layout.LOOPBACK): 1}
    second.detach(in0)
    second.end(keep=False)
    assert not mine.exists()


def test_pins_that_somebody_removed(mine: Path) -> None:
    """The relay ends in good order all the same."""
    made, before = FastPath(mine), places()
    made.start(1, 1000)
    made.attach(in0 := socket.if_nametoindex("in0"))
    shutil.rmtree(mine)
    made.leave_unclaimed()
    assert places() - before == {("tcx", layout.LOOPBACK): 1, ("tcx", in0): 1}
    made.end(keep=False)
    assert places() == before
