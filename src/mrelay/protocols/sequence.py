"""What became of a numbered stream: how many came, were lost, came late or twice.

A pure state machine for stream health; RTP, MoldUDP64 and plain sequence fields differ only in how wide the number
is. Terms as RFC 4737 (reordered: it comes after one with a higher number) and RFC 5560 (duplicates); RFC 3550 A.1
for wraps and restarts. Unlike traffic.account, which knows its own wide numbers, this one is small enough for
thousands of streams.
"""

from typing import Final

WINDOW: Final = 1024  # numbers: one that is further behind is told neither from a duplicate nor from a restart
_FULL: Final = (1 << WINDOW) - 1
MAX_DROPOUT: Final = 3000  # RFC 3550 A.1, for numbers of 16 bits: a longer jump is a restart
_MAX_DROPOUT_WIDE: Final = 1_000_000


class Sequence:
    """Accounts for numbers of `bits` bits, in order of arrival.

    `received` = `distinct` + `duplicates` + those that came too late to tell. `restarts`: how often the numbers
    jumped to somewhere else; what was lost there is not known. `excused`: missing, but perhaps not in the stream.
    """

    __slots__ = ("_bad", "_dropout", "_excused", "_excusing", "_highest", "_modulus", "_seen", "_span", "distinct",
                 "duplicates", "excused", "lost", "received", "reordered", "restarts")  # fmt: skip

    def __init__(self, bits: int) -> None:
        self._modulus = 1 << bits
        self._dropout = min(MAX_DROPOUT if bits <= 16 else _MAX_DROPOUT_WIDE, self._modulus // 2 - 1)
        self.received = self.distinct = self.duplicates = self.reordered = 0
        self.lost = 0  # missing so far, between the first number and the highest
        self.restarts = self.excused = 0
        self._highest = -1  # -1: none yet
        self._span = 0  # numbers from the first to the highest, less one
        self._seen = self._excused = 0  # a bit for each of the last WINDOW numbers, the highest one's is bit 0
        self._bad = -1  # the number that a restart would go on with
        self._excusing = False

    def excuse(self) -> None:
        """We may have missed some: what is missing before the next number is not known to be lost."""
        self._excusing = True

    def forget(self) -> None:
        """The stream begins anew; what was counted stays."""
        self._highest, self._bad = -1, -1

    def add(self, number: int) -> None:
        """Account for one number."""
        self.received += 1
        if self._highest < 0:
            self._begin(number)
            return
        ahead = (number - self._highest) % self._modulus
        if ahead == 1 and not self._excusing and not self._excused:  # nearly always: the same as below, but quick
            self._highest, self._bad = number, -1
            self._span += 1
            self._seen = (self._seen << 1 | 1) & _FULL
            self.distinct += 1
        elif 0 < ahead <= self._dropout:
            self._advance(number, ahead, 1)
            self.distinct += 1
        elif (behind := (self._highest - number) % self._modulus) < WINDOW:
            self._late(behind)
        else:
            self._stray(number)

    def expect(self, number: int) -> None:
        """The next number will be this one: what is missing before it is lost (a heartbeat says so)."""
        last = (number - 1) % self._modulus
        ahead = (last - self._highest) % self._modulus
        if self._highest >= 0 and 0 < ahead <= self._dropout:
            self._advance(last, ahead, 0)

    def _begin(self, number: int) -> None:
        self._highest, self._span, self._seen, self._excused, self._bad = number, 0, 1, 0, -1
        self._excusing = False
        self.distinct += 1

    def _advance(self, number: int, ahead: int, arrived: int) -> None:
        """Go `ahead` numbers on, to `number`, which is there if `arrived` is 1; those in between are not."""
        missing, shift = ahead - arrived, min(ahead, WINDOW)
        self._highest, self._bad = number, -1
        self._span += ahead
        self._seen = (self._seen << shift | arrived) & _FULL
        self._excused = self._excused << shift & _FULL
        if missing and self._excusing:
            self.excused += missing
            self._excused |= (1 << shift) - 1 - arrived
        else:
            self.lost += missing
        self._excusing = False

    def _late(self, behind: int) -> None:
        """A number at or below the highest, within the window."""
        self._bad, bit = -1, 1 << behind
        if self._seen & bit:
            self.duplicates += 1
            return
        self._seen |= bit
        self.distinct += 1
        self.reordered += 1
        if self._excused & bit:
            self._excused &= ~bit
            self.excused -= 1
        elif behind <= self._span:  # else it is from before the first
            self.lost -= 1

    def _stray(self, number: int) -> None:
        """Far away: the second in a row makes it a restart (RFC 3550 A.1), unless that is where we missed some."""
        if self._excusing:
            self._begin(number)
        elif number == self._bad:
            self.restarts += 1
            self.distinct += 1  # the stray before it
            self._begin(number)
        else:
            self._bad = (number + 1) % self._modulus
