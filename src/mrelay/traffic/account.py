"""What became of a stream: received, lost, reordered, duplicated, and how late.

A pure state machine: it is given the sequence numbers and latencies of each batch and does no I/O.
Called by the receiver.

The terms are those of RFC 4737 (reordering: a datagram that arrives after one with a higher sequence
number) and RFC 5560 (duplicates). Loss is what is missing between the lowest and the highest sequence
number seen; datagrams lost before the first or after the last one that arrived cannot be known here.
"""

import numpy as np
from numpy.typing import NDArray

WINDOW = 1 << 16  # a datagram this far behind the highest can't be told from a duplicate any more
_PER_OCTAVE = 32  # latency buckets per doubling: 2.2 % wide
_BUCKETS = 64 * _PER_OCTAVE


class LatencyHistogram:
    """Latencies in nanoseconds, kept in logarithmic buckets 2.2 % wide; minimum and maximum are exact."""

    def __init__(self) -> None:
        self.count = 0
        self.lowest = 0
        self.highest = 0
        self._buckets = np.zeros(_BUCKETS, np.int64)

    def add(self, nanoseconds: NDArray[np.int64]) -> None:
        """Count a batch. Values below 1 ns (clocks that differ) count as 1 ns; `lowest` shows them."""
        if not len(nanoseconds):
            return
        lowest, highest = int(nanoseconds.min()), int(nanoseconds.max())
        self.lowest = min(self.lowest, lowest) if self.count else lowest
        self.highest = max(self.highest, highest) if self.count else highest
        self.count += len(nanoseconds)
        index = (np.log2(np.maximum(nanoseconds, 1)) * _PER_OCTAVE).astype(np.int64)
        self._buckets += np.bincount(index, minlength=_BUCKETS)

    def percentile(self, percent: float) -> float | None:
        """The latency in ns that `percent` of the datagrams did not exceed; None when there are none."""
        if not self.count:
            return None
        rank = max(1, int(np.ceil(self.count * percent / 100)))
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank))
        middle: float = 2.0 ** ((bucket + 0.5) / _PER_OCTAVE)
        return min(middle, max(self.highest, 1.0))


class StreamAccount:
    """Accounts for one stream. `received` = `distinct` + `duplicates` + those too late to tell."""

    def __init__(self) -> None:
        self.received = 0
        self.bytes = 0  # of UDP payload
        self.distinct = 0
        self.duplicates = 0
        self.reordered = 0
        self.latency = LatencyHistogram()
        self._lowest = 0
        self._highest = -1
        self._seen = np.full(WINDOW, -1, np.int64)  # sequence number last seen in each slot

    @property
    def lost(self) -> int:
        """Sequence numbers missing between the lowest and the highest seen."""
        return self._highest - self._lowest + 1 - self.distinct if self.received else 0

    def add(self, sequences: NDArray[np.int64]) -> None:
        """Account for a batch, in order of arrival."""
        if not len(sequences):
            return
        if not self.received:
            self._lowest = int(sequences[0])
            self._highest = self._lowest - 1
        self.received += len(sequences)
        if sequences[0] > self._highest and bool((sequences[1:] > sequences[:-1]).all()):
            self._add_ascending(sequences)
        else:
            for sequence in sequences.tolist():
                self._add_one(sequence)

    def _add_ascending(self, sequences: NDArray[np.int64]) -> None:
        # Of two that share a slot NumPy keeps the last assignment, which is the newer one.
        self._seen[sequences % WINDOW] = sequences
        self.distinct += len(sequences)
        self._highest = int(sequences[-1])

    def _add_one(self, sequence: int) -> None:
        slot = sequence % WINDOW
        if sequence > self._highest:
            self._highest = sequence
        elif sequence <= self._highest - WINDOW:
            self.reordered += 1  # and still counted as lost: too late for any use
            return
        elif self._seen[slot] == sequence:
            self.duplicates += 1
            return
        else:
            self.reordered += 1
            self._lowest = min(self._lowest, sequence)
        self._seen[slot] = sequence
        self.distinct += 1
