"""Session announcements and multicast DNS: what they name, and that nonsense names nothing."""

import socket
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRR, DNSRRSRV

from mrelay.protocols.mdns import Host, Service, answers
from mrelay.protocols.sap import Announcement, Media, announcement, session

SDP = (
    "v=0\r\no=- 1 1 IN IP4 10.9.9.9\r\ns=Studio A\r\nt=0 0\r\na=recvonly\r\n"
    "m=video 5000 RTP/AVP 96 97\r\nc=IN IP4 239.1.1.1/32/2\r\na=rtpmap:96 raw/90000\r\n"
    "a=source-filter: incl IN IP4 239.1.1.1 10.9.9.9\r\n"
    "m=audio 5004/2 RTP/AVP 10\r\nc=IN IP4 239.1.1.2/32\r\n"
)


def sap(body: bytes, *, flags: int = 0, kind: bytes = b"application/sdp\0", words: int = 0) -> bytes:
    head = struct.pack(">BBH4s", 0x20 | flags, words, 77, socket.inet_aton("10.9.9.9"))
    return head + bytes(4 * words) + kind + body


@pytest.mark.parametrize(
    "data",
    [
        sap(SDP.encode()),
        sap(SDP.encode(), kind=b""),
        sap(SDP.encode(), words=3),
        sap(zlib.compress(b"application/sdp\0" + SDP.encode()), flags=1, kind=b""),
    ],
    ids=["plain", "no payload type", "authenticated", "compressed"],
)
def test_an_announcement_is_read(data: bytes) -> None:
    assert announcement(data) == Announcement(deletes=False, hash=77, origin="10.9.9.9", sdp=SDP)


def test_a_deletion_and_an_ipv6_origin() -> None:
    head = struct.pack(">BBH16s", 0x34, 0, 5, socket.inet_pton(socket.AF_INET6, "2001:db8::9"))
    assert announcement(head + b"v=0\r\n") == Announcement(True, 5, "2001:db8::9", "v=0\r\n")


def test_what_can_t_be_read_is_no_announcement() -> None:
    bomb = zlib.compress(b"v=0" + bytes(50_000_000))
    read = announcement(sap(bomb, flags=1, kind=b""))
    assert read is not None and len(read.sdp) <= 8192
    for data in (
        b"",
        b"\x20",
        sap(b"x", flags=2),
        sap(b"not zlib", flags=1, kind=b""),
        sap(b"x", kind=b"image/png\0"),
    ):
        assert announcement(data) is None


def test_a_session_names_its_streams() -> None:
    name, media = session(SDP)
    assert name == "Studio A"
    assert media == (
        Media("video", "239.1.1.1", 2, 5000, 1, "RTP/AVP", ("96", "97"), "10.9.9.9"),
        Media("audio", "239.1.1.2", 1, 5004, 2, "RTP/AVP", ("10",), ""),
    )


def test_a_session_s_own_address_is_for_all_its_media() -> None:
    text = "v=0\ns=\x1b[31mred\nc=IN IP6 ff3e::1/3\na=source-filter: incl IN IP6 ff3e::1 2001:db8::9\n"
    name, media = session(text + "m=audio 5 x y\n")
    assert name == "\N{REPLACEMENT CHARACTER}[31mred", "nothing that a terminal would obey"
    assert media == (Media("audio", "ff3e::1", 3, 5, 1, "x", ("y",), "2001:db8::9"),)


def test_a_host_name_is_no_address() -> None:
    assert session("s=x\nc=IN IP4 video.example.com\nm=video 5000 RTP/AVP 96\n").media[0].address == ""


@given(st.text(max_size=400))
def test_any_text_is_a_session(text: str) -> None:
    for media in session(f"m=a 1 b\n{text}").media:
        assert 0 <= media.port <= 65535 and 1 <= media.groups <= 256


@given(st.binary(max_size=200))
def test_any_bytes_are_an_announcement_or_none(data: bytes) -> None:
    for first in (b"\x20", b"\x21", b"\x30"):
        announcement(first + data)


def dns(*records: Any) -> bytes:
    return bytes(DNS(qr=1, qd=[DNSQR(qname="x.local")], an=list(records)))


def test_hosts_and_services_are_read() -> None:
    data = dns(
        DNSRR(rrname="camera.local.", type="A", rdata="10.9.9.9"),
        DNSRR(rrname="camera.local.", type="AAAA", rdata="2001:db8::9"),
        DNSRR(rrname="_rtsp._tcp.local.", type="PTR", rdata="Camera._rtsp._tcp.local."),
        DNSRRSRV(rrname="Camera._rtsp._tcp.local.", port=554, target="camera.local."),
    )
    want = [
        Host("camera.local", "10.9.9.9"),
        Host("camera.local", "2001:db8::9"),
        Service("Camera._rtsp._tcp.local", "camera.local", 554),
    ]
    assert answers(data) == want


def test_a_compressed_name_is_followed_backwards_only() -> None:
    head = struct.pack(">HHHHHH", 0, 0x8400, 0, 2, 0, 0)
    name = b"\x06camera\x05local\0"
    record = struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton("10.9.9.9")
    good = head + name + record + b"\xc0\x0c" + record
    assert answers(good) == [Host("camera.local", "10.9.9.9")] * 2
    assert answers(head + b"\xc0\x0c" + record) == [], "it points at itself"


def test_questions_say_nothing() -> None:
    assert answers(bytes(DNS(qr=0, qd=[DNSQR(qname="x.local")]))) == []


@given(st.binary(max_size=300))
def test_any_bytes_are_answers_or_none(data: bytes) -> None:
    answers(struct.pack(">HHHHHH", 0, 0x8400, 1, 65535, 0, 0) + data)
