"""AF_PACKET receive rings: opening one (supervisor), its geometry and statistics (worker).

Owns the constants and layouts of linux/if_packet.h, linux/virtio_net.h and linux/filter.h that mrelay
uses. `open_ring` needs CAP_NET_RAW; nothing here blocks.
"""

import mmap
import socket
import struct
from typing import Final

from mrelay.kernel.cbpf import DROP_ALL, attach
from mrelay.kernel.libbpf import attach_to

SOL_PACKET: Final = 263  # linux/socket.h
ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
PROTOCOLS: Final = {0: ETH_P_ALL, 4: ETH_P_IP, 6: ETH_P_IPV6}  # by messages.OpenIngress.family

# linux/if_packet.h
PACKET_RX_RING: Final = 5
PACKET_STATISTICS: Final = 6
PACKET_VERSION: Final = 10
PACKET_RESERVE: Final = 12
PACKET_VNET_HDR: Final = 15
PACKET_FANOUT: Final = 18
PACKET_IGNORE_OUTGOING: Final = 23
TPACKET_V2: Final = 1
PACKET_FANOUT_HASH: Final = 0
PACKET_FANOUT_CPU: Final = 2
PACKET_FANOUT_FLAG_UNIQUEID: Final = 0x2000
PACKET_FANOUT_FLAG_DEFRAG: Final = 0x8000

TP_STATUS_KERNEL: Final = 0
TP_STATUS_USER: Final = 1 << 0
TP_STATUS_LOSING: Final = 1 << 2
TP_STATUS_VLAN_VALID: Final = 1 << 4

# struct tpacket2_hdr: status len snaplen (u32), mac net (u16), sec nsec (u32), vlan_tci vlan_tpid (u16)
TPACKET2_HDR: Final = struct.Struct("=IIIHHIIHH")
VIRTIO_NET_HDR: Final = struct.Struct("=BBHHHH")  # flags gso_type hdr_len gso_size csum_start csum_offset
VIRTIO_NET_HDR_GSO_NONE: Final = 0  # linux/virtio_net.h
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5  # linux/virtio_net.h

# With TPACKET_V2 and a virtio-net header the network header lies at TPACKET_ALIGN(52 + 16) + 10 + reserve,
# whatever the link layer; a reserve of 6 makes that 96, so IPv6 addresses lie on 8-byte boundaries.
L3_OFFSET: Final = 96
_RESERVE: Final = 6
SLOT: Final = 2048  # bytes a slot of the ring for short frames
SHORT: Final = SLOT - L3_OFFSET  # bytes, link-layer header included: longer frames go to the other ring
# The ring for long frames: jumbo frames, reassembled datagrams, and the 64 kB that GRO makes.
LONG_SLOT: Final = -(-(65536 + 512) // mmap.PAGESIZE) * mmap.PAGESIZE
_LONG_BLOCK: Final = 15  # slots a block: with 4 kB pages just under 1 MB
LONG_SLOTS: Final = 8 * _LONG_BLOCK  # 120 of them: 8 MB, what comes in while the receive thread has the core (D1)
_SHORT_BLOCK: Final = 32 * max(1, mmap.PAGESIZE // 65536)  # slots a block: 64 kB, a whole page at least


def open_ring(
    ifindex: int,
    slots: int,
    slot: int,
    fanout: int | None,
    *,
    shared: bool,
    protocol: int = ETH_P_ALL,
    program: int | None = None,
) -> tuple[socket.socket, int]:
    """A bound TPACKET_V2 ring of `slots` slots of `slot` bytes (SLOT or LONG_SLOT).

    ETH_P_ALL gets frames before tc does, ETH_P_IP and ETH_P_IPV6 what tc passed on. `program`: an eBPF filter's
    descriptor; with none it lets nothing in until its owner attaches a filter. `fanout` is the id of the ring's
    PACKET_FANOUT group, None to found one; the id is returned. The group of long slots is what makes the kernel
    put fragments together: two would give its one defragmenter each fragment twice. `shared` between workers it
    spreads flows by hash, which costs a look into each packet. OSError as the kernel says it.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        if program is None:
            attach(sock, DROP_ALL)
        else:
            attach_to(sock, program, lock=True)
        for option, value in (
            (PACKET_VERSION, TPACKET_V2),
            (PACKET_VNET_HDR, 1),
            (PACKET_RESERVE, _RESERVE),
            (PACKET_IGNORE_OUTGOING, 1),
        ):
            sock.setsockopt(SOL_PACKET, option, value)
        block = slot * (_SHORT_BLOCK if slot == SLOT else _LONG_BLOCK)
        request = struct.pack("=IIII", block, slots * slot // block, slot, slots)  # struct tpacket_req
        sock.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        sock.bind((socket.if_indextoname(ifindex), protocol))
        kind = PACKET_FANOUT_HASH if shared else PACKET_FANOUT_CPU
        return sock, _join_fanout(sock, fanout, kind | (PACKET_FANOUT_FLAG_DEFRAG if slot != SLOT else 0))
    except BaseException:
        sock.close()
        raise


def _join_fanout(sock: socket.socket, fanout: int | None, flags: int) -> int:
    if fanout is None:
        flags |= PACKET_FANOUT_FLAG_UNIQUEID
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, ((fanout or 0) | flags << 16).to_bytes(4, "little"))
    return sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF


def map_ring(fd: int, slots: int, slot: int) -> mmap.mmap:
    """The ring's memory, `slots` times `slot` bytes, shared with the kernel."""
    return mmap.mmap(fd, slots * slot, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def ring_drops(sock: socket.socket) -> int:
    """Frames that found the ring full since the last call (struct tpacket_stats, linux/if_packet.h).

    A merged frame counts as one: the kernel does not say how many datagrams it held.
    """
    _, drops = struct.unpack("=II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(drops)
