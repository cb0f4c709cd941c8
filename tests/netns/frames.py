"""Ethernet, IP and UDP bytes: what the tests put on the wire and how they read what comes off it.

Pure functions and one dataclass; no I/O. Written here, byte by byte, so that the relay's own codec is
checked against something other than itself.
"""

import ipaddress
import struct
from dataclasses import dataclass

ETH_P_IP = 0x0800  # linux/if_ether.h
ETH_P_8021Q = 0x8100
ETH_P_IPV6 = 0x86DD
IPPROTO_UDP = 17
IP_DF = 0x4000
IP_MF = 0x2000
ROUTER_ALERT = bytes((0x94, 4, 0, 0))  # RFC 2113


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`; 0 over data that holds its own checksum."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(source: str, destination: str, length: int, protocol: int = IPPROTO_UDP) -> bytes:
    """What the UDP checksum covers besides the datagram (RFC 768, RFC 8200 §8.1)."""
    src, dst = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if src.version == 4:
        return src.packed + dst.packed + struct.pack("!BBH", 0, protocol, length)
    return src.packed + dst.packed + struct.pack("!IxxxB", length, protocol)


def udp(source: str, destination: str, sport: int, dport: int, payload: bytes) -> bytes:
    """A UDP datagram with its checksum."""
    length = 8 + len(payload)
    bare = struct.pack("!HHHH", sport, dport, length, 0) + payload
    value = checksum(pseudo_header(source, destination, length) + bare) or 0xFFFF
    return bare[:6] + struct.pack("!H", value) + payload


def ipv4(
    source: str,
    destination: str,
    payload: bytes,
    *,
    protocol: int = IPPROTO_UDP,
    ttl: int = 16,
    tos: int = 0,
    options: bytes = b"",
    ident: int = 1,
    fragment: int = IP_DF,
) -> bytes:
    """An IPv4 packet; `fragment` is the flags and offset field (RFC 791)."""
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 0x40 | words, tos, words * 4 + len(payload), ident, fragment, ttl, protocol, 0)
    addresses = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
    value = checksum(head + addresses + options)
    return head[:10] + struct.pack("!H", value) + addresses + options + payload


def ipv6(
    source: str,
    destination: str,
    payload: bytes,
    *,
    next_header: int = IPPROTO_UDP,
    hops: int = 16,
    tos: int = 0,
) -> bytes:
    """An IPv6 packet (RFC 8200)."""
    head = struct.pack("!IHBB", 0x60000000 | tos << 20, len(payload), next_header, hops)
    return head + ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(destination).packed + payload


def multicast_mac(group: str) -> bytes:
    """The Ethernet address of an IP group (RFC 1112 §6.4, RFC 2464 §7)."""
    address = ipaddress.ip_address(group)
    if address.version == 4:
        low = int(address) & 0x7FFFFF
        return b"\x01\x00\x5e" + low.to_bytes(3, "big")
    return b"\x33\x33" + address.packed[-4:]


def ethernet(destination: bytes, packet: bytes, *, vlan: int | None = None, ethertype: int | None = None) -> bytes:
    """A frame around an IP packet, 802.1Q-tagged when `vlan` is given."""
    if ethertype is None:
        ethertype = ETH_P_IPV6 if packet[:1] and packet[0] >> 4 == 6 else ETH_P_IP
    tag = b"" if vlan is None else struct.pack("!HH", ETH_P_8021Q, vlan)
    return destination + b"\x02\0\0\0\0\x01" + tag + struct.pack("!H", ethertype) + packet


def udp_frame(
    source: str, group: str, port: int, payload: bytes, *, vlan: int | None = None, ttl: int = 16
) -> bytes:
    """A whole good frame to a group, from source port 4000."""
    datagram = udp(source, group, 4000, port, payload)
    if ipaddress.ip_address(group).version == 6:
        return ethernet(multicast_mac(group), ipv6(source, group, datagram, hops=ttl), vlan=vlan)
    return ethernet(multicast_mac(group), ipv4(source, group, datagram, ttl=ttl), vlan=vlan)


@dataclass(frozen=True)
class Packet:
    """One UDP packet as it was on the wire. `checksum_good` is None when the wire left it to hardware."""

    vlan: int | None
    source_mac: bytes
    destination_mac: bytes
    source: str
    destination: str
    sport: int
    dport: int
    ttl: int
    dscp: int
    payload: bytes
    header_good: bool
    checksum_good: bool | None
    ecn: int = 0


def parse(frame: bytes, *, vlan: int | None = None, partial: bool = False) -> Packet | None:
    """The UDP packet in an Ethernet frame; None when it holds something else or a fragment."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    start = 14
    if ethertype == ETH_P_8021Q:
        tci, ethertype = struct.unpack_from("!HH", frame, 14)
        vlan, start = tci & 0xFFF, 18
    if ethertype == ETH_P_IP:
        return _parse_ipv4(frame, start, vlan, partial)
    if ethertype == ETH_P_IPV6:
        return _parse_ipv6(frame, start, vlan, partial)
    return None


def _parse_ipv4(frame: bytes, start: int, vlan: int | None, partial: bool) -> Packet | None:
    head = (frame[start] & 15) * 4
    tos, length, _, fragment, ttl, protocol = struct.unpack_from("!xBHHHBB", frame, start)
    if protocol != IPPROTO_UDP or fragment & (IP_MF | 0x1FFF):
        return None
    source = str(ipaddress.IPv4Address(frame[start + 12 : start + 16]))
    destination = str(ipaddress.IPv4Address(frame[start + 16 : start + 20]))
    good = checksum(frame[start : start + head]) == 0
    datagram = frame[start + head : start + length]
    return _parse_udp(frame, datagram, (source, destination), (vlan, ttl, tos, good, partial))


def _parse_ipv6(frame: bytes, start: int, vlan: int | None, partial: bool) -> Packet | None:
    first, length, following, hops = struct.unpack_from("!IHBB", frame, start)
    if following != IPPROTO_UDP:
        return None
    source = str(ipaddress.IPv6Address(frame[start + 8 : start + 24]))
    destination = str(ipaddress.IPv6Address(frame[start + 24 : start + 40]))
    datagram = frame[start + 40 : start + 40 + length]
    return _parse_udp(frame, datagram, (source, destination), (vlan, hops, first >> 20 & 255, True, partial))


def _parse_udp(
    frame: bytes, datagram: bytes, ends: tuple[str, str], rest: tuple[int | None, int, int, bool, bool]
) -> Packet:
    sport, dport, length, _ = struct.unpack_from("!HHHH", datagram)
    vlan, ttl, tos, header_good, partial = rest
    whole = length == len(datagram) and checksum(pseudo_header(*ends, length) + datagram) == 0
    return Packet(
        vlan=vlan,
        source_mac=frame[6:12],
        destination_mac=frame[:6],
        source=ends[0],
        destination=ends[1],
        sport=sport,
        dport=dport,
        ttl=ttl,
        dscp=tos >> 2,
        ecn=tos & 3,
        payload=datagram[8:length],
        header_good=header_good,
        checksum_good=None if partial else whole,
    )
