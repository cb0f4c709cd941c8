"""Taps: AF_PACKET sockets that get copies of some frames of an interface, for who looks at traffic.

Owns a tap's filter, its options and how a frame is read from it. The supervisor opens taps (`open_tap` needs
CAP_NET_RAW), control reads them (`read`, needs nothing). Nothing here blocks.
"""

import ctypes
import mmap
import os
import socket
import struct
import sys
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NamedTuple

from mrelay.kernel import cbpf
from mrelay.kernel.cbpf import (
    BPF_ABS,
    BPF_JEQ,
    BPF_JMP,
    BPF_K,
    BPF_LD,
    SKF_AD_OFF,
    SKF_AD_PROTOCOL,
    SKF_NET_OFF,
    Insn,
)
from mrelay.kernel.packet import (
    ETH_P_ALL,
    PACKET_IGNORE_OUTGOING,
    PACKET_VNET_HDR,
    SOL_PACKET,
    TP_STATUS_VLAN_VALID,
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_GSO_NONE,
)

Network = IPv4Network | IPv6Network

# linux/if_packet.h
PACKET_AUXDATA: Final = 8
PACKET_TX_RING: Final = 13
PACKET_OUTGOING: Final = 4
TPACKET_AUXDATA: Final = struct.Struct("=IIIHHHH")  # status len snaplen (u32), mac net vlan_tci vlan_tpid (u16)
SOCKADDR_LL: Final = struct.Struct("=HHiHBB8s")  # family protocol ifindex hatype pkttype halen addr
_SMALLEST_FRAME: Final = 64  # bytes: TPACKET_ALIGN(TPACKET_HDRLEN), which the kernel asks for at least

# asm-generic/socket.h
SO_RCVBUFFORCE: Final = 33
SO_TIMESTAMPNS: Final = 35
SO_RXQ_OVFL: Final = 40
_TIMESPEC: Final = struct.Struct("@ll")  # struct timespec

# linux/filter.h, linux/bpf_common.h
SKF_AD_PKTTYPE: Final = 4
SKF_AD_RANDOM: Final = 56
BPF_B: Final = 0x10
BPF_ALU: Final = 0x04
BPF_AND: Final = 0x50
BPF_MOD: Final = 0x90

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1  # linux/virtio_net.h
IPV4_PROTOCOL: Final = 9  # RFC 791 §3.1, offset in the header
IPV6_NEXT_HEADER: Final = 6  # RFC 8200 §3
IPPROTO_IGMP: Final = 2
IPPROTO_HOPOPTS: Final = 0  # with which every MLD message begins: RFC 3810 §5
IPPROTO_FRAGMENT: Final = 44
BUFFER: Final = 4 << 20  # bytes: some fifty merged frames, or two thousand others
MOST: Final = 65535 + 256  # bytes: an IP packet, and any link-layer header
_libc = ctypes.CDLL(None, use_errno=True)
UNUSED: Final = 0x88B6  # linux/if_ether.h: IEEE 802 local experimental, which no filter of ours lets in


class Frame(NamedTuple):
    """One frame as a tap had it. `time`: nanoseconds since 1970, 0 when the tap is not timed.

    `network`: where the network header is in `data`. `length`: what it had on the wire, with link-layer header;
    `data` is its beginning. `segment`: the payload of each datagram in a merged frame, 0 for a single datagram.
    `complete`: its transport checksum is there; not in frames that this host still has to finish. `missed`: frames
    before it that found the buffer full, since the tap was opened.
    """

    time: int
    vlan: int | None
    data: bytes
    network: int
    length: int
    segment: int
    outgoing: bool
    complete: bool
    missed: int


