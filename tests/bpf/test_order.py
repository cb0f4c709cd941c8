"""When a flow passes from the slow path to the fast one: numbers, tails, patience; and the rings' filters."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from bpf_rig import LOOPBACK, TC_ACT_REDIRECT, TCX_NEXT, FastPath, Out, key, packed
from mrelay.ebpf import load
from mrelay.ebpf.layout import CARRIED, HELD_MARK, PASSED, PATIENCE, TAIL_UNKNOWN
from mrelay.kernel import libbpf
from netns import frames
from netns.lab import Namespace

pytestmark = pytest.mark.netns
CLOCK_MONOTONIC_COARSE = 6  # linux/time.h
S4, G4, S6, G6 = "10.9.9.9", "239.1.1.1", "fd99::9", "ff3e::1"
KEY4, KEY6 = key(S4, G4, 5000), key(S6, G6, 5000)
FRAME4 = frames.udp_frame(S4, G4, 5000, b"x" * 100)
FRAME6 = frames.udp_frame(S6, G6, 5000, b"x" * 100)


# ---- what `relay` waits for ----


def verdicts(path: FastPath, count: int) -> list[int]:
    """Of so many frames of KEY4."""
    return [path.run(FRAME4)[0] for _ in range(count)]


def set_progress(path: FastPath, accepted: int, drained: int) -> None:
    """What the rings let in, and what of it was sent."""
    progress = path.arrays["progress"][0]
    progress["accepted"], progress["drained"], progress["room"] = accepted, drained, PATIENCE


def test_carried_once_the_tail_is_drained(path: FastPath) -> None:
    """Not before, and not later."""
    path.install(KEY4, Out(), tail=7)
    set_progress(path, 9, 6)
    assert verdicts(path, 2) == [TCX_NEXT] * 2
    assert path.passed() == {"waiting": 2}
    assert path.flow(KEY4)["state"] == PASSED.index("waiting")
    assert path.flow(KEY4)["waited"] == 2
    set_progress(path, 9, 7)
    path.enter(KEY4)
    assert verdicts(path, 1) == [TC_ACT_REDIRECT]
    assert path.flow(KEY4)[["waited", "state"]].tolist() == (0, CARRIED)


def test_an_unknown_tail_is_what_was_let_in_by_then(path: FastPath) -> None:
    """Frames that were let in before the flow was installed count too; later ones don't."""
    path.install(KEY4, Out(), tail=TAIL_UNKNOWN)
    set_progress(path, 5, 4)
    assert verdicts(path, 1) == [TCX_NEXT]
    assert path.flow(KEY4)["tail"] == 5
    set_progress(path, 8, 5)
    path.enter(KEY4)
    assert verdicts(path, 1) == [TC_ACT_REDIRECT]


def test_a_frame_that_is_not_in_the_rings_yet_is_waited_for(path: FastPath) -> None:
    """The kernel hands lists on: what was left to the slow path may not have been numbered."""
    path.install(KEY4, Out(), tail=7)
    set_progress(path, 9, 6)
    assert verdicts(path, 1) == [TCX_NEXT]
    set_progress(path, 9, 7)
    assert verdicts(path, 1) == [TCX_NEXT]
    path.enter(KEY4)
    assert verdicts(path, 1) == [TC_ACT_REDIRECT]


def test_an_idle_slow_path_is_not_waited_for(path: FastPath) -> None:
    """All that was let in is out: the first frame is carried."""
    path.install(KEY4, Out(), tail=TAIL_UNKNOWN)
    set_progress(path, 5, 5)
    assert verdicts(path, 1) == [TC_ACT_REDIRECT]


def test_patience_ends(path: FastPath) -> None:
    """A slow path that never drains is overtaken, once and for good."""
    path.install(KEY4, Out(), tail=TAIL_UNKNOWN)
    set_progress(path, 5, 0)
    assert verdicts(path, PATIENCE) == [TCX_NEXT] * PATIENCE
    assert verdicts(path, 2) == [TC_ACT_REDIRECT] * 2
    assert path.flow(KEY4)[["tail", "waited"]].tolist() == (0, 0)


@pytest.mark.parametrize(
    ("short", "long", "verdict"), [(100, 9, TCX_NEXT), (101, 0, TC_ACT_REDIRECT), (0, 10, TCX_NEXT)]
)
def test_a_crowded_slow_path_is_overtaken(path: FastPath, short: int, long: int, verdict: int) -> None:
    """When more short frames wait than there is room for, a short one waits no longer; long ones are no matter."""
    path.install(KEY4, Out(), tail=TAIL_UNKNOWN)
    set_progress(path, 50 + short + long, 40)
    progress = path.arrays["progress"][0]
    progress["sent"], progress["accepted_long"], progress["sent_long"] = 50, 5 + long, 5
    progress["room"], progress["room_long"] = 100, 1
    assert verdicts(path, 1) == [verdict]


def test_each_worker_has_its_own_progress(home: Namespace) -> None:
    """The flow's worker's counts."""
    with FastPath(workers=2) as path:
        path.set_hop(source=packed("10.1.0.1"))
        path.arrays["progress"]["room"] = PATIENCE
        path.arrays["progress"]["drained"] = [9, 0]
        path.install(KEY4, Out(), tail=7, worker=1)
        assert verdicts(path, 1) == [TCX_NEXT]
        path.enter(KEY4)
        path.arrays["progress"]["drained"] = [0, 9]
        assert verdicts(path, 1) == [TC_ACT_REDIRECT]


