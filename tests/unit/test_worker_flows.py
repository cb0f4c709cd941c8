"""The flow table's hash: nobody may aim for collisions, and one key hashes as many do."""

import os

import numpy as np

from mrelay.counters import Counters
from mrelay.model.ruleset import FlowKey, RuleSet
from mrelay.supervisor.children import new_counters
from mrelay.worker.egress import Egress
from mrelay.worker.flows import FlowTable, key_words

LIMIT = 4096
GROUP = 0xFF3E << 112 | 0x8000_0001


def spoofed(first: int, ninth: int) -> FlowKey:
    """A flow whose source differs from its likes in the top bytes of its two halves."""
    source = 0x20010DB8 << 96 | 1
    return FlowKey(3, 0, 6, source ^ first << 120 ^ ninth << 56, GROUP, 5000)


def test_spoofed_sources_do_not_share_places() -> None:
    """Their top bits would cancel out in XORed products of whole words, whatever the factors."""
    fd = new_counters(LIMIT)
    table = FlowTable(Counters(fd, LIMIT, write=True), LIMIT, RuleSet(), Egress(), lambda: None)
    os.close(fd)
    keys = [spoofed(first, ninth) for first in range(64) for ninth in range(64)]
    places = {table._hash_one(key_words(key)) for key in keys}
    assert len(places) > len(keys) / 2
    slots = [table.find(key) for key in keys]
    words = list(np.array([key_words(key) for key in keys], np.uint64).T.copy())
    found = table.lookup(words)
    assert np.count_nonzero(found == slots) > 0.99 * len(keys)  # eight probes may leave one without a place
