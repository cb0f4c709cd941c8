"""Both readers of headers: each drop reason, and that the vector reading never disagrees with the strict one."""

import random
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrelay.counters import FRAGMENT, MALFORMED, NOT_UDP, TRUNCATED
from mrelay.worker.batch import Batch
from mrelay.worker.flows import FORWARD
from mrelay.worker.ingress import interleave
from mrelay.worker.parse import Datagram, parse
from ring_fake import new_ring, udp_v4, udp_v6

HOP_BY_HOP = bytes([17, 0]) + bytes(6)


def read(data: bytes, start: int = 0) -> Datagram | int:
    return parse(memoryview(data), start, len(data))


def test_plain_ipv4() -> None:
    assert read(udp_v4(b"hello", ttl=9, tos=0xB8)) == Datagram(
        4, 0x0A090909, 0xEF010101, 5000, 28, 5, 9 << 8 | 0xB8
    )


def test_ipv4_options_are_stepped_over() -> None:
    found = read(udp_v4(b"hello", options=bytes([1, 1, 1, 0])))
    assert isinstance(found, Datagram)
    assert (found.start, found.length) == (32, 5)


def test_ipv6_extension_headers_are_stepped_over() -> None:
    found = read(udp_v6(b"hello", extensions=HOP_BY_HOP, following=0, tos=0x20))
    assert isinstance(found, Datagram)
    assert (found.family, found.start, found.length, found.hop) == (6, 56, 5, 16 << 8 | 0x20)


def test_an_atomic_fragment_is_whole() -> None:
    assert isinstance(read(udp_v6(b"x", extensions=bytes([17, 0, 0, 0, 1, 2, 3, 4]), following=44)), Datagram)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", TRUNCATED),
        (b"\x45", TRUNCATED),
        (b"\x60" + bytes(10), TRUNCATED),
        (b"\x05" + bytes(40), MALFORMED),
        (udp_v4(b"x")[:-1], TRUNCATED),
        (udp_v4(b"x", fragment=0x2000), FRAGMENT),
        (udp_v4(b"x", fragment=3), FRAGMENT),
        (udp_v4(b"x", protocol=6), NOT_UDP),
        (udp_v4(b"x")[:8] + b"\x11" + udp_v4(b"x")[9:], MALFORMED),  # TTL changed, checksum not
        (udp_v6(b"x", following=58), NOT_UDP),
        (udp_v6(b"x", extensions=bytes([17, 0, 0, 1, 0, 0, 0, 0]), following=44), FRAGMENT),
        (udp_v6(b"")[:-8] + struct.pack(">HHHH", 1, 2, 7, 0), MALFORMED),
        (udp_v6(b"")[:-8] + struct.pack(">HHHH", 1, 2, 9, 0), MALFORMED),
    ],
)
def test_each_reason(data: bytes, reason: int) -> None:
    assert read(data) == reason


def packets(rng: random.Random) -> bytes:
    """A packet of one of the shapes that occur, sometimes damaged."""
    payload = rng.randbytes(rng.choice([0, 1, 8, 100, 1400]))
    make = udp_v6 if rng.random() < 0.25 else udp_v4
    data = bytearray(
        make(payload, port=rng.choice([5000, 5001]), ttl=rng.choice([1, 2, 255]), tos=rng.choice([0, 184]))
    )
    special = rng.random()
    if special < 0.1:
        data = bytearray(udp_v4(payload, options=bytes(4 * rng.randint(1, 10)), fragment=rng.choice([0, 0x4000])))
    elif special < 0.2:
        data = bytearray(udp_v6(payload, extensions=HOP_BY_HOP, following=rng.choice([0, 43, 60, 44, 59])))
    elif special < 0.5:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 60))] = rng.randrange(256)
    return bytes(data) + bytes(rng.choice([0, 0, 6]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 64))
