"""Rules' rates in the program at tc: what passes, what is counted, and what is left of a bucket."""

import time

import pytest

from bpf_rig import LOOPBACK, TC_ACT_REDIRECT, TC_ACT_SHOT, FastPath, Out, key, merged
from netns import frames

pytestmark = pytest.mark.netns
S4, G4 = "10.9.9.9", "239.1.1.1"
KEY = key(S4, G4, 5000)
FRAME = frames.udp_frame(S4, G4, 5000, b"x" * 100)
MERGED = frames.udp_frame(S4, G4, 5000, b"x" * 1000)
SLOW = 1 / 60  # a second: so slow that nothing is earned during a test


def verdicts(path: FastPath, count: int, frame: bytes = FRAME, context: bytes = b"") -> list[int]:
    return [path.run(frame, context)[0] for _ in range(count)]


def test_what_is_saved_passes_and_no_more(path: FastPath) -> None:
    """Each frame is counted once: as carried, or as withheld."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", SLOW, burst=2.5)
    assert verdicts(path, 5) == 3 * [TC_ACT_REDIRECT] + 2 * [TC_ACT_SHOT]
    assert (path.counted(), path.limited()) == ((3, 300), 2)
    assert not path.passed(), "nothing of it goes to the slow path, which would send it"


def test_bytes_of_payload_are_metered_too(path: FastPath) -> None:
    """The stricter of the two decides; the last that passes may leave a debt."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", SLOW, burst=9.5)
    path.set_rate("bytes", SLOW, burst=250)
    assert verdicts(path, 4) == 3 * [TC_ACT_REDIRECT] + [TC_ACT_SHOT]


def test_a_merged_frame_pays_for_its_datagrams(path: FastPath) -> None:
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", SLOW, burst=15.5)
    assert verdicts(path, 3, MERGED, merged(10, 100)) == 2 * [TC_ACT_REDIRECT] + [TC_ACT_SHOT]
    assert (path.counted(), path.limited()) == ((20, 2000), 10)


def test_a_bucket_fills_again(path: FastPath) -> None:
    """A debt is paid first."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", 20, burst=0.5)
    assert verdicts(path, 2) == [TC_ACT_REDIRECT, TC_ACT_SHOT]
    end = time.monotonic() + 10
    while path.run(FRAME)[0] != TC_ACT_REDIRECT:
        assert time.monotonic() < end
    assert path.counted()[0] == 2


def test_no_more_than_the_burst_is_saved(path: FastPath) -> None:
    """However long nothing came."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", SLOW, burst=2.5)
    due = path.arrays["limits"][0]["datagrams"]
    due["due"] = int(due["due"]) - 3600 * 10**9 & (1 << 64) - 1
    assert verdicts(path, 4) == 3 * [TC_ACT_REDIRECT] + [TC_ACT_SHOT]


def test_the_average_is_the_rate(path: FastPath) -> None:
    """Offered as fast as can be, for a while: what passed is what was earned."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", 1000, burst=60_000)  # so much that a test which gets no processor loses nothing
    start = time.monotonic()
    path.arrays["limits"][0]["datagrams"]["due"] = time.monotonic_ns()  # nothing is saved yet
    while time.monotonic() < start + 0.3:
        path.run(FRAME)
    after = time.monotonic()
    while path.run(FRAME)[0] == TC_ACT_REDIRECT:  # what was earned while this test got no processor
        pass
    assert 1000 * (after - start) - 2 <= path.counted()[0] <= 1000 * (time.monotonic() - start) + 2


def test_rules_have_buckets_of_their_own(path: FastPath) -> None:
    """And a flow without a limit none."""
    free = key(S4, "239.1.1.2", 5000)
    path.install(KEY, Out(), limit=1)
    path.install(free, Out(), slot=1)
    path.set_rate("datagrams", SLOW, burst=0.5)
    assert verdicts(path, 2) == [TC_ACT_REDIRECT, TC_ACT_SHOT]
    frame = frames.udp_frame(S4, "239.1.1.2", 5000, b"x")
    assert verdicts(path, 3, frame) == 3 * [TC_ACT_REDIRECT]


def test_what_the_slow_path_gets_costs_nothing(path: FastPath) -> None:
    """It has a bucket of its own."""
    path.install(KEY, Out(), limit=1)
    path.set_rate("datagrams", SLOW, burst=0.5)
    path.set_hop(flags=0, ifindex=LOOPBACK)
    path.run(FRAME)
    assert path.passed() == {"hop": 1}
    path.enter(KEY)
    path.set_hop(source=bytes((10, 1, 0, 1)) + bytes(12))
    assert verdicts(path, 2) == [TC_ACT_REDIRECT, TC_ACT_SHOT]
