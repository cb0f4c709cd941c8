"""`mrelay capture`: what comes in, goes out and is dropped, opened by tshark where there is one, else by Scapy."""

import contextlib
import json
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.utils import RawPcapNgReader

from netns.frames import ethernet, ipv4, multicast_mac, udp, udp_frame
from netns.lab import SOURCE, SOURCE_6, Lab, Namespace, eventually
from netns.relay import Relay, rule
from netns.traffic import Sender, payloads, send_frames

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
COUNT = 30


class Capturing:
    """`mrelay capture` as it runs; `packets` waits for its end and reads the file."""

    def __init__(self, relay: Relay, folder: Path, *arguments: str) -> None:
        self.file = folder / f"{len(list(folder.iterdir()))}.pcapng"
        words = [sys.executable, "-m", "mrelay", "capture", *arguments, "-w", str(self.file)]
        words += ["--socket", str(relay.socket)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", relay.namespace.name, *words], stderr=subprocess.PIPE, text=True
        )
        eventually(lambda: self.file.exists() and self.file.stat().st_size > 0, "the capture has begun")

    def packets(self) -> list[tuple[bytes, str]]:
        """Each packet's bytes and comment."""
        _, self.said = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, self.said
        read = list(RawPcapNgReader(str(self.file)))
        return [(data, meta.comments[0].decode() if meta.comments else "") for data, meta in read]


@contextlib.contextmanager
def capturing(relay: Relay, folder: Path, *arguments: str) -> Iterator[Capturing]:
    made = Capturing(relay, folder, *arguments)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def is_sound(data: bytes) -> Any:
    """The packet, whose checksums are right."""
    read = Ether(data)
    again = Ether(data)
    for layer in (IP, UDP):
        if layer in again:
            del again[layer].chksum
    assert bytes(again) == data, read.show(dump=True)
    return read


def test_in_and_out(lab: Lab, folder: Path, subtests: pytest.Subtests) -> None:
    star = lab.star(offload=True)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000,ttl=9")
    config += rule("b", "in0:[ff3e::1]:5000", "out0:*:*") + rule("v", "in0:239.1.1.9:5000,vlan=20", "out0:*:*")
    sent, twice = payloads(COUNT), ("--packets", str(2 * COUNT))
    with Relay(star.relay, config) as relay, Sender(star.source) as v4, Sender(star.source, SOURCE_6) as v6:
        with subtests.test("in, one by one and merged"), capturing(relay, folder, "a", *twice) as got:
            v4.send(GROUP, 5001, [b"another port"])
            v4.send(GROUP, 5000, sent)
            v4.send_segmented(GROUP, 5000, sent)
            packets = [is_sound(data) for data, _ in got.packets()]
            assert [bytes(packet[UDP].payload) for packet in packets] == sent * 2
            assert {(packet[IP].src, packet[IP].dst, packet[IP].ttl) for packet in packets} == {
                (SOURCE, GROUP, 16)
            }
            assert "60 packets" in got.said
        with subtests.test("out"):
            with capturing(relay, folder, "a", "--side", "out", *twice) as got:
                v4.send(GROUP, 5000, sent)
                v4.send_segmented(GROUP, 5000, sent)
                packets = [is_sound(data) for data, _ in got.packets()]
            assert [bytes(packet[UDP].payload) for packet in packets] == sent * 2
            assert {(packet[IP].dst, packet[UDP].dport, packet[IP].ttl) for packet in packets} == {
                ("239.2.2.2", 6000, 9)
            }
        with subtests.test("a flow, IPv6"):
            with capturing(relay, folder, f"in0:[{SOURCE_6}]@[ff3e::1]:5000", "--packets", str(COUNT)) as got:
                v6.send("ff3e::1", 5000, sent)
                packets = [is_sound(data) for data, _ in got.packets()]
            assert [bytes(packet[UDP].payload) for packet in packets] == sent
            assert packets[0][IPv6].dst == "ff3e::1"
        with subtests.test("a tag is put back"), capturing(relay, folder, "v", "--packets", "1") as got:
            send_frames(
                star.source, "s0", [udp_frame(SOURCE, "239.1.1.9", 5000, b"x", vlan=vlan) for vlan in (None, 20)]
            )
            (data, _), *rest = got.packets()
            assert is_sound(data)[Dot1Q].vlan == 20 and not rest
        with subtests.test("bounds"):
            with capturing(relay, folder, "a", "--bytes", "2000") as got:
                v4.send(GROUP, 5000, sent)
                assert 3 < len(got.packets()) < 8 and got.file.stat().st_size <= 2000 + 100
            with capturing(relay, folder, "a", "--seconds", "0.3") as got:
                assert got.packets() == [] and "0 packets" in got.said