# ---- listeners ----


def await_tick() -> None:
    """Until the kernel's clock, which listeners are looked for by, has moved on."""
    start = time.clock_gettime(CLOCK_MONOTONIC_COARSE)
    while time.clock_gettime(CLOCK_MONOTONIC_COARSE) == start:
        pass


@pytest.mark.parametrize(
    ("bound", "frame", "flow"), [("", FRAME4, KEY4), (G4, FRAME4, KEY4), ("::", FRAME6, KEY6)]
)
def test_a_listener_keeps_its_stream(path: FastPath, bound: str, frame: bytes, flow: bytes) -> None:
    """Whatever it is bound to; gone, or marked as the relay's own, it is none."""
    path.install(flow, Out("ff3e::7" if flow == KEY6 else "239.2.2.2", source="fd00::1" if flow == KEY6 else ""))
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((bound, 5000))
        assert path.run(frame)[0] == TCX_NEXT
        assert path.passed() == {"listener": 1}
        path.enter(flow)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, HELD_MARK)
        assert path.run(frame)[0] == TC_ACT_REDIRECT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
        await_tick()
        assert path.run(frame)[0] == TCX_NEXT
        path.enter(flow)
    assert path.run(frame)[0] == TC_ACT_REDIRECT


def test_a_new_listener_is_found_at_the_next_tick(path: FastPath) -> None:
    """The look-up costs half as much as the rest of the program, so not each frame pays for it."""
    path.install(KEY4, Out())
    assert path.run(FRAME4)[0] == TC_ACT_REDIRECT
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 5000))
        await_tick()
        assert path.run(FRAME4)[0] == TCX_NEXT
        path.enter(KEY4)
        assert path.run(FRAME4)[0] == TCX_NEXT  # found, it is looked for each time: it may go at any
        path.enter(KEY4)
    assert path.run(FRAME4)[0] == TC_ACT_REDIRECT


def test_a_listener_elsewhere_is_none(path: FastPath) -> None:
    """Another port."""
    path.install(KEY4, Out())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 5001))
        assert path.run(FRAME4)[0] == TC_ACT_REDIRECT


# ---- the rings' filters ----


@pytest.fixture
def rings(path: FastPath) -> Iterator[tuple[int, int]]:
    """Those of worker 0, for short and for long frames."""
    loaded = load.load_rings(path.maps, 0)
    yield loaded
    for fd in loaded:
        os.close(fd)


def want(path: FastPath, prefix: str, length: int, ifindex: int = LOOPBACK) -> None:
    """A rule on the interface names these addresses."""
    family = 6 if ":" in prefix else 4
    path.ranges.update(struct.pack("=III", 64 + length, ifindex, family) + packed(prefix), bytes(4))


def accepted(path: FastPath) -> int:
    """By worker 0's rings, so far."""
    return int(path.arrays["progress"][0]["accepted"])


def lets_in(program: int, frame: bytes) -> bool:
    """Whether the filter keeps a frame, as the socket filter that it is."""
    return libbpf.test_run(program, frame).verdict != 0


RANGES = [
    ("239.1.0.0", 16, FRAME4, True), (G4, 32, FRAME4, True), ("239.1.1.2", 32, FRAME4, False),
    ("0.0.0.0", 0, FRAME4, True), ("ff3e::", 32, FRAME6, True), (G6, 128, FRAME6, True),
    ("ff3e::2", 128, FRAME6, False), ("::", 0, FRAME4, False), ("0.0.0.0", 0, FRAME6, False),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "length", "frame", "wanted"), RANGES)
def test_rules_name_what_is_let_in(
    path: FastPath, rings: tuple[int, int], prefix: str, length: int, frame: bytes, wanted: bool
) -> None:
    """By destination and family; what is let in is numbered."""
    want(path, prefix, length)
    want(path, prefix, length, ifindex=2)
    assert lets_in(rings[0], frame) == wanted
    assert accepted(path) == int(wanted)


def test_rules_of_another_interface_do_not_count(path: FastPath, rings: tuple[int, int]) -> None:
    """A VLAN interface's frames, for one, come with its own number."""
    want(path, G4, 32, ifindex=2)
    assert not lets_in(rings[0], FRAME4)


@pytest.mark.parametrize(("frame", "flow"), [(FRAME4, KEY4), (FRAME6, KEY6)])
def test_a_flow_keeps_the_number_of_its_last_frame(
    path: FastPath, rings: tuple[int, int], frame: bytes, flow: bytes
) -> None:
    """An unknown tail stays: `relay` fills it in, and counts this frame, too."""
    want(path, G4, 32)
    want(path, G6, 128)
    path.arrays["progress"][0]["accepted"] = 41
    path.install(flow, Out(), tail=3)
    assert lets_in(rings[0], frame)
    assert path.flow(flow)["tail"] == 42
    path.install(flow, Out(), tail=TAIL_UNKNOWN)
    assert lets_in(rings[0], frame)
    assert path.flow(flow)["tail"] == TAIL_UNKNOWN
    assert accepted(path) == 43


def test_a_locked_filter_stays(home: Namespace, path: FastPath, rings: tuple[int, int]) -> None:
    """Whoever holds the ring can't take it off."""
    with closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as sock:
        libbpf.attach_to(sock, rings[0], lock=True)
        with pytest.raises(PermissionError):
            libbpf.attach_to(sock, rings[1], lock=False)
