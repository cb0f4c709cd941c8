"""What io_uring does with an AF_PACKET socket, frame by frame: the exact claims of poc_io_uring_af_packet.

Each function makes a receiver of its own, sends it a few frames and claims what came of it. Blocks in
io_uring_enter, for 100 ms at most at a time.
"""

import errno
import socket
import struct
from typing import Final

from packet_load import FLOW, Network
from packet_methods import VNET
from uring_receivers import OUT, Incremental, Multishot

from experiment import Experiment
from mrelay.kernel.packet import (
    LONG_SLOT,
    TP_STATUS_VLAN_VALID,
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from mrelay.kernel.udp import segment_control
from traffic import HEADERS, frame
from uring import IORING_CQE_BUFFER_SHIFT, IORING_RECVSEND_BUNDLE

_BUFFERS: Final = 64
_FRAME: Final = frame(FLOW, 100)
_VLAN: Final = 77
_CMSG: Final = 16  # bytes, struct cmsghdr
_AUXDATA: Final = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata: status len snaplen mac net tci tpid


def claim_all(experiment: Experiment, network: Network) -> None:
    """All of them."""
    with network.sender() as sender, network.relay.inside():
        _survives(experiment, sender)
        _runs_out(experiment, sender)
        _auxiliary_data(experiment, sender)
        _cut_at_the_end(experiment, sender)
        _no_bundle(experiment, sender)
        _superframe(experiment, network)


def _send(sender: socket.socket, numbers: range) -> None:
    for number in numbers:
        sender.send(_FRAME[:-4] + number.to_bytes(4, "big"))


def _got(receiver: Multishot, most: int, *, give_back: bool = True) -> list[bytes]:
    """What the buffers held, until `most` came, or the receive ended, or 100 ms passed with nothing."""
    frames: list[bytes] = []
    while len(frames) < most and not receiver.over:
        receiver.ring.enter(1)
        done = receiver.completions()
        if not len(done):
            break
        receiver.taken = done["flags"] >> IORING_CQE_BUFFER_SHIFT
        held = zip(receiver.taken.tolist(), done["res"].tolist(), strict=True)
        frames += [receiver.buffers.memory[number, :size].tobytes() for number, size in held]
        if give_back:
            receiver.buffers.give_back(receiver.taken)
    return frames


def _numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(frame[-4:], "big") for frame in frames]


def _survives(experiment: Experiment, sender: socket.socket) -> None:
    receiver, count, numbers = Multishot(buffers=_BUFFERS), 16 * _BUFFERS, list[int]()
    for start in range(0, count, _BUFFERS // 2):
        _send(sender, range(start, start + _BUFFERS // 2))
        numbers += _numbers(_got(receiver, _BUFFERS // 2, give_back=experiment.broken != "give-back"))
    experiment.claim(
        f"one multishot receive on an AF_PACKET descriptor takes {count} frames with {_BUFFERS} buffers, in order",
        numbers == list(range(count)) and receiver.armed == 1 and not receiver.errors,
        f"{len(numbers)} frames, started {receiver.armed} time(s), ended by {_names(receiver.errors)}",
    )
    receiver.close()


def _runs_out(experiment: Experiment, sender: socket.socket) -> None:
    receiver, count = Multishot(buffers=_BUFFERS), _BUFFERS + 40
    _send(sender, range(count))
    first = _numbers(_got(receiver, count, give_back=False))
    ended = _names(receiver.errors)
    receiver.buffers.give_back(range(_BUFFERS))
    receiver.arm()
    rest = _numbers(_got(receiver, count - len(first)))
    experiment.claim(
        "without a free buffer it ends with ENOBUFS; frames wait in the socket, none is lost when it starts again",
        len(first) == _BUFFERS and ended == "ENOBUFS" and first + rest == list(range(count)),
        f"{len(first)} frames, {ended}, then {len(rest)} of {count - len(first)}",
    )
    receiver.close()


def _auxiliary_data(experiment: Experiment, sender: socket.socket) -> None:
    tagged = _FRAME[:12] + struct.pack("!HH", 0x8100, _VLAN) + _FRAME[12:]  # IEEE 802.1Q
    with_data = Multishot(recvmsg=True, auxiliary=experiment.broken != "auxdata")
    without = Multishot()
    sender.send(tagged)
    (message, *_), (plain, *_) = _got(with_data, 1), _got(without, 1)
    _, control, length, _ = struct.unpack_from("=IIII", message)  # struct io_uring_recvmsg_out
    status, whole, _, _, _, vlan, _ = _AUXDATA.unpack_from(message, OUT + _CMSG)
    found = vlan if control and status & TP_STATUS_VLAN_VALID else None
    experiment.claim(
        "multishot recvmsg leaves PACKET_AUXDATA in the buffer, with the VLAN tag that the frame itself has lost",
        found == _VLAN and whole == len(_FRAME) and plain[VNET:] == _FRAME and length == len(_FRAME) + VNET,
        f"{control} bytes of control data, VLAN {found}; plain recv: the frame without tag",
    )
    with_data.close()
    without.close()


def _cut_at_the_end(experiment: Experiment, sender: socket.socket) -> None:
    size = 1024
    receiver = Incremental(buffers=4, size=size)
    whole = len(_FRAME) + VNET
    _send(sender, range(12))
    sizes = [len(frame) for frame in _got(receiver, 12)]
    fit, room = divmod(size, whole)
    experiment.claim(
        "with IOU_PBUF_RING_INC frames lie packed, but the one that meets the end of a buffer is cut off",
        sizes == [whole] * fit + [room] + [whole] * (12 - fit - 1),
        f"{whole} bytes each into buffers of {size}: {sizes}",
    )
    receiver.close()


def _no_bundle(experiment: Experiment, sender: socket.socket) -> None:
    receiver = Multishot(ioprio=IORING_RECVSEND_BUNDLE)
    _send(sender, range(16))
    numbers = _numbers(_got(receiver, 16))
    experiment.claim(
        "IORING_RECVSEND_BUNDLE bundles no frames: each still has a completion of its own",
        numbers == list(range(16)),
        f"16 frames, {len(numbers)} completions",
    )
    receiver.close()


def _superframe(experiment: Experiment, network: Network) -> None:
    receiver = Multishot(buffers=_BUFFERS, size=LONG_SLOT)
    with network.source.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"out0")
        sender.sendmsg([bytes(20_000)], [segment_control(1000)], 0, (FLOW.group, FLOW.port))
    frames = _got(receiver, 1)
    _, kind, _, segment, _, _ = VIRTIO_NET_HDR.unpack_from(frames[0]) if frames else (0,) * 6
    length = len(frames[0]) - VNET - HEADERS if frames else 0
    experiment.claim(
        "a merged frame of 20 datagrams arrives whole, its segment size in the virtio-net header: recv is enough",
        (kind, segment, length) == (VIRTIO_NET_HDR_GSO_UDP_L4, 1000, 20_000),
        f"{len(frames)} frame, {length} bytes of payload, gso_type {kind}, gso_size {segment}",
    )
    receiver.close()


def _names(errors: list[int]) -> str:
    return ", ".join(errno.errorcode[error] for error in errors) or "nothing"