def bad_checksum() -> bytes:
    frame = bytearray(udp_frame(SOURCE, GROUP, 5000, b"x"))
    frame[24] ^= 1
    return bytes(frame)


DROPPED = {
    "no_rule": [udp_frame(SOURCE, GROUP, 5009, b"x"), udp_frame(SOURCE, GROUP, 5010, b"x")],
    "ttl_expired": [udp_frame(SOURCE, GROUP, 5000, b"x", ttl=1)],
    "malformed": [bad_checksum()],
    "not_udp": [ethernet(multicast_mac(GROUP), ipv4(SOURCE, GROUP, b"abcdefgh", protocol=99))],
    "loop": [udp_frame("10.1.0.1", GROUP, 5000, b"x")],
}


@pytest.mark.parametrize("engine", ["auto", "uring"])
def test_dropped_packets_say_why(lab: Lab, folder: Path, engine: str) -> None:
    star = lab.star()
    config = f'[relay]\nengine = "{engine}"\n' + rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")
    kinds = {**DROPPED, "no_rule": [*DROPPED["no_rule"], udp_frame(SOURCE, GROUP, 5000, b"x", vlan=7)]}
    frames = [frame for several in kinds.values() for frame in several]
    want = {reason: len(several) for reason, several in kinds.items()}
    with Relay(star.relay, config) as relay:
        with capturing(relay, folder, "a", "--side", "dropped", "--packets", str(len(frames))) as got:
            send_frames(star.source, "s0", [udp_frame(SOURCE, GROUP, 5000, b"good"), *frames])
            packets = got.packets()
        counted = relay.await_stats(lambda s: sum(s["drops"].values()) == len(frames), "all dropped")["drops"]
        assert {reason: count for reason, count in counted.items() if count} == want, "as the relay itself counts"
    assert Counter(comment for _, comment in packets) == {f"dropped: {reason}": n for reason, n in want.items()}
    assert [data for data, _ in packets] == frames
    _read_by_tshark(got.file, want)


def _read_by_tshark(file: Path, want: dict[str, int]) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("needs the command tshark")
    words = [
        "tshark",
        "-r",
        str(file),
        "-T",
        "json",
        "-e",
        "frame.comment",
        "-e",
        "ip.dst",
        "-e",
        "frame.interface_name",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=50)
    layers = [packet["_source"]["layers"] for packet in json.loads(done.stdout)]
    assert Counter(one["frame.comment"][0] for one in layers) == {
        f"dropped: {reason}": n for reason, n in want.items()
    }
    assert {tuple(one["frame.interface_name"]) for one in layers} == {("in0",)}
    assert {tuple(one["ip.dst"]) for one in layers} == {(GROUP,)}


def test_a_flood_does_not_starve_the_api_and_a_pipe_works(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")
    with Relay(star.relay, config) as relay:
        words = [sys.executable, "-m", "mrelay", "capture", "a", "-w", "-", "--seconds", "2"]
        words += ["--socket", str(relay.socket)]
        with subprocess.Popen(
            ["ip", "netns", "exec", star.relay.name, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            head = process.stdout.read(8)
            _flood(star.source)
            assert relay.stats()["received"] > 0
            rest, said = process.communicate(timeout=30)
        assert struct.unpack("<I", head[:4]) == (0x0A0D0D0A,)
        assert process.returncode == 0 and b"packets" in said
        assert len(rest) > 1000


def _flood(source: Namespace) -> None:
    datagram = udp(SOURCE, GROUP, 4000, 5000, bytes(1000))
    send_frames(source, "s0", [ethernet(multicast_mac(GROUP), ipv4(SOURCE, GROUP, datagram))] * 20_000)


def test_a_bad_request_says_how_to_mend_it(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")) as relay:
        for body, status, says in (
            ({"what": "b"}, 404, "there is no rule 'b'"),
            ({"what": 5}, 422, "a rule's name, or an input"),
            ({"what": "in0:nonsense:5"}, 422, "nonsense"),
            ({"what": "in9:239.1.1.1:5"}, 422, "did you mean 'in0'?"),
            ({"what": "a", "side": "inside"}, 422, "in, out, dropped"),
            ({"what": "a", "packets": 0}, 422, "packets"),
            ({"what": "in0:239.9.9.9:5", "side": "out"}, 422, "no rule takes it"),
        ):
            got, answer = relay.request("POST", "/v1/capture", body)
            text = json.dumps(answer, ensure_ascii=False)
            assert (got, says in text) == (status, True), text
