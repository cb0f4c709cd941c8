"""Malformed, truncated and random frames: counted, never fatal, and the next good packet still passes."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netns.frames import IP_MF, ROUTER_ALERT, ethernet, ipv4, ipv6, multicast_mac, udp, udp_frame
from netns.lab import SOURCE, SOURCE_6, Lab, Star
from netns.relay import Relay, Stats, rule
from netns.traffic import Capture, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
GROUP_6 = "ff3e::1"
CONFIG = rule("four", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000") + rule(
    "six", f"in0:[{GROUP_6}]:5000", "out0:[ff3e::2]:6000"
)


def on_wire(packet: bytes) -> bytes:
    """A frame to the IPv4 group's Ethernet address."""
    return ethernet(multicast_mac(GROUP), packet)


def changed(frame: bytes, at: int, new: bytes) -> bytes:
    """The frame with `new` at offset `at`."""
    return frame[:at] + new + frame[at + len(new) :]


GOOD = udp_frame(SOURCE, GROUP, 5000, b"good but for one thing")
DATAGRAM = udp(SOURCE, GROUP, 4000, 5000, b"good but for one thing")
IP, UDP = 14, 34  # offsets in GOOD
# Each is counted, under one of these reasons.
CORPUS = {
    "ip-header-checksum": (changed(GOOD, IP + 10, b"\xde\xad"), {"malformed"}),
    "ip-version-5": (changed(GOOD, IP, b"\x55"), {"malformed"}),
    "ip-header-length-4": (changed(GOOD, IP, b"\x44"), {"malformed"}),
    "ip-header-longer-than-the-packet": (on_wire(ipv4(SOURCE, GROUP, b""))[:34], {"malformed", "truncated"}),
    "ip-length-beyond-the-frame": (
        on_wire(ipv4(SOURCE, GROUP, DATAGRAM + b"x" * 400)[: 20 + len(DATAGRAM)]),
        {"malformed", "truncated"},
    ),
    "ip-length-below-its-header": (
        on_wire(ipv4(SOURCE, GROUP, b"")[:20] + DATAGRAM),
        {"malformed", "truncated"},
    ),
    "udp-length-beyond-the-packet": (
        on_wire(ipv4(SOURCE, GROUP, changed(DATAGRAM, 4, b"\x04\x00"))),
        {"malformed", "truncated"},
    ),
    "udp-length-7": (on_wire(ipv4(SOURCE, GROUP, changed(DATAGRAM, 4, b"\x00\x07"))), {"malformed"}),
    "udp-header-cut": (on_wire(ipv4(SOURCE, GROUP, DATAGRAM[:5])), {"malformed", "truncated"}),
    "tcp": (on_wire(ipv4(SOURCE, GROUP, b"\0" * 20, protocol=6)), {"not_udp"}),
    "igmp-shaped": (on_wire(ipv4(SOURCE, GROUP, b"\x16\0\0\0\0\0\0\0", protocol=2)), {"not_udp"}),
    "another-port": (udp_frame(SOURCE, GROUP, 5001, b"x"), {"no_rule"}),
    "ipv6-length-beyond-the-frame": (
        ethernet(multicast_mac(GROUP_6), ipv6(SOURCE_6, GROUP_6, DATAGRAM + b"x" * 400)[: 40 + len(DATAGRAM)]),
        {"malformed", "truncated"},
    ),
    "ipv6-not-udp": (
        ethernet(multicast_mac(GROUP_6), ipv6(SOURCE_6, GROUP_6, b"\0" * 20, next_header=6)),
        {"not_udp"},
    ),
    "ipv6-udp-without-checksum": (  # RFC 8200 §8.1: to be discarded; a relay may also repair it
        changed(udp_frame(SOURCE_6, GROUP_6, 5000, b"x"), 14 + 40 + 6, b"\0\0"),
        {"malformed", "matched"},
    ),
}


def test_bad_frames_are_counted(lab: Lab, subtests: pytest.Subtests) -> None:
    """Each in exactly one counter, and good ones of the same flow pass before and after.

    A good one may overtake them (the fast path carries it, a worker looks at bad ones), so counters are awaited.
    """
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        for name, (frame, reasons) in CORPUS.items():
            with subtests.test(name):
                before = relay.stats()
                send_between_good_ones(star, wire, sender, [frame] * 3)
                allowed = [Counter(matched=2) + Counter({reason: 3}) for reason in reasons]
                assert await_counted(relay, before, 5) in allowed


