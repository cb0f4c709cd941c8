"""Many datagrams per system call: recvmmsg(2) and sendmmsg(2), their arrays held as NumPy views.

Owns the message arrays. Called by sender and receiver. `ReceiveBatch.receive` never blocks;
`SendBatch.send` blocks as the socket does. For 64-bit kernels (struct sizes of <linux/socket.h>).
"""

import ctypes
import errno
import os
import socket
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrelay.traffic.stream import HEADER_SIZE, Headers, headers_in, stamp, write_constant_fields

SO_TIMESTAMPNS_NEW = 64  # <asm-generic/socket.h>; 64-bit seconds everywhere, Linux 5.1
SCM_TIMESTAMPNS_NEW = SO_TIMESTAMPNS_NEW
_CONTROL_SIZE = 64  # room for the timestamp's control message (32 bytes) and nothing else we ask for

_IOVEC = np.dtype([("base", np.uintp), ("len", np.uintp)])
_MSGHDR = np.dtype(
    [
        ("name", np.uintp),
        ("namelen", np.uint32),
        ("iov", np.uintp),
        ("iovlen", np.uintp),
        ("control", np.uintp),
        ("controllen", np.uintp),
        ("flags", np.int32),
    ],
    align=True,
)
_MMSGHDR = np.dtype([("header", _MSGHDR), ("len", np.uint32)], align=True)
_TIMESTAMP = np.dtype(  # struct cmsghdr and struct __kernel_timespec, in a slot of _CONTROL_SIZE bytes
    {
        "names": ["len", "level", "type", "sec", "nsec"],
        "formats": [np.uintp, np.int32, np.int32, np.int64, np.int64],
        "offsets": [0, 8, 12, 16, 24],
        "itemsize": _CONTROL_SIZE,
    }
)

_libc = ctypes.CDLL(None, use_errno=True)


def _addresses(array: NDArray[Any]) -> NDArray[np.uintp]:
    """The address of each element along the first axis."""
    return (array.ctypes.data + np.arange(len(array)) * array.strides[0]).astype(np.uintp)


def _messages(data: NDArray[np.uint8], length: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Message and iovec arrays with one message of `length` bytes for each row of `data`."""
    iovecs = np.zeros(len(data), _IOVEC)
    iovecs["base"] = _addresses(data)
    iovecs["len"] = length
    messages = np.zeros(len(data), _MMSGHDR)
    messages["header"]["iov"] = _addresses(iovecs)
    messages["header"]["iovlen"] = 1
    return messages, iovecs


class ReceiveBatch:
    """Receives up to `size` datagrams a call; keeps only their headers, whole lengths and arrival times."""

    def __init__(self, size: int = 512) -> None:
        self.size = size
        self._data = np.zeros((size, HEADER_SIZE), np.uint8)
        self._control = np.zeros(size, _TIMESTAMP)
        self._headers = headers_in(self._data.data, HEADER_SIZE, size)
        self._messages, self._iovecs = _messages(self._data, HEADER_SIZE)
        self._messages["header"]["control"] = _addresses(self._control)

    def receive(self, fd: int) -> int:
        """How many datagrams were waiting on `fd` and are now held here (0: none). Raises OSError."""
        self._messages["header"]["controllen"] = _CONTROL_SIZE
        # MSG_TRUNC as a flag of the call: report the whole length though only the header is copied.
        flags = socket.MSG_DONTWAIT | socket.MSG_TRUNC
        pointer = ctypes.c_void_p(self._messages.ctypes.data)
        count = int(_libc.recvmmsg(fd, pointer, self.size, flags, None))
        if count >= 0:
            return count
        error = ctypes.get_errno()
        if error in (errno.EAGAIN, errno.EINTR):
            return 0
        raise OSError(error, os.strerror(error))

    def headers(self, count: int) -> Headers:
        """The headers of the first `count` datagrams; valid until the next `receive`."""
        return self._headers[:count]

    def lengths(self, count: int) -> NDArray[np.uint32]:
        """Their UDP payload lengths in bytes."""
        lengths: NDArray[np.uint32] = self._messages["len"][:count]
        return lengths

    def arrivals(self, count: int) -> NDArray[np.int64]:
        """When the kernel received each (CLOCK_REALTIME, ns); 0 where it gave no timestamp."""
        control = self._control[:count]
        given = (self._messages["header"]["controllen"][:count] > 0) & (control["type"] == SCM_TIMESTAMPNS_NEW)
        nanoseconds: NDArray[np.int64] = control["sec"] * 1_000_000_000 + control["nsec"]
        return np.where(given, nanoseconds, 0)


class SendBatch:
    """Up to `count` datagrams of one stream, built once; only number and time are written per send."""

    def __init__(self, stream: int, size: int, count: int) -> None:
        self.size = size
        self.count = count
        self._data = np.zeros((count, size), np.uint8)
        self._headers = headers_in(self._data.data, size, count)
        self._messages, self._iovecs = _messages(self._data, size)
        write_constant_fields(self._headers, stream)

    def stamp(self, count: int, first_sequence: int, now_ns: int) -> None:
        """Number and stamp the first `count` datagrams."""
        stamp(self._headers[:count], first_sequence, now_ns)

    def send(self, sock: socket.socket, count: int) -> int:
        """Send the first `count` datagrams on the connected `sock`; how many went out. Raises OSError."""
        pointer = ctypes.c_void_p(self._messages.ctypes.data)
        sent = int(_libc.sendmmsg(sock.fileno(), pointer, count, 0))
        if sent < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return sent

    def send_merged(self, sock: socket.socket, count: int) -> int:
        """The same in one system call on a socket with UDP_SEGMENT set to the datagrams' size."""
        return sock.send(self._data[:count].data) // self.size
