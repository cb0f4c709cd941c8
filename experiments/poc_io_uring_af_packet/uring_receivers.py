"""The io_uring receivers of poc_io_uring_af_packet: single-shot and multishot, recv and recvmsg.

Owns the layout of what a multishot recvmsg leaves in its buffer. `wait` blocks in io_uring_enter.
"""

from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from packet_methods import BATCH, HEADER, NOTHING, U16, VNET, bind, packet_socket

from mrelay.kernel.packet import SLOT, SOL_PACKET
from uring import (
    IORING_CQE_BUFFER_SHIFT,
    IORING_CQE_F_BUF_MORE,
    IORING_CQE_F_MORE,
    IORING_OP_RECV,
    IORING_OP_RECVMSG,
    IORING_RECV_MULTISHOT,
    IOSQE_BUFFER_SELECT,
    IOU_PBUF_RING_INC,
    BufferRing,
    Ring,
)

PACKET_AUXDATA: Final = 8  # linux/if_packet.h
OUT: Final = 16  # bytes, struct io_uring_recvmsg_out: namelen controllen payloadlen flags
CONTROL: Final = 40  # bytes: CMSG_SPACE of struct tpacket_auxdata
_MSGHDR: Final = 7  # 64-bit words of struct msghdr: name namelen iov iovlen control controllen flags


class SingleShot:
    """`armed` receives in flight, each with a buffer of its own; one that is over is started again."""

    def __init__(self, *, recvmsg: bool, armed: int = BATCH // 2) -> None:
        self.sock, self._ring = packet_socket(), Ring(armed, 4 * armed)
        memory = np.zeros((armed, SLOT // 2), np.uint16)
        self._headers = memory[:, VNET // 2 : (VNET + HEADER) // 2]
        address = memory.ctypes.data + np.arange(armed, dtype=np.uint64) * np.uint64(SLOT)
        operations = self._ring.prepared
        operations["fd"], operations["user_data"] = self.sock.fileno(), np.arange(armed)
        if recvmsg:
            self.sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            operations["opcode"], operations["len"] = IORING_OP_RECVMSG, 1
            operations["addr"] = self._message_headers(address)
        else:
            operations["opcode"], operations["len"] = IORING_OP_RECV, SLOT
            operations["addr"] = address
        bind(self.sock)
        self._taken: NDArray[np.integer] = np.arange(armed)
        self.release()

    def _message_headers(self, address: NDArray[np.uint64]) -> NDArray[np.uint64]:
        count = len(address)
        messages, pieces, control = [np.zeros((count, n), np.uint64) for n in (_MSGHDR, 2, CONTROL // 8)]
        self._kept = messages, pieces, control  # the kernel reads and writes them
        step = np.arange(count, dtype=np.uint64)
        pieces[:, 0], pieces[:, 1] = address, SLOT
        messages[:, 2], messages[:, 3] = pieces.ctypes.data + step * np.uint64(16), 1
        messages[:, 4], messages[:, 5] = control.ctypes.data + step * np.uint64(CONTROL), CONTROL
        addresses: NDArray[np.uint64] = messages.ctypes.data + step * np.uint64(8 * _MSGHDR)
        return addresses

    def wait(self) -> None:
        self._ring.enter(1)

    def take(self) -> U16:
        self._taken = self._ring.reap(BATCH)["user_data"].astype(np.intp)
        frames: U16 = self._headers[self._taken]
        return frames

    def release(self) -> None:
        self._ring.again(self._taken)
        self._ring.enter()

    def close(self) -> None:
        self._ring.close()
        self.sock.close()


class Multishot:
    """One receive that goes on; for each frame the kernel takes the next provided buffer.

    `armed` counts how often it was started, `errors` how it ended. With `recvmsg` each buffer begins with
    struct io_uring_recvmsg_out and the auxiliary data.
    """

    def __init__(
        self,
        *,
        recvmsg: bool = False,
        auxiliary: bool = True,
        ioprio: int = 0,
        buffers: int = 2 * BATCH,
        size: int = SLOT,
        flags: int = 0,
    ) -> None:
        self.sock, self.ring = packet_socket(), Ring(8, 4 * BATCH)
        self.buffers = BufferRing(self.ring, buffers, size, flags)
        self._recvmsg, self._ioprio, self.armed = recvmsg, IORING_RECV_MULTISHOT | ioprio, 0
        self.errors: list[int] = []
        if recvmsg and auxiliary:
            self.sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._message = np.array([0, 0, 0, 0, 0, CONTROL, 0], np.uint64)
        self.begin = VNET + (OUT + CONTROL if recvmsg else 0)  # where a frame begins in its buffer
        self.taken: NDArray[np.integer] = np.empty(0, np.uint32)
        bind(self.sock)
        self.arm()

    def arm(self) -> None:
        """Start the receive."""
        address, length = (self._message.ctypes.data, 1) if self._recvmsg else (0, 0)
        operation = IORING_OP_RECVMSG if self._recvmsg else IORING_OP_RECV
        self.ring.push(
            operation, self.sock.fileno(), address, length, flags=IOSQE_BUFFER_SELECT, ioprio=self._ioprio
        )
        self.armed += 1
        self.over = False
        self.ring.enter()

    def wait(self) -> None:
        self.ring.enter(1)

    def completions(self) -> NDArray[np.void]:
        """Those that hold frames; `over` when the receive has ended."""
        seen = -1
        while seen < self.ring.waiting < BATCH:  # it stops after 32 frames (io_uring/net.c): go on while it gives
            seen = self.ring.waiting
            self.ring.enter()
        done = self.ring.reap(BATCH)
        if len(done) and not done["flags"][-1] & IORING_CQE_F_MORE:
            self.over = True
            self.errors += [-int(result) for result in done["res"] if result < 0]
            done = done[done["res"] >= 0]
        return done

    def take(self) -> U16:
        self.taken = self.completions()["flags"] >> IORING_CQE_BUFFER_SHIFT
        headers = self.buffers.memory.view(np.uint16)[:, self.begin // 2 : (self.begin + HEADER) // 2]
        frames: U16 = headers[self.taken]
        return frames

    def release(self) -> None:
        self.buffers.give_back(self.taken)
        if self.over:
            self.arm()

    def close(self) -> None:
        self.ring.close()
        self.sock.close()


class Incremental(Multishot):
    """Large buffers that frames fill one behind the other (IOU_PBUF_RING_INC), as dense as they come."""

    def __init__(self, buffers: int = 16, size: int = 256 << 10) -> None:
        super().__init__(buffers=buffers, size=size, flags=IOU_PBUF_RING_INC)
        self._filled = np.zeros(buffers, np.int64)
        self._windows = sliding_window_view(self.buffers.memory.reshape(-1), HEADER)

    def take(self) -> U16:
        done = self.completions()
        if not len(done):
            self.taken = np.empty(0, np.uint32)
            return NOTHING
        number, length = (done["flags"] >> IORING_CQE_BUFFER_SHIFT).astype(np.int64), done["res"].astype(np.int64)
        place = np.empty(len(done), np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(done)], strict=True):
            ends = self._filled[number[start]] + np.cumsum(length[start:end])
            place[start:end] = ends - length[start:end]
            self._filled[number[start]] = ends[-1]
        self.taken = number[(done["flags"] & IORING_CQE_F_BUF_MORE) == 0]
        self._filled[self.taken] = 0
        whole = length >= VNET + HEADER  # what met the end of its buffer was cut
        at = (number * self.buffers.size + place + VNET)[whole]
        return np.ascontiguousarray(self._windows[at]).view(np.uint16)
