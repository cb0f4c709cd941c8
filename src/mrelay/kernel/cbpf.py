"""Classic BPF: a small assembler, and the socket filters that the relay uses.

Owns the instruction encoding and the group filter. The supervisor attaches filters to receive rings and
helper sockets; seccomp.py builds its filter with the same instructions. Nothing here blocks.

The group filter is only a pre-filter, so that traffic nobody asked for costs no copy: it may let
through more than was asked (when the ranges do not fit in a program), never less.
"""

import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

# linux/bpf_common.h, linux/filter.h
BPF_LD: Final = 0x00
BPF_JMP: Final = 0x05
BPF_RET: Final = 0x06
BPF_W: Final = 0x00
BPF_H: Final = 0x08
BPF_ABS: Final = 0x20
BPF_LEN: Final = 0x80
BPF_JA: Final = 0x00
BPF_JEQ: Final = 0x10
BPF_JGT: Final = 0x20
BPF_JGE: Final = 0x30
BPF_JSET: Final = 0x40
BPF_K: Final = 0x00
BPF_MAXINSNS: Final = 4096
SKF_AD_OFF: Final = -0x1000
SKF_AD_PROTOCOL: Final = 0  # ethertype, host byte order
SKF_NET_OFF: Final = -0x100000  # offsets from here count from the network header

# asm-generic/socket.h
SO_ATTACH_FILTER: Final = 26
SO_LOCK_FILTER: Final = 44

ETH_P_IP: Final = 0x0800  # linux/if_ether.h
ETH_P_IPV6: Final = 0x86DD
IPV4_FRAGMENT: Final = 6  # RFC 791 §3.1: flags and offset
ANY_FRAGMENT: Final = 0x3FFF  # more fragments, or an offset
IPV4_DESTINATION: Final = 16  # RFC 791 §3.1, offset in the header
IPV6_DESTINATION: Final = 24  # RFC 8200 §3

ACCEPT: Final = 0x40000  # bytes of the packet to keep: more than any packet has
DROP: Final = 0

Range = tuple[int, int]


class Insn(NamedTuple):
    """struct sock_filter: jump offsets count from the next instruction."""

    code: int
    jt: int
    jf: int
    k: int


def load(offset: int) -> Insn:
    """The 32-bit word at `offset`, from network byte order; a negative offset is one of SKF_*."""
    return Insn(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset & 0xFFFFFFFF)


def ret(value: int) -> Insn:
    """End with `value`."""
    return Insn(BPF_RET | BPF_K, 0, 0, value)


DROP_ALL: Final = (ret(DROP),)


def pack(program: Sequence[Insn]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *insn) for insn in program)


def sock_fprog(program: Sequence[Insn]) -> tuple[bytes, ctypes.Array[ctypes.c_char]]:
    """struct sock_fprog, and the memory that it points to, which must outlive its use."""
    code = pack(program)
    memory = ctypes.create_string_buffer(code, len(code))
    return struct.pack("@HP", len(program), ctypes.addressof(memory)), memory


def attach(sock: socket.socket, program: Sequence[Insn]) -> None:
    """Make `program` the socket's filter, at once replacing the one before (SO_ATTACH_FILTER).

    OSError: EINVAL for a program that the kernel refuses, ENOMEM for one above net.core.optmem_max.
    """
    fprog, memory = sock_fprog(program)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
    del memory


def only_longer(length: int, *, longer: bool) -> list[Insn]:
    """The start of a filter that drops frames of up to `length` bytes, or (not `longer`) all others."""
    compare = Insn(BPF_JMP | BPF_JGT | BPF_K, int(longer), int(not longer), length)
    return [Insn(BPF_LD | BPF_W | BPF_LEN, 0, 0, 0), compare, ret(DROP)]


def no_fragments(net: int = SKF_NET_OFF) -> list[Insn]:
    """The start of a filter that drops fragments in IPv4; `net` as for `group_filter`."""
    return [
        load(SKF_AD_OFF + SKF_AD_PROTOCOL),
        Insn(BPF_JMP | BPF_JEQ | BPF_K, 0, 3, ETH_P_IP),
        Insn(BPF_LD | BPF_H | BPF_ABS, 0, 0, (net + IPV4_FRAGMENT) & 0xFFFFFFFF),
        Insn(BPF_JMP | BPF_JSET | BPF_K, 0, 1, ANY_FRAGMENT),
        ret(DROP),
    ]


def attach_group_filter(
    sock: socket.socket,
    v4: Iterable[Range],
    v6: Iterable[Range],
    net: int = SKF_NET_OFF,
    start: Sequence[Insn] = (),
) -> None:
    """Attach `start` and `group_filter(v4, v6)`, coarser when net.core.optmem_max has no room for it exact."""
    v4, v6, limit = list(v4), list(v6), BPF_MAXINSNS - len(start)
    while True:
        try:
            return attach(sock, [*start, *group_filter(v4, v6, limit, net)])
        except OSError as error:
            if error.errno != errno.ENOMEM or limit <= 64:
                raise
            limit //= 2