def send_between_good_ones(star: Star, wire: Capture, sender: Sender, frames: list[bytes]) -> None:
    """The frames between two good datagrams, which come out."""
    sender.send(GROUP, 5000, [b"before"])
    wire.until(b"before")
    send_frames(star.source, "s0", frames)
    sender.send(GROUP, 5000, [b"after"])
    wire.until(b"after")


def await_counted(relay: Relay, before: Stats, count: int) -> Counter[str]:
    """What was counted since, once that is so many."""
    stats = relay.await_stats(lambda stats: counted_since(before, stats).total() >= count, "all are counted")
    return counted_since(before, stats)


def counted_since(before: Stats, stats: Stats) -> Counter[str]:
    """Datagrams matched and drops by reason, those that grew."""
    grown: Counter[str] = Counter(stats["drops"])
    grown.subtract(before["drops"])
    return +grown + Counter(matched=stats["matched"] - before["matched"])


def test_lone_fragments_are_not_fatal(lab: Lab) -> None:
    star = lab.star()
    whole = udp(SOURCE, GROUP, 4000, 5000, payloads(1, 3000)[0])
    lone = [on_wire(ipv4(SOURCE, GROUP, whole[:1480], ident=i, fragment=IP_MF)) for i in range(20)] + [
        on_wire(ipv4(SOURCE, GROUP, whole[1480:2960], ident=100 + i, fragment=185 | IP_MF)) for i in range(20)
    ]
    overlapping = [
        on_wire(ipv4(SOURCE, GROUP, whole[:1480], ident=500, fragment=IP_MF)),
        on_wire(ipv4(SOURCE, GROUP, whole[1000:2480], ident=500, fragment=125)),
    ]
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG):
        send_frames(star.source, "s0", lone + overlapping)
        sender.send(GROUP, 5000, [b"after"])
        assert [packet.payload for packet in wire.until(b"after")] == [b"after"]


BASES = [
    GOOD,
    on_wire(ipv4(SOURCE, GROUP, DATAGRAM, options=ROUTER_ALERT)),
    udp_frame(SOURCE, GROUP, 5000, b"tagged", vlan=20),
    udp_frame(SOURCE_6, GROUP_6, 5000, b"six"),
    ethernet(
        multicast_mac(GROUP_6),
        ipv6(SOURCE_6, GROUP_6, bytes((17, 0, 1, 4, 0, 0, 0, 0)) + DATAGRAM, next_header=0),
    ),
    on_wire(ipv4(SOURCE, GROUP, DATAGRAM, fragment=IP_MF)),
    on_wire(ipv4(SOURCE, GROUP, DATAGRAM[8:], fragment=1)),
    udp_frame(SOURCE, GROUP, 5000, payloads(1, 1400)[0]),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good frame with a few bytes changed, and perhaps cut short or padded."""
    frame = bytearray(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(0, 6))):
        frame[draw(st.integers(12, min(len(frame), 90) - 1))] = draw(st.integers(0, 255))
    end = draw(st.none() | st.integers(14, len(frame)))
    return bytes(frame[:end]) + draw(st.binary(max_size=20))


def test_random_frames(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        pids = [worker["pid"] for worker in relay.workers()]
        bombard(star, wire, sender, relay)
        assert [worker["pid"] for worker in relay.workers()] == pids, "no worker has died"


def bombard(star: Star, wire: Capture, sender: Sender, relay: Relay) -> None:
    """Random frames; after each handful a good datagram must come through and the counters must add up."""
    markers = iter(range(10**6))

    @settings(max_examples=80, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(mutated(), min_size=1, max_size=20))
    def handful(frames: list[bytes]) -> None:
        send_frames(star.source, "s0", frames)
        marker = f"marker {next(markers)}".encode()
        sender.send(GROUP, 5000, [marker])
        wire.until(marker)
        relay.check_counters()

    handful()


def test_many_spoofed_sources_do_not_stop_a_stream(lab: Lab) -> None:
    """A miss storm may be rate-limited; a flow that runs already must not notice."""
    star = lab.star()
    storm = [udp_frame(f"10.{i >> 8}.{i & 255}.1", GROUP, 5000, b"storm") for i in range(3000)]
    sent = payloads(50)
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        sender.send(GROUP, 5000, [b"first"])
        wire.until(b"first")
        for i, payload in enumerate(sent):
            send_frames(star.source, "s0", storm[i * 60 : (i + 1) * 60])
            sender.send(GROUP, 5000, [payload])
        got = wire.until(sent[-1])
        assert [packet.payload for packet in got if packet.payload != b"storm"] == sent
        relay.await_received(1 + len(storm) + len(sent))
