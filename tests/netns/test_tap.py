"""Taps: which frames they let in, what is known of each, and what else their descriptor is good for."""

import asyncio
import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network

import pytest

from mrelay.control.tap import PORTION, Tap
from mrelay.kernel.packet import VIRTIO_NET_HDR
from mrelay.kernel.tap import MOST, SO_TIMESTAMPNS, Frame, disarm, open_tap, read, tap_filter
from mrelay.messages import OpenTap, TapFilter
from mrelay.supervisor.taps import MAX_TAPS, Taps
from netns.frames import ethernet, ipv4, ipv6, multicast_mac, udp, udp_frame
from netns.lab import Lab, Namespace, eventually
from netns.traffic import Capture, Sender, send_frames

pytestmark = pytest.mark.netns
GROUP, GROUP_6, HOST, SOURCE = "239.1.1.1", "ff3e::1", "192.168.50.1", "10.99.9.1"
ALL = ("224.0.0.0/4", "ff00::/8")
MAC = b"\x02\0\0\0\0\2"
LAST = udp_frame(SOURCE, "239.255.0.1", 9, b"the last one")


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A namespace with a veth pair v0, v1 that says nothing by itself."""
    namespace = lab.namespace("host")
    namespace.ip(
        "link add v0 type veth peer name v1",
        *(f"link set {name} addrgenmode none up" for name in ("v0", "v1")),
    )
    return namespace


class Listening:
    """A tap on v0, and what came to it."""

    def __init__(
        self,
        host: Namespace,
        *networks: str,
        snap: int = MOST,
        membership: bool = False,
        incoming: bool = True,
        outgoing: bool = False,
        one_in: int = 1,
    ) -> None:
        program = tap_filter(
            [ip_network(text) for text in networks],
            snap,
            membership=membership,
            incoming=incoming,
            outgoing=outgoing,
            one_in=one_in,
        )
        with host.inside():
            self.sock = open_tap(socket.if_nametoindex("v0"), program, outgoing=outgoing)
        self.buffer = bytearray(VIRTIO_NET_HDR.size + snap)

    def __enter__(self) -> "Listening":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def frames(self) -> Iterator[Frame]:
        """Those that have come by now."""
        while select.select([self.sock], [], [], 0.1)[0]:
            frame = read(self.sock, self.buffer)
            assert frame is not None
            yield frame


IGMP = ethernet(multicast_mac("224.0.0.22"), ipv4(SOURCE, "224.0.0.22", b"\x22" + bytes(15), protocol=2, ttl=1))
MLD = ethernet(multicast_mac("ff02::16"), ipv6("fe80::1", "ff02::16", bytes(36), next_header=0, hops=1))
FRAMES = {
    "group": udp_frame(SOURCE, GROUP, 5000, b"x"),
    "its neighbour": udp_frame(SOURCE, "239.1.1.2", 5000, b"x"),
    "group, tagged": udp_frame(SOURCE, GROUP, 5000, b"x", vlan=20),
    "group, TCP": ethernet(multicast_mac(GROUP), ipv4(SOURCE, GROUP, bytes(20), protocol=6)),
    "IPv6 group": udp_frame("fd99::1", GROUP_6, 5000, b"x"),
    "host": ethernet(MAC, ipv4(SOURCE, HOST, udp(SOURCE, HOST, 1, 2, b"x"))),
    "host, TCP": ethernet(MAC, ipv4(SOURCE, HOST, bytes(20), protocol=6)),
    "IPv6 host": ethernet(MAC, ipv6("fd99::1", "fd00::1", udp("fd99::1", "fd00::1", 1, 2, b"x"))),
    "IPv6 host, ICMP": ethernet(MAC, ipv6("fd99::1", "fd00::1", bytes(8), next_header=58)),
    "IPv6 host, hop-by-hop": ethernet(MAC, ipv6("fd99::1", "fd00::1", bytes(8), next_header=0)),
    "IGMP": IGMP,
    "MLD": MLD,
    "ARP": ethernet(b"\xff" * 6, bytes(28), ethertype=0x0806),
    "short": MAC + MAC + b"\x08\x00" + b"\x45",
}
HOSTS = ("192.168.50.1/32", "fd00::1/128")
CASES = [
    ((f"{GROUP}/32",), {}, {"group", "group, tagged", "group, TCP"}),
    (("239.1.1.0/30",), {}, {"group", "its neighbour", "group, tagged", "group, TCP"}),
    ((f"{GROUP_6}/128",), {}, {"IPv6 group"}),
    (HOSTS, {}, {"host", "IPv6 host"}),
    ((), {"membership": True}, {"IGMP", "MLD"}),
    ((f"{GROUP_6}/128",), {"membership": True}, {"IPv6 group", "IGMP", "MLD"}),
    (ALL, {}, {n for n in FRAMES if "group" in n or n in {"its neighbour", "IGMP", "MLD"}}),
    (ALL, {"incoming": False, "outgoing": True}, set()),
    ((), {"membership": True, "one_in": 1 << 20}, {"IGMP", "MLD"}),
]


@pytest.mark.parametrize(("networks", "options", "wanted"), CASES)
def test_it_lets_in_what_was_asked_for(
    host: Namespace, networks: tuple[str, ...], options: dict[str, bool], wanted: set[str]
) -> None:
    with Listening(host, *networks, **options) as tap:
        send_frames(host, "v1", FRAMES.values())
        came = [frame.data[frame.network :] for frame in tap.frames()]
    assert sorted(came) == sorted(packet(FRAMES[name]) for name in wanted)


def packet(frame: bytes) -> bytes:
    """What is in it."""
    return frame[18 if frame[12:14] == b"\x81\0" else 14 :]


def test_both_directions(host: Namespace) -> None:
    with Listening(host, *ALL, outgoing=True) as tap:
        send_frames(host, "v1", [FRAMES["group"]])
        send_frames(host, "v0", [FRAMES["its neighbour"]])
        assert [(frame.outgoing, frame.data[33]) for frame in tap.frames()] == [(False, 1), (True, 2)]
    with Listening(host, *ALL, incoming=False, outgoing=True) as tap:
        send_frames(host, "v1", [FRAMES["group"]])
        send_frames(host, "v0", [FRAMES["its neighbour"]])
        assert [frame.outgoing for frame in tap.frames()] == [True]


def test_what_is_known_of_a_frame(host: Namespace) -> None:
    before = time.time_ns()
    with Listening(host, *ALL, snap=60) as tap:
        send_frames(host, "v1", [udp_frame(SOURCE, GROUP, 5000, bytes(1000), vlan=20)])
        (frame,) = tap.frames()
    assert before < frame.time < time.time_ns()
    assert (frame.vlan, frame.network, len(frame.data), frame.length) == (20, 14, 60, 1042)
    assert (frame.segment, frame.outgoing, frame.complete) == (0, False, True)


def test_a_merged_frame_comes_whole(lab: Lab) -> None:
    star = lab.star(offload=True)
    program = tap_filter([ip_network(f"{GROUP}/32")], MOST)
    with star.relay.inside():
        sock = open_tap(socket.if_nametoindex("in0"), program, outgoing=False)
    with sock, Sender(star.source) as sender:
        sender.send_segmented(GROUP, 5000, [bytes(1000)] * 20)
        assert select.select([sock], [], [], 5)[0]
        frame = read(sock, bytearray(MOST + 10))
    assert frame is not None
    assert (frame.segment, frame.length, frame.complete) == (1000, 14 + 28 + 20_000, False)


def test_samples(host: Namespace) -> None:
    with Listening(host, *ALL, snap=64, one_in=10) as tap:
        send_frames(host, "v1", [FRAMES["group"]] * 2000)
        assert 120 < len(list(tap.frames())) < 290, "200 of 2000, give or take six standard deviations"


def test_nothing_can_be_sent_through_it(host: Namespace) -> None:
    """But for 22 bytes, too few for a whole IP or ARP packet, by who maps its transmit ring."""
    with Capture(host, "v1") as wire, Listening(host, *ALL) as tap:
        where = ("v0", 0x0800, 0, 0, MAC)
        with host.inside():  # Python looks the name up
            sends: list[Callable[[], int]] = [
                lambda: tap.sock.sendto(bytes(10) + FRAMES["group"], where),
                lambda: tap.sock.send(bytes(10) + FRAMES["group"]),
                lambda: os.write(tap.sock.fileno(), bytes(10) + FRAMES["group"]),
                lambda: tap.sock.sendmsg([bytes(10) + FRAMES["group"]], [], 0, where),
            ]
            for send in sends:
                try:
                    assert send() == 0
                except OSError as error:
                    assert error.errno in {errno.EINVAL, errno.EAGAIN, errno.EMSGSIZE}
        sent = [length for length in range(1, 64) if sends_from_ring(tap.sock, length)]
        send_frames(host, "v0", [LAST])
        came = [b""]
        while came[-1] != LAST:
            came.append(wire.frame(time.monotonic() + 5, "the last frame")[0])
        assert max(sent) == 32, "with 10 bytes of virtio header"
        assert 14 < max(map(len, came[:-1])) <= 22


def sends_from_ring(sock: socket.socket, length: int) -> bool:
    """Whether the kernel takes such a frame from every place of the transmit ring (struct tpacket_hdr)."""
    with mmap.mmap(sock.fileno(), mmap.PAGESIZE) as ring:
        for place in range(0, mmap.PAGESIZE, 64):
            struct.pack_into("=QI", ring, place, 1, length)  # TP_STATUS_SEND_REQUEST
            ring[place + 32 : place + 64] = bytes(10) + MAC + MAC + b"\x08\x06" + bytes(8)
        try:
            return sock.send(b"") > 0
        except OSError:
            return False


def test_a_closed_one_is_of_no_use_to_who_has_a_copy(host: Namespace) -> None:
    with Listening(host, *ALL) as tap, tap.sock.dup() as copy:
        send_frames(host, "v1", [FRAMES["group"]])
        assert list(tap.frames())
        disarm(tap.sock)
        send_frames(host, "v1", [FRAMES["group"], FRAMES["IGMP"]])
        assert not select.select([copy], [], [], 0.2)[0]


def test_it_outlasts_a_flap(host: Namespace) -> None:
    with Listening(host, *ALL) as tap:
        host.ip("link set v0 down")
        with pytest.raises(OSError, match="down") as raised:
            read(tap.sock, tap.buffer)
        assert raised.value.errno == errno.ENETDOWN
        host.ip("link set v0 up")
        eventually(lambda: host.links()["v1"]["operstate"] == "UP", "the link")
        send_frames(host, "v1", [FRAMES["group"]])
        assert list(tap.frames())


def test_it_ends_when_its_interface_is_removed(host: Namespace) -> None:
    with Listening(host, *ALL) as tap:
        host.ip("link del v0")
        assert asyncio.run(_left(Tap(tap.sock, MOST))) == []


def test_it_ends_when_its_interface_was_elsewhere_meanwhile(lab: Lab, host: Namespace) -> None:
    """It is back under its old number, and still nothing comes to this tap any more."""
    other = lab.namespace("other")
    with Listening(host, *ALL) as tap:
        host.ip(f"link set v0 netns {other.name}")
        other.ip(f"link set v0 netns {host.name}")
        host.ip("link set v0 up")
        assert asyncio.run(_left(Tap(tap.sock, MOST))) == []


def test_it_ends_when_its_interface_went_down_before_it_went(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of the first alone."""
    monkeypatch.setattr("mrelay.control.tap._LOOK", 0.2)
    with Listening(host, *ALL) as tap:
        listening = Tap(tap.sock, MOST)

        async def left() -> list[Frame]:
            reading = asyncio.create_task(_left(listening))
            host.ip("link set v0 down")
            while not listening.down:
                await asyncio.sleep(0.01)
            host.ip("link del v0")
            return await reading

        assert asyncio.run(left()) == []


