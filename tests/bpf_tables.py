"""Packet tables of the programs at ingress: frames, and what is to become of them, for tc and XDP alike.

Expected frames are built by Scapy from nothing but the table, checksums included.
"""

from collections.abc import Callable
from typing import Any

from scapy.layers.inet import IP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from bpf_rig import HOP_SOURCE, HOP_SOURCE_6, NEXT_MAC, OWN_MAC, FastPath, Out, key, packed

S4, G4, S6, G6 = "10.9.9.9", "239.1.1.1", "fd99::9", "ff3e::1:2345:6789"
PAYLOAD = b"0123456789" * 10
KEY4, KEY6 = key(S4, G4, 5000), key(S6, G6, 5000)
ECT = 1


def bytes_of(packet: Any) -> bytes:
    """Scapy's packet with all that it computes."""
    return bytes(packet)


def v4(payload: bytes = PAYLOAD, *, check: int | None = None, **fields: Any) -> Any:
    """A datagram of the flow KEY4."""
    ip = {"src": S4, "dst": G4, "ttl": 16, "id": 77, "tos": 0x28 | ECT, **fields}
    return Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01") / IP(**ip) / _udp(4000, 5000, payload, check)


def v6(payload: bytes = PAYLOAD, *, check: int | None = None, **fields: Any) -> Any:
    """A datagram of the flow KEY6."""
    ip = {"src": S6, "dst": G6, "hlim": 16, "fl": 0x12345, "tc": 0x28 | ECT, **fields}
    return Ether(src="02:00:00:00:00:01", dst="33:33:23:45:67:89") / IPv6(**ip) / _udp(4000, 5000, payload, check)


def _udp(sport: int, dport: int, payload: bytes, check: int | None) -> Any:
    fields = {} if check is None else {"chksum": check}
    return UDP(sport=sport, dport=dport, **fields) / Raw(payload)


def sent4(mac: bytes | str = "01:00:5e:02:02:02", *, check: int | None = None, **fields: Any) -> bytes:
    """What is to leave for the usual output, but for `fields`."""
    mac = mac if isinstance(mac, str) else mac.hex(":")
    ip = {"src": HOP_SOURCE, "dst": "239.2.2.2", "ttl": 15, "id": 77, "tos": 0x28 | ECT, "flags": "DF", **fields}
    return bytes_of(Ether(src=OWN_MAC.hex(":"), dst=mac) / IP(**ip) / _udp(40001, 6000, PAYLOAD, check))


def sent6(mac: bytes | str = "33:33:00:00:00:07", **fields: Any) -> bytes:
    """The same for IPv6."""
    mac = mac if isinstance(mac, str) else mac.hex(":")
    ip = {"src": HOP_SOURCE_6, "dst": "ff3e::7", "hlim": 15, "fl": 0x12345, "tc": 0x28 | ECT, **fields}
    return bytes_of(Ether(src=OWN_MAC.hex(":"), dst=mac) / IPv6(**ip) / _udp(40001, 6000, PAYLOAD, None))


CARRIED4: dict[str, tuple[Any, Out, bytes]] = {
    "plain": (v4(), Out(), sent4()),
    "low group bits": (v4(), Out("239.255.2.2"), sent4("01:00:5e:7f:02:02", dst="239.255.2.2")),
    "unicast": (v4(), Out("10.1.0.2"), sent4(NEXT_MAC, dst="10.1.0.2")),
    "ttl set": (v4(), Out(ttl=64), sent4(ttl=64)),
    "ttl set for a ttl of 1": (v4(ttl=1), Out(ttl=64), sent4(ttl=64)),
    "ttl 2": (v4(ttl=2), Out(), sent4(ttl=1)),
    "dscp set, ECN kept": (v4(), Out(dscp=46), sent4(tos=46 << 2 | ECT)),
    "dscp 0": (v4(), Out(dscp=0), sent4(tos=ECT)),
    "source kept": (v4(), Out(keep=True), sent4(src=S4)),
    "source of its own": (v4(), Out(source="10.7.7.7"), sent4(src="10.7.7.7")),
    "DF from the sender": (v4(flags="DF"), Out(), sent4()),
    "no UDP checksum": (v4(check=0), Out(), sent4(check=0)),
    "padded": (Raw(bytes_of(v4()) + bytes(6)), Out(), sent4()),
}
CARRIED6: dict[str, tuple[Any, Out, bytes]] = {
    "plain": (v6(), Out("ff3e::7"), sent6()),
    "unicast": (v6(), Out("fd00:1::2"), sent6(NEXT_MAC, dst="fd00:1::2")),
    "hop limit set": (v6(), Out("ff3e::7", ttl=255), sent6(hlim=255)),
    "dscp set, ECN kept": (v6(), Out("ff3e::7", dscp=46), sent6(tc=46 << 2 | ECT)),
    "source kept": (v6(), Out("ff3e::7", keep=True), sent6(src=S6)),
    "source of its own": (v6(), Out("ff3e::7", source="fd77::7"), sent6(src="fd77::7")),
}


SHAPES: dict[str, Any] = {
    "options": v4(options=[IPOption_Router_Alert()]),
    "first fragment": v4(flags="MF"),
    "later fragment": v4(frag=100),
    "IPv4 checksum": v4(chksum=0x1234),
    "TCP": v4(proto=6),
    "version 5": v4(version=5),
    "IP longer than the frame": v4(len=2000),
    "IP shorter than its headers": v4(len=27),
    "UDP longer than IP": Raw(bytes_of(v4())[:38] + b"\x01\x00" + bytes_of(v4())[40:]),
    "UDP shorter than IP": Raw(bytes_of(v4())[:38] + b"\x00\x50" + bytes_of(v4())[40:]),
    "UDP shorter than its header": Raw(bytes_of(v4())[:38] + b"\x00\x07" + bytes_of(v4())[40:]),
    "cut off in UDP": Raw(bytes_of(v4())[:40]),
    "extension header": Ether(bytes_of(v6())[:14]) / IPv6(src=S6, dst=G6) / IPv6ExtHdrDestOpt() / UDP(dport=5000),
    "IPv6 without checksum": v6(check=0),
    "IPv6 longer than the frame": v6(plen=2000),
    "IPv6 cut off": Raw(bytes_of(v6())[:60]),
}


OTHERS = {
    "source": key("10.9.9.8", G4, 5000), "group": key(S4, "239.1.1.2", 5000), "port": key(S4, G4, 5001),
    "interface": key(S4, G4, 5000, ifindex=2), "VLAN": key(S4, G4, 5000, vlan=7),
}  # fmt: skip


Change = Callable[[FastPath], None]
REFUSALS: dict[str, tuple[Any, Out, Change, str]] = {
    "ttl 1": (v4(ttl=1), Out(), lambda path: None, "ttl"),
    "ttl 0": (v4(ttl=0), Out(), lambda path: None, "ttl"),
    "above the MTU": (v4(), Out(), lambda path: path.set_hop(mtu=127, source=packed(HOP_SOURCE)), "too_big"),
    "hop not ready": (v4(), Out(), lambda path: path.set_hop(flags=0), "hop"),
    "no source": (v4(), Out(), lambda path: path.set_hop(source=bytes(16)), "hop"),
    "no such hop": (v4(), Out(hop=1 << 20), lambda path: None, "hop"),
}