def group_filter(
    v4: Iterable[Range], v6: Iterable[Range], limit: int = BPF_MAXINSNS, net: int = SKF_NET_OFF
) -> list[Insn]:
    """A filter that accepts IP packets whose destination lies in one of the closed ranges of integers.

    `limit` (at least 64) bounds the instructions; ranges that do not fit are merged over the smallest
    gaps between them. `net` is where the network header is: SKF_NET_OFF for any socket (which reads
    only a packet's linear part), or the offset from the first byte that the socket delivers.
    """
    v4, v6 = merge(v4), merge(v6)
    share = 1.0
    while True:
        program = _group_program(_coarsen(v4, share), _coarsen(v6, share), net)
        if len(program) <= limit:
            return program
        share *= 0.95 * limit / len(program)


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same integers as sorted ranges that neither overlap nor touch."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _coarsen(ranges: list[Range], share: float) -> list[Range]:
    """At most `share` of these merged ranges, at least one, got by closing the smallest gaps."""
    surplus = len(ranges) - max(1, int(len(ranges) * share))
    if surplus <= 0:
        return ranges
    by_gap = sorted(range(1, len(ranges)), key=lambda i: ranges[i][0] - ranges[i - 1][1])
    closed = set(by_gap[:surplus])
    result: list[Range] = []
    for i, (low, high) in enumerate(ranges):
        if i in closed:
            result[-1] = (result[-1][0], high)
        else:
            result.append((low, high))
    return result


def _group_program(v4: list[Range], v6: list[Range], net: int) -> list[Insn]:
    code = _Backward()
    on_v6 = _match(code, v6, net + IPV6_DESTINATION, 4)
    on_v4 = _match(code, v4, net + IPV4_DESTINATION, 1)
    not_v4 = code.jump(BPF_JEQ, ETH_P_IPV6, on_v6, DROP_LABEL)
    code.jump(BPF_JEQ, ETH_P_IP, on_v4, not_v4)
    code.put(load(SKF_AD_OFF + SKF_AD_PROTOCOL))
    return code.program()


ACCEPT_LABEL: Final = -1
DROP_LABEL: Final = -2


class _Backward:
    """A program written from its end to its start, so that every jump's target is known when it is written.

    A label is an instruction's distance from the end of the program (the last is 1), or ACCEPT_LABEL or
    DROP_LABEL: these returns are written again whenever the last copy is out of reach.
    """

    REACH: Final = 250  # jt and jf have 8 bits; the rest is room for what `near` writes in between

    def __init__(self) -> None:
        self._code: list[Insn] = []
        self._returns: dict[int, int] = {}

    def put(self, insn: Insn) -> int:
        self._code.append(insn)
        return len(self._code)

    def jump(self, test: int, k: int, when_true: int, when_false: int) -> int:
        """Compare the accumulator with `k` and go on at one of two labels."""
        when_true, when_false = self._near(when_true), self._near(when_false)
        here = len(self._code)
        return self.put(Insn(BPF_JMP | test | BPF_K, here - when_true, here - when_false, k))

    def _near(self, label: int) -> int:
        """The label, or one within reach that leads there."""
        target = self._returns.get(label, 0) if label < 0 else label
        distance = len(self._code) - target
        if target and distance <= self.REACH:
            return target
        if label > 0:
            return self.put(Insn(BPF_JMP | BPF_JA, 0, 0, distance))
        self._returns[label] = self.put(ret(ACCEPT if label == ACCEPT_LABEL else DROP))
        return self._returns[label]

    def program(self) -> list[Insn]:
        return self._code[::-1]


class _Segment(NamedTuple):
    """From `start` to the next segment's start, go on at `label`."""

    start: int
    label: int


def _match(code: _Backward, ranges: list[Range], offset: int, words: int) -> int:
    """Write the test of the `words` 32-bit words at `offset` against merged ranges; returns its label."""
    if not ranges:
        return DROP_LABEL
    if ranges == [(0, (1 << 32 * words) - 1)]:
        return ACCEPT_LABEL
    segments = _segments(ranges, words, lambda rest: _match(code, rest, offset + 4, words - 1))
    _search(code, segments)
    return code.put(load(offset))


def _segments(ranges: list[Range], words: int, descend: Callable[[list[Range]], int]) -> list[_Segment]:
    """The first word's values, cut where the answer changes; `descend` writes the test of what follows it."""
    rest_bits = 32 * (words - 1)
    rest_max = (1 << rest_bits) - 1
    parts: dict[int, list[Range]] = {}  # by value of the first word: ranges of the words that follow
    runs: list[tuple[int, int, int]] = []
    for low, high in ranges:
        first, last = low >> rest_bits, high >> rest_bits
        if first == last:
            parts.setdefault(first, []).append((low & rest_max, high & rest_max))
            continue
        parts.setdefault(first, []).append((low & rest_max, rest_max))
        parts.setdefault(last, []).append((0, high & rest_max))
        if last - first > 1:
            runs.append((first + 1, last - 1, ACCEPT_LABEL))
    runs += [(value, value, descend(rest)) for value, rest in parts.items()]
    return _fill(sorted(runs))


def _fill(runs: list[tuple[int, int, int]]) -> list[_Segment]:
    """Segments over all 32-bit values: these sorted runs, and DROP_LABEL between them."""
    segments: list[_Segment] = []
    position = 0
    for low, high, label in runs:
        if low > position:
            segments.append(_Segment(position, DROP_LABEL))
        if not segments or segments[-1].label != label:
            segments.append(_Segment(low, label))
        position = high + 1
    if position <= 0xFFFFFFFF:
        segments.append(_Segment(position, DROP_LABEL))
    return segments


def _search(code: _Backward, segments: list[_Segment]) -> int:
    """Write a binary search for the accumulator's segment; returns its label."""
    if len(segments) == 1:
        return segments[0].label
    if len(segments) == 3 and segments[0].label == segments[2].label:
        before, at, after = segments
        if after.start == at.start + 1:
            return code.jump(BPF_JEQ, at.start, at.label, before.label)
    middle = len(segments) // 2
    above = _search(code, segments[middle:])
    below = _search(code, segments[:middle])
    return code.jump(BPF_JGE, segments[middle].start, above, below)