async def _left(tap: Tap) -> list[Frame]:
    async with asyncio.timeout(10):
        return [frame async for frame in tap]


def test_the_supervisor_opens_so_many_and_ends_them(host: Namespace) -> None:
    taps = Taps()
    with host.inside():
        ifindex = socket.if_nametoindex("v0")
        for number in range(MAX_TAPS):
            taps.open(OpenTap(number, ifindex, TapFilter(ALL)))
        with pytest.raises(Exception, match="64 taps are open"):
            taps.open(OpenTap(999, ifindex, TapFilter(ALL)))
        assert len(host.read("packet").splitlines()) == 1 + MAX_TAPS
        taps.close(3)
        taps.close(3)
        taps.open(OpenTap(999, ifindex, TapFilter(ALL)))
        taps.close_all()
        eventually(lambda: len(host.read("packet").splitlines()) == 1, "no packet socket")


@pytest.mark.parametrize(("networks", "timed"), [((), 0), (ALL, 1)])
def test_who_listens_all_the_time_has_no_frame_timed(
    host: Namespace, networks: tuple[str, ...], timed: int
) -> None:
    taps = Taps()
    with host.inside():
        taps.open(OpenTap(1, socket.if_nametoindex("v0"), TapFilter(networks, membership=True)))
    with contextlib.closing(socket.socket(fileno=os.dup(taps.fd(1)))) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS) == timed
    taps.close_all()


def test_a_flood_takes_a_share_of_the_loop(host: Namespace) -> None:
    """While frames come faster than they are read, all else in the loop goes on; what was lost is counted."""
    asyncio.run(_flooded(host))


async def _flooded(host: Namespace) -> None:
    flood = [FRAMES["group"]] * 20_000
    with host.inside():
        opened = open_tap(socket.if_nametoindex("v0"), tap_filter([ip_network(ALL[0])], MOST), outgoing=False)
    with opened:
        tap = Tap(opened, MOST)
        send_frames(host, "v1", flood)
        turns = came = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        began = time.monotonic()
        async with asyncio.timeout(10):
            async for frame in tap:
                came += 1
                assert frame.data == FRAMES["group"]
                if came + tap.dropped == len(flood):
                    break
        task.cancel()
        assert (tap.bad, came > 500, tap.dropped > 0) == (0, True, True)
    assert turns > 10 * came / PORTION, f"{turns} turns of the loop in {time.monotonic() - began} s"
