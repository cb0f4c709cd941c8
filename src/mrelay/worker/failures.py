"""What could not be sent: counted at the output, and as a drop when no output took it; logged once a flow.

Owns the rule for both. Called by both paths, only when a send failed, so it may be slow.
"""

import errno
import logging
import os
from collections.abc import Callable, Sequence

import numpy as np

from mrelay.counters import DROP_REASONS, MATCHED, RATE_LIMITED, RULE_DROP_ROW, TTL_EXPIRED, Counters
from mrelay.worker.egress import Entry, drop_reason
from mrelay.worker.flows import Flow

log = logging.getLogger("mrelay.worker")

ALL = (1 << 64) - 1  # every limited rule passes
EXPIRED = errno.ETIME  # our own sign for "the TTL ran out"


class Failures:
    """Books failed sends, whose datagrams the flow was already counted with; `fold` is FlowTable.fold_flow."""

    def __init__(self, counters: Counters, fold: Callable[[Flow], tuple[int, int]]) -> None:
        self._counters, self._fold = counters, fold

    def record(
        self, flow: Flow, count: int, octets: int, failed: Sequence[tuple[Entry, int, int]], bits: int = ALL
    ) -> None:
        """`count` datagrams of `octets` bytes went out, but for `failed`: (entry, how many, errno).

        `bits`: which of the flow's limited rules passed them; only entries of these were tried.
        """
        self._fold(flow)  # so that what is taken off below is there
        for entry, lost, _ in failed:
            self._book_output(flow, entry, lost, octets * lost // count)
        everywhere = min(lost for _, lost, _ in failed) if len(failed) == len(flow.admitted(bits)) else 0
        if everywhere:
            refusing = flow.refusing(bits)
            rules = [rule for rule in flow.route.rules if rule not in refusing]
            self._book_drop(rules, everywhere, octets * everywhere // count, failed[-1][2])
        if not flow.warned:
            flow.warned = True
            _warn(flow, failed[-1])

    def _book_output(self, flow: Flow, entry: Entry, lost: int, octets: int) -> None:
        took = np.array([lost, octets], np.uint64)
        for link in flow.route.links[flow.entries.index(entry)]:
            self._counters.links[:2, link] -= took
            self._counters.links[2, link] += np.uint64(lost)

    def refused(self, flow: Flow, entry: Entry, lost: int) -> None:
        """`lost` datagrams that the fast path forwarded did not go to this entry; of what size is not known."""
        packets, octets = self._fold(flow)
        self._book_output(flow, entry, lost, octets * lost // max(packets, 1))

    def withhold(self, flow: Flow, count: int, octets: int, bits: int) -> None:
        """Of `count` datagrams of `octets` bytes only the rules of `bits` passed any on: take the others' off."""
        self._fold(flow)
        took = np.array([count, octets], np.uint64)
        admitted = flow.admitted(bits)
        for rule in flow.refusing(bits):
            self._counters.rules[:2, rule] -= took
            self._counters.rules[RULE_DROP_ROW[RATE_LIMITED], rule] += took[0]
        for entry, links in zip(flow.entries, flow.route.links, strict=True):
            if entry not in admitted:
                for link in links:
                    self._counters.links[:2, link] -= took

    def _book_drop(self, rules: Sequence[int], lost: int, octets: int, error: int) -> None:
        reason = TTL_EXPIRED if error == EXPIRED else drop_reason(error)
        self._counters.totals[MATCHED : MATCHED + 1] -= np.uint64(lost)
        self._counters.drops[reason] += np.uint64(lost)
        for rule in rules:
            self._counters.rules[:2, rule] -= np.array([lost, octets], np.uint64)
            self._counters.rules[RULE_DROP_ROW[reason], rule] += np.uint64(lost)


def _warn(flow: Flow, failure: tuple[Entry, int, int]) -> None:
    entry, _, error = failure
    to = f"{entry.to.address} port {entry.to.port}"
    if error == EXPIRED:
        log.warning("%s arrives with TTL 1, so nothing goes to %s: add ',ttl=8' to that output", flow, to)
        return
    reason = DROP_REASONS[drop_reason(error)]
    log.warning("%s: sending to %s fails: %s (counted as %s)", flow, to, os.strerror(error), reason)
