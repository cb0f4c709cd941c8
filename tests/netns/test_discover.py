"""`mrelay discover`: what is on an interface, and that each rule it suggests is taken and relays the stream."""

import contextlib
import json
import shlex
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSRR
from scapy.layers.igmp import IGMPv3_MQ, IGMPv3_MR, IGMPv3_MR_Group

from netns.frames import ROUTER_ALERT, ethernet, ipv4, multicast_mac, udp_frame
from netns.lab import SOURCE, SOURCE_2, SOURCE_6, Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, send_frames

pytestmark = pytest.mark.netns
SDP = (
    "v=0\r\no=- 1 1 IN IP4 10.99.9.1\r\ns=Studio B\r\nc=IN IP4 232.8.8.8/32\r\n"
    "a=source-filter: incl IN IP4 232.8.8.8 10.99.9.2\r\nm=video 8000 RTP/AVP 96\r\n"
)
SAP = struct.pack(">BBH4s", 0x20, 0, 9, socket.inet_aton(SOURCE)) + b"application/sdp\0" + SDP.encode()
NAMES = bytes(DNS(qr=1, an=[DNSRR(rrname="camera.local.", type="A", rdata=SOURCE)]))


def igmp(source: str, group: str, message: Any) -> bytes:
    packet = ipv4(source, group, bytes(message), protocol=2, ttl=1, options=ROUTER_ALERT)
    return ethernet(multicast_mac(group), packet)


FRAMES = [
    udp_frame(SOURCE, "239.1.1.1", 5000, bytes(100)),
    udp_frame(SOURCE, "239.7.7.7", 7000, bytes(100), vlan=20, ttl=1),
    udp_frame(SOURCE_6, "ff3e::7", 7000, bytes(100)),
    udp_frame(SOURCE, "224.2.127.254", 9875, SAP),
    udp_frame(SOURCE, "224.0.0.251", 5353, NAMES),
    udp_frame(SOURCE, "10.9.9.9", 7777, b"to a host, not a group"),
    igmp(SOURCE_2, "224.0.0.1", IGMPv3_MQ()),
    igmp(SOURCE_2, "224.0.0.22", IGMPv3_MR(records=[IGMPv3_MR_Group(rtype=4, maddr="239.6.6.6")])),
]


@contextlib.contextmanager
def on_the_wire(star: Star) -> Iterator[None]:
    """FRAMES ten times a second."""
    done = threading.Event()

    def send() -> None:
        while not done.wait(0.1):
            send_frames(star.source, "s0", FRAMES)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def mrelay(relay: Relay, *arguments: str) -> str:
    return relay.namespace.run(sys.executable, "-m", "mrelay", *arguments, "--socket", str(relay.socket))


def test_what_is_heard_can_be_relayed(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    config = rule("known", "in0:239.1.1.1:5000", "out0:239.1.1.1:5000")
    with Relay(star.relay, config) as relay, on_the_wire(star):
        found = json.loads(mrelay(relay, "discover", "in0", "--seconds", "2.5", "--to", "out0", "--json"))
        groups = {(one["group"], one["port"]): one for one in found["groups"]}
        with subtests.test("traffic"):
            _check_traffic(groups)
        with subtests.test("names, members, querier"):
            assert groups["232.8.8.8", 8000]["names"] == ["Studio B (video)"]
            assert groups["239.6.6.6", None]["members"] == [SOURCE_2]
            assert found["queriers"] == [{"address": SOURCE_2, "protocol": "IGMP", "version": 3}]
            assert "10.9.9.9" not in {group for group, _ in groups}
            assert found["missed"] == 0
        with subtests.test("every suggestion is taken"):
            for one in found["groups"]:
                line = shlex.split(one["rule"])
                assert line[:3] == ["mrelay", "rule", "add"]
                if not one["rules"]:
                    mrelay(relay, *line[1:])
            rules = relay.rules()
            assert rules["studio-b"]["from"] == f"in0:{SOURCE_2}@232.8.8.8:8000"
            assert rules["239.7.7.7-7000"]["to"] == ["out0:*:*,ttl=8"]
            assert rules["239.6.6.6-all"]["from"] == "in0:239.6.6.6:*"
        with subtests.test("and relays"), Capture(star.sink, "k0") as wire:
            want = {"239.7.7.7", "ff3e::7", "239.1.1.1"}
            seen: set[str] = set()

            def all_seen() -> bool:
                seen.update(packet.destination for packet in wire.arrived())
                return want <= seen

            eventually(all_seen, f"{want} relayed")
        with subtests.test("then they have rules"):
            text = mrelay(relay, "discover", "in0", "--seconds", "1")
            assert "studio-b" not in text or "mrelay rule add studio-b" not in text
            assert "known" in text and "rule add known" not in text


def _check_traffic(groups: dict[tuple[str, int | None], dict[str, Any]]) -> None:
    one = groups["239.7.7.7", 7000]
    (source,) = one["sources"]
    assert (one["vlan"], source["address"], source["ttl"]) == (20, SOURCE, 1)
    assert 5 <= one["packets"] <= 40 and one["bytes"] == one["packets"] * 100
    assert 1 < one["pps"] < 30 and one["bps"] == pytest.approx(one["pps"] * 800, rel=0.01)
    assert source["host"] == "camera.local"
    assert groups["ff3e::7", 7000]["sources"][0]["address"] == SOURCE_6
    assert groups["239.1.1.1", 5000]["rules"] == ["known"]


def test_a_group_is_joined_when_asked_for_and_left_at_the_end(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        command = [sys.executable, "-m", "mrelay", "discover", "in0", "--seconds", "30", "--json"]
        command += ["--join", "239.9.9.9", "--socket", str(relay.socket)]
        with subprocess.Popen(["ip", "netns", "exec", star.relay.name, *command]) as process:
            try:
                eventually(lambda: "239.9.9.9" in star.relay.groups("in0"), "joined")
            finally:
                process.terminate()
        eventually(lambda: "239.9.9.9" not in star.relay.groups("in0"), "left")


def test_a_bad_request_says_how_to_mend_it(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        for body, key, says in (
            ({"interface": "in00"}, "interface", "did you mean 'in0'?"),
            ({}, "interface", "nothing is no interface"),
            ({"interface": "in0", "seconds": 0}, "seconds", "not a number from above 0"),
            ({"interface": "in0", "to": 5}, "to", "5 is no interface"),
            ({"interface": "in0", "join": []}, "join", "there is no key"),
        ):
            status, answer = relay.request("POST", "/v1/discover", body)
            (error,) = answer["errors"]
            assert (status, error["key"]) == (422, key)
            assert says in f"{error['problem']} {error['remedy']}"
