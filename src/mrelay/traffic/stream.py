"""The wire format of a test datagram, read and written a batch at a time with NumPy.

Owns the header layout. Called by the sender (to number and stamp) and the receiver (to read). Never blocks.

    0        4         6         8         16          24         32
    | magic  | version | zero    | stream  | sequence  | sent ns  |  padding up to the datagram's size

All fields are big-endian. `stream` is a random number that the sender draws once, so that a restarted
sender is a new stream rather than a huge reordering. `sequence` counts from 0. `sent` is
CLOCK_REALTIME in nanoseconds.
"""

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = 0x4D524C59  # "MRLY"
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", ">u4"),
        ("version", ">u2"),
        ("zero", ">u2"),
        ("stream", ">u8"),
        ("sequence", ">u8"),
        ("sent", ">u8"),
    ]
)
HEADER_SIZE = HEADER.itemsize
MAX_SIZE = 65_507  # the largest UDP payload over IPv4: 65,535 - 20 - 8 (RFC 791 §3.1, RFC 768)
_SIGNED_LIMIT = 1 << 63  # sequences are counted in int64; a larger one was not made by our sender

Headers = NDArray[np.void]


def new_stream_id() -> int:
    """A stream number that no other sender is likely to have drawn (63 random bits)."""
    return secrets.randbits(63)


def headers_in(buffer: Any, size: int, count: int) -> Headers:
    """A view of the headers of `count` datagrams of `size` bytes that lie one after another in `buffer`."""
    return np.ndarray(shape=count, dtype=HEADER, buffer=buffer, strides=(size,))


def write_constant_fields(headers: Headers, stream: int) -> None:
    """Fill in what is the same in all datagrams of one stream."""
    headers["magic"] = MAGIC
    headers["version"] = VERSION
    headers["zero"] = 0
    headers["stream"] = stream


def stamp(headers: Headers, first_sequence: int, now_ns: int) -> None:
    """Number `headers` from `first_sequence` on and give them all the send time `now_ns`."""
    headers["sequence"] = np.arange(first_sequence, first_sequence + len(headers))
    headers["sent"] = now_ns


def is_ours(headers: Headers, lengths: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which datagrams carry a header of this format; `lengths` are their whole sizes in bytes."""
    ours: NDArray[np.bool_] = (
        (lengths >= HEADER_SIZE)
        & (headers["magic"] == MAGIC)
        & (headers["version"] == VERSION)
        & (headers["sequence"] < _SIGNED_LIMIT)
        & (headers["sent"] < _SIGNED_LIMIT)
    )
    return ours