def tap_filter(
    networks: Sequence[Network],
    snap: int,
    *,
    membership: bool = False,
    incoming: bool = True,
    outgoing: bool = False,
    one_in: int = 1,
) -> list[Insn]:
    """Lets in `snap` bytes of IP packets to `networks`, of those by chance one in `one_in`; of hosts UDP alone.

    `membership`: all of IGMP, and IPv6 multicast with a hop-by-hop header, such as MLD, too.
    """
    v4 = [_range(network) for network in networks if network.version == 4]
    v6 = [_range(network) for network in networks if network.version == 6]
    program = [
        *_direction(incoming=incoming, outgoing=outgoing),
        *(_MEMBERSHIP if membership else ()),
        *(_sample(one_in) if one_in > 1 else ()),
        *_HOSTS_UDP,
        *cbpf.group_filter(v4, v6, limit=cbpf.BPF_MAXINSNS - 64),
    ]
    return [cbpf.ret(snap) if insn == cbpf.ret(cbpf.ACCEPT) else insn for insn in program]


def _range(network: Network) -> cbpf.Range:
    return int(network.network_address), int(network.broadcast_address)


def _byte(offset: int) -> Insn:
    return Insn(BPF_LD | BPF_B | BPF_ABS, 0, 0, offset & 0xFFFFFFFF)


def _unless(k: int, skip: int) -> Insn:
    """Skip so many instructions if the accumulator is not `k`."""
    return Insn(BPF_JMP | BPF_JEQ | BPF_K, 0, skip, k)


def _direction(*, incoming: bool, outgoing: bool) -> list[Insn]:
    kind = cbpf.load(SKF_AD_OFF + SKF_AD_PKTTYPE)
    leaving = Insn(BPF_JMP | BPF_JEQ | BPF_K, 0 if not outgoing else 1, 1 if incoming else 0, PACKET_OUTGOING)
    if incoming and outgoing:
        return []
    return [kind, leaving, cbpf.ret(cbpf.DROP)]


_MEMBERSHIP: Final = (
    cbpf.load(SKF_AD_OFF + SKF_AD_PROTOCOL),
    _unless(cbpf.ETH_P_IP, 3),
    _byte(SKF_NET_OFF + IPV4_PROTOCOL),
    _unless(IPPROTO_IGMP, 7),
    cbpf.ret(cbpf.ACCEPT),
    _unless(cbpf.ETH_P_IPV6, 5),
    _byte(SKF_NET_OFF + IPV6_NEXT_HEADER),
    _unless(IPPROTO_HOPOPTS, 3),
    _byte(SKF_NET_OFF + cbpf.IPV6_DESTINATION),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0xFF),
    cbpf.ret(cbpf.ACCEPT),
)


def _sample(one_in: int) -> list[Insn]:
    return [
        cbpf.load(SKF_AD_OFF + SKF_AD_RANDOM),
        Insn(BPF_ALU | BPF_MOD | BPF_K, 0, 0, one_in),
        Insn(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, 0),
        cbpf.ret(cbpf.DROP),
    ]


# What is no multicast goes on only if it is UDP (in IPv6 also a fragment, whose protocol is not at hand).
_HOSTS_UDP: Final = (
    cbpf.load(SKF_AD_OFF + SKF_AD_PROTOCOL),
    _unless(cbpf.ETH_P_IP, 6),
    _byte(SKF_NET_OFF + cbpf.IPV4_DESTINATION),
    Insn(BPF_ALU | BPF_AND | BPF_K, 0, 0, 0xF0),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 10, 0, 0xE0),
    _byte(SKF_NET_OFF + IPV4_PROTOCOL),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 8, 0, socket.IPPROTO_UDP),
    cbpf.ret(cbpf.DROP),
    _unless(cbpf.ETH_P_IPV6, 6),
    _byte(SKF_NET_OFF + cbpf.IPV6_DESTINATION),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 4, 0, 0xFF),
    _byte(SKF_NET_OFF + IPV6_NEXT_HEADER),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, socket.IPPROTO_UDP),
    Insn(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, IPPROTO_FRAGMENT),
    cbpf.ret(cbpf.DROP),
)


