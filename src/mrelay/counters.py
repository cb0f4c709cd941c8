"""The counters that a worker writes and control reads, in memory that outlives both.

Owns the layout of one worker's shared memory (a memfd that the supervisor makes and holds): totals, the
flow table's keys and counts, and a slot for every rule and every (rule, output). Only the worker writes;
control maps it read-only. Slots are never zeroed: control subtracts what a slot held when it assigned it,
so there is one writer and nothing to agree on. All counts are of datagrams and of UDP payload bytes.
Nothing here blocks.
"""

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters_size import HEADER, MAX_LINKS, MAX_RULES, RULE_ROWS, counters_size
from mrelay.reasons import DROPS

MAGIC: Final = 0x6D72656C61790004  # "mrelay", layout 4

DROP_REASONS: Final = tuple(DROPS)  # the index is the slot in `drops`
NO_RULE, NOT_UDP, MALFORMED, TRUNCATED, FRAGMENT, TTL_EXPIRED, TOO_BIG = range(7)
NO_NEIGHBOUR, TX_ERROR, RING_FULL, RATE_LIMITED, LOOP, NO_OUTPUT, MISS_LIMITED = range(7, 14)

# Of these it is known which rules took the datagram. In the order of the rows of `rules`, after packets and bytes.
RULE_DROPS: Final = (TTL_EXPIRED, TOO_BIG, NO_NEIGHBOUR, TX_ERROR, RATE_LIMITED, NO_OUTPUT)
RULE_DROP_ROW: Final = {reason: 2 + at for at, reason in enumerate(RULE_DROPS)}

RECEIVED, MATCHED, CARRIED = range(3)  # the last: of the matched, by the fast path

U64 = NDArray[np.uint64]


def sound_keys(keys: U64) -> NDArray[np.bool_]:
    """Which of the keys u64[5, n] a flow can have: IPv4 or IPv6, with addresses that fit.

    A worker that was taken over, or ended in the middle of a write, may have left others.
    """
    family = keys[4] >> np.uint64(32) & np.uint64(0xFF)
    narrow = (keys[0] | keys[2] | keys[1] >> np.uint64(32) | keys[3] >> np.uint64(32)) == 0
    sound: NDArray[np.bool_] = (family == 6) | (family == 4) & narrow
    return sound


class Counters:
    """NumPy views over one worker's shared memory.

    `totals` u64[8]: received, matched, carried. `drops` u64[len(DROP_REASONS)]. `keys` u64[5, F]: source high
    and low, group high and low, then port | vlan << 16 | family << 32 | ifindex << 40 (0: empty slot).
    `flows` u64[2, F]: packets, bytes; `folded`, the part of them that `rules` and `links` have; `kernel`
    u64[3, F], what the fast path's own counters of the slot held when they were last added: packets, bytes, and
    what a rate withheld. `dropped` u64[F]: datagrams of the flow that its rules took and passed nowhere, until
    `rules` have them. `rules` u64[RULE_ROWS, MAX_RULES]: packets, bytes, drops. `links` u64[3, MAX_LINKS]:
    packets, bytes, errors.
    """

    def __init__(self, fd: int, flow_limit: int, *, write: bool = False) -> None:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        self.memory = mmap.mmap(fd, counters_size(flow_limit), mmap.MAP_SHARED, prot)
        words = np.frombuffer(self.memory, dtype=np.uint64)
        self.totals = words[8:16]
        self.drops = words[16 : 16 + len(DROP_REASONS)]
        flows = (2, flow_limit)
        shapes: list[Sequence[int]] = [(5, flow_limit), flows, flows, (3, flow_limit), (1, flow_limit)]
        blocks: list[U64] = []
        start = HEADER
        for rows, columns in [*shapes, (RULE_ROWS, MAX_RULES), (3, MAX_LINKS)]:
            blocks.append(words[start : start + rows * columns].reshape(rows, columns))
            start += rows * columns
        self.keys, self.flows, self.folded, self.kernel, dropped, self.rules, self.links = blocks
        self.dropped = dropped[0]
        self.fresh = words[0] != MAGIC  # no worker has had this memory yet
        if write:
            words[0], words[1] = MAGIC, flow_limit

    def balance(self) -> None:
        """For a worker that takes over: what was received and not booked is still in the ring, and comes again."""
        self.totals[RECEIVED] = self.totals[MATCHED] + self.drops.sum()

    @property
    def received(self) -> int:
        """Datagrams that came in, counted at ingress (not derived: the sum below is a check on us)."""
        return int(self.totals[RECEIVED])

    @property
    def matched(self) -> int:
        """Datagrams that at least one output took; received = matched + sum(drops)."""
        return int(self.totals[MATCHED])

    @property
    def carried(self) -> int:
        """Those of the matched that the kernel's fast path carried."""
        return int(self.totals[CARRIED])