def test_vector_reading_agrees_with_the_strict_one(seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    ring = new_ring(monkeypatch)
    frames = [packets(rng) for _ in range(count)]
    vlans = [rng.choice([None, None, 20]) for _ in frames]
    cuts = [14 + len(f) if rng.random() < 0.9 else rng.randint(0, 14 + len(f) - 1) for f in frames]
    for frame, vlan, cut in zip(frames, vlans, cuts, strict=True):
        ring.put(frame, vlan=vlan, captured=cut)
    batch = Batch(ring, count)
    for row, (frame, vlan, cut) in enumerate(zip(frames, vlans, cuts, strict=True)):
        wanted = TRUNCATED if cut < 14 + len(frame) else read(frame)
        if isinstance(wanted, int):
            assert batch.verdict[row] == wanted
            continue
        assert batch.verdict[row] == FORWARD
        assert batch.key(row) == (7, vlan or 0, wanted.family, wanted.source, wanted.group, wanted.port)
        assert (batch.length[row], batch.hop[row]) == (wanted.length, wanted.hop)
        slot = ring.address + row * 2048
        assert int(batch.pointer[row]) - slot - 96 == wanted.start


def test_merged_frames_count_their_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = new_ring(monkeypatch)
    ring.put(udp_v4(bytes(1000)), segment=300)
    ring.put(udp_v4(bytes(1000)))
    ring.put(udp_v4(b""))
    batch = Batch(ring, 3)
    assert batch.count.tolist() == [4, 1, 1]
    assert batch.segment.tolist() == [300, 0, 0]
    assert batch.length.dtype == np.int64


def test_place_is_found_in_a_ring_that_another_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = new_ring(monkeypatch, used=True)
    for _ in range(5):
        ring.put(udp_v4(b"x"))
    ring.u32[:3, 0] = 0
    assert (ring.ready(10), ring.pos) == (2, 3)


def test_place_is_found_in_a_full_ring_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = new_ring(monkeypatch, used=True)
    for _ in range(256):
        ring.put(udp_v4(b"x"))
    ring.u32[:, 5] = (np.arange(256) + 256 - 100) % 256
    assert (ring.ready(10), ring.pos) == (10, 100)
    ring.release(10)
    assert ring.pos == 110


def arrivals(kinds: list[bool]) -> tuple[list[int], list[int]]:
    """Times of the short and the long frames, when frame n came at time n."""
    return [n for n, long in enumerate(kinds) if not long], [n for n, long in enumerate(kinds) if long]


@given(
    kinds=st.lists(st.booleans(), min_size=2, max_size=40),
    looks=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
    limit=st.integers(1, 40),
)
def test_two_rings_are_read_in_order_of_arrival(
    kinds: list[bool], looks: tuple[int, int, int], limit: int
) -> None:
    """Frames come while we look: at the short ring, the long one, and the short one again."""
    first, second, third = sorted(min(look, len(kinds)) for look in looks)
    short, long = arrivals(kinds)
    seen = min(limit, sum(n < first for n in short))
    longs = [n for n in long if n < second][:limit]
    shorts = [n for n in short if n < third][:limit]
    if not longs or not shorts:
        return
    runs = interleave(
        np.array(shorts, np.uint64), seen, len(shorts) == limit, np.array(longs, np.uint64), len(longs) == limit
    )
    sources, taken = {False: iter(short), True: iter(long)}, []
    for is_long, count in runs:
        taken += [next(sources[is_long]) for _ in range(count)]
    assert taken == sorted(taken)
    assert taken, "something always goes on"
    missed = set(range(max(taken) + 1)) - set(taken)
    assert not missed, "nothing is overtaken"


def test_frames_that_came_after_the_first_look_wait_their_turn() -> None:
    short, long = np.array([1, 5, 9], np.uint64), np.array([2, 3, 7], np.uint64)
    assert interleave(short, 1, False, long, False) == [(False, 1), (True, 2), (False, 1), (True, 1)]
    assert interleave(short, 3, False, long, False)[-1] == (False, 1), "seen before the long ones were looked at"