def open_tap(
    ifindex: int, program: Sequence[Insn], *, outgoing: bool, protocol: int = ETH_P_ALL, timed: bool = True
) -> socket.socket:
    """A non-blocking tap on an interface, its filter locked. OSError as the kernel says it.

    ETH_P_ALL gets frames before tc does, ETH_P_IP and ETH_P_IPV6 incoming ones that tc passed on. While a tap that
    is `timed` is open, the kernel takes the time of every frame on this host (net_enable_timestamp()): 5 % of what
    it can forward.

    Whoever has its descriptor can send no packet through it: its transmit ring takes frames of 22 bytes at most.
    """
    name = socket.if_indextoname(ifindex)  # first: to close such a socket takes the kernel some 20 ms
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        cbpf.attach(sock, program)
        sock.setsockopt(socket.SOL_SOCKET, cbpf.SO_LOCK_FILTER, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, int(timed))
        sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        for option, value in (
            (PACKET_VNET_HDR, 1),
            (PACKET_AUXDATA, 1),
            (PACKET_IGNORE_OUTGOING, int(not outgoing)),
        ):
            sock.setsockopt(SOL_PACKET, option, value)
        # struct tpacket_req; a socket with a transmit ring sends from there alone
        ring = struct.pack("=IIII", mmap.PAGESIZE, 1, _SMALLEST_FRAME, mmap.PAGESIZE // _SMALLEST_FRAME)
        sock.setsockopt(SOL_PACKET, PACKET_TX_RING, ring)
        sock.bind((name, protocol))
    except BaseException:
        sock.close()
        raise
    return sock


def is_deaf(sock: socket.socket) -> bool:
    """Whether its interface was removed, or moved to another namespace: then nothing comes any more, even when it
    is back under the same number. (A link that is down says the same ENETDOWN, and comes again.)
    """
    address, size = ctypes.create_string_buffer(SOCKADDR_LL.size), ctypes.c_uint32(SOCKADDR_LL.size)
    if _libc.getsockname(sock.fileno(), address, ctypes.byref(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return bool(SOCKADDR_LL.unpack(address.raw)[2] < 0)  # packet_notifier() in net/packet/af_packet.c


def disarm(sock: socket.socket) -> None:
    """No copy of this socket gets a frame from now on."""
    sock.bind(("lo", UNUSED))


def read(sock: socket.socket, buffer: bytearray) -> Frame | None:
    """The next frame; `buffer` is of VIRTIO_NET_HDR.size and the snap length. None for one that makes no sense.

    BlockingIOError when there is none. OSError: ENETDOWN once when the interface went down, EINVAL for a frame
    that the kernel can't describe.
    """
    size, ancillary, _, address = sock.recvmsg_into([buffer], 256)
    status = length = network = tci = time = missed = 0
    for level, kind, data in ancillary:
        if level == SOL_PACKET and kind == PACKET_AUXDATA:
            status, length, _, _, network, tci, _ = TPACKET_AUXDATA.unpack_from(data)
        elif level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            time = seconds * 1_000_000_000 + nanoseconds
        elif level == socket.SOL_SOCKET and kind == SO_RXQ_OVFL:
            missed = int.from_bytes(data, sys.byteorder)
    if size < VIRTIO_NET_HDR.size or length == 0:
        return None
    flags, gso_type, _, gso_size, _, _ = VIRTIO_NET_HDR.unpack_from(buffer)
    return Frame(
        time=time,
        vlan=tci & 0xFFF if status & TP_STATUS_VLAN_VALID else None,
        data=bytes(memoryview(buffer)[VIRTIO_NET_HDR.size : size]),
        network=network,
        length=length,
        segment=gso_size if gso_type != VIRTIO_NET_HDR_GSO_NONE else 0,
        outgoing=address[2] == PACKET_OUTGOING,
        complete=not flags & VIRTIO_NET_HDR_F_NEEDS_CSUM,
        missed=missed,
    )
