"""AF_PACKET receive rings: opening one (supervisor), its geometry and statistics (worker).

Owns the constants and layouts of linux/if_packet.h, linux/virtio_net.h and linux/filter.h that mrelay
uses. `open_ring` needs CAP_NET_RAW; nothing here blocks.
"""

import ctypes
import mmap
import socket
import struct
from typing import Final

SOL_PACKET: Final = 263  # linux/socket.h
ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h

# linux/if_packet.h
PACKET_RX_RING: Final = 5
PACKET_STATISTICS: Final = 6
PACKET_COPY_THRESH: Final = 7
PACKET_VERSION: Final = 10
PACKET_RESERVE: Final = 12
PACKET_VNET_HDR: Final = 15
PACKET_FANOUT: Final = 18
PACKET_IGNORE_OUTGOING: Final = 23
TPACKET_V2: Final = 1
PACKET_FANOUT_HASH: Final = 0
PACKET_FANOUT_FLAG_UNIQUEID: Final = 0x2000
PACKET_FANOUT_FLAG_DEFRAG: Final = 0x8000

TP_STATUS_KERNEL: Final = 0
TP_STATUS_USER: Final = 1 << 0
TP_STATUS_COPY: Final = 1 << 1  # the whole frame waits in the socket's queue
TP_STATUS_LOSING: Final = 1 << 2
TP_STATUS_VLAN_VALID: Final = 1 << 4

# struct tpacket2_hdr: status len snaplen (u32), mac net (u16), sec nsec (u32), vlan_tci vlan_tpid (u16)
TPACKET2_HDR: Final = struct.Struct("=IIIHHIIHH")
VIRTIO_NET_HDR: Final = struct.Struct("=BBHHHH")  # flags gso_type hdr_len gso_size csum_start csum_offset
VIRTIO_NET_HDR_GSO_NONE: Final = 0  # linux/virtio_net.h
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5  # linux/virtio_net.h

SLOT: Final = 2048  # bytes a ring slot
# With TPACKET_V2 and a virtio-net header the network header lies at TPACKET_ALIGN(52 + 16) + 10 + reserve,
# whatever the link layer; a reserve of 6 makes that 96, so IPv6 addresses lie on 8-byte boundaries.
L3_OFFSET: Final = 96
_RESERVE: Final = 6
_BLOCK: Final = 64 * 1024  # bytes; a small order, so that a fragmented machine can still give them
_QUEUE: Final = 128 << 20  # bytes of frames longer than a slot that may wait; only used when used

_DROP_ALL = (ctypes.c_char * 8).from_buffer_copy(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0
SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h


def open_ring(ifindex: int, slots: int, fanout: int | None) -> tuple[socket.socket, int]:
    """A bound TPACKET_V2 ring that lets nothing in until its owner attaches a filter.

    `fanout` is the id of the interface's PACKET_FANOUT group, None to found one; the id is returned.
    The group spreads flows by hash, and is also what makes the kernel put fragments together. OSError
    as the kernel says it.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        _drop_everything(sock)
        for option, value in (
            (PACKET_VERSION, TPACKET_V2),
            (PACKET_VNET_HDR, 1),
            (PACKET_RESERVE, _RESERVE),
            (PACKET_COPY_THRESH, 1),
            (PACKET_IGNORE_OUTGOING, 1),
        ):
            sock.setsockopt(SOL_PACKET, option, value)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _QUEUE)
        request = struct.pack("=IIII", _BLOCK, slots * SLOT // _BLOCK, SLOT, slots)
        sock.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        sock.bind((socket.if_indextoname(ifindex), ETH_P_ALL))
        return sock, _join_fanout(sock, fanout)
    except BaseException:
        sock.close()
        raise


def _join_fanout(sock: socket.socket, fanout: int | None) -> int:
    flags = PACKET_FANOUT_HASH | PACKET_FANOUT_FLAG_DEFRAG
    if fanout is None:
        flags |= PACKET_FANOUT_FLAG_UNIQUEID
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, ((fanout or 0) | flags << 16).to_bytes(4, "little"))
    return sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF


def _drop_everything(sock: socket.socket) -> None:
    program = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))  # struct sock_fprog, linux/filter.h
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def map_ring(fd: int, slots: int) -> mmap.mmap:
    """The ring's memory, `slots` times SLOT bytes, shared with the kernel."""
    return mmap.mmap(fd, slots * SLOT, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def ring_drops(sock: socket.socket) -> int:
    """Frames that found the ring full since the last call (struct tpacket_stats, linux/if_packet.h).

    A merged frame counts as one: the kernel does not say how many datagrams it held.
    """
    _, drops = struct.unpack("=II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(drops)
