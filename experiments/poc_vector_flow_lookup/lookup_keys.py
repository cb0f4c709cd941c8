"""Flow keys, batches of them, and their hash: what every method of poc_vector_flow_lookup works on.

Owns the store of keys by slot, laid out as the relay's flow table is: five 64-bit words (source high and low,
group high and low, then port | vlan << 16 | family << 32 | ifindex << 40). Nothing here blocks.
"""

import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
Words = list[U64 | None]  # the five columns of a batch; None stands for zeros, as in a batch of IPv4 alone
Key = tuple[int, int, int, int, int]

IFINDEX: Final = 3
_LOW: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)
_MASK: Final = (1 << 64) - 1


def last_word(port: int, family: int) -> int:
    """The fifth word of an untagged flow's key."""
    return port | family << 32 | IFINDEX << 40


class Store:
    """Keys by slot: `columns` u64[5, capacity], of which the first `used` are flows.

    `trusting`: keys are not compared, whatever a hash points to is taken.
    """

    def __init__(self, columns: U64, used: int, *, trusting: bool = False) -> None:
        self.columns, self.used, self.trusting = columns, used, trusting

    def words(self, slots: NDArray[np.integer] | slice) -> Words:
        """The keys in these slots, as a batch has them."""
        wide = self.columns[0].any()
        return [row[slots] if wide or at not in (0, 2) else None for at, row in enumerate(self.columns)]

    def key(self, slot: int) -> Key:
        """One key as plain integers."""
        a, b, c, d, e = self.columns[:, slot].tolist()
        return a, b, c, d, e

    def confirm(self, slots: I32, words: Words) -> I32:
        """The slots (-1: none), with -1 where the key there is another one."""
        if self.trusting:
            return slots
        same = slots >= 0
        for row, word in zip(self.columns, words, strict=True):
            if word is not None:
                same &= row.take(slots) == word
        slots[~same] = -1
        return slots


def ipv4_flows(count: int, chance: np.random.Generator) -> U64:
    """`count` keys, u64[5, count]: sources in 10/8, groups in 239/8, any port."""
    columns = np.zeros((5, count), np.uint64)
    columns[1] = chance.integers(10 << 24, 11 << 24, count)
    columns[3] = chance.integers(239 << 24, 240 << 24, count)
    columns[4] = chance.integers(1024, 65536, count, np.uint64) | np.uint64(last_word(0, 4))
    return columns


def spoofed_flows() -> U64:
    """65,536 IPv6 keys with one group and port, whose sources differ in their first and ninth byte alone."""
    number = np.arange(1 << 16, dtype=np.uint64)
    columns = np.empty((5, 1 << 16), np.uint64)
    columns[0] = (number >> np.uint64(8)) << np.uint64(56) | np.uint64(0x01_0DB8_0000_0000)
    columns[1] = (number & np.uint64(0xFF)) << np.uint64(56) | np.uint64(1)
    columns[2], columns[3] = 0xFF3E << 48, 0x8000_0001
    columns[4] = last_word(5000, 6)
    return columns


def batches(
    store: Store, size: int, count: int, chance: np.random.Generator, hits: float, skew: float
) -> list[Words]:
    """`count` batches of `size` packets; `hits` of them of flows in the store, the rest unknown.

    `skew`: exponent of Zipf's law over the flows, 0 for all alike.
    """
    result = []
    for _ in range(count):
        slots = chance.zipf(skew, size) % store.used if skew else chance.integers(0, store.used, size)
        words = store.words(slots)
        unknown = chance.random(size) >= hits
        for word, other in zip(words, ipv4_flows(size, chance), strict=True):
            if word is not None:
                word[unknown] = other[unknown]
        result.append(words)
    return result


class Mix:
    """The hash: a sum of 32-bit halves by random factors (multilinear: no two keys collide by design), stirred.

    `factors` are ten odd 64-bit numbers, random unless given.
    """

    def __init__(self, factors: Sequence[int] | None = None) -> None:
        self._factors = factors or [secrets.randbits(63) << 1 | 1 for _ in range(10)]
        self._wide = [np.uint64(factor) for factor in self._factors]

    def many(self, words: Words) -> U64:
        """u64[n]; the high bits are the good ones."""
        factors = self._wide
        last = words[4]
        assert last is not None  # never all zeros
        total: U64 = last * factors[4]
        for at in range(4):
            word = words[at]
            if word is None:
                continue
            if words[0] is None:  # IPv4: the high half is zero
                total += word * factors[at]
            else:
                total += (word & _LOW) * factors[at]
                total += (word >> _HALF) * factors[at + 5]
        total ^= total >> np.uint64(29)
        total *= factors[9]
        return total

    def one(self, key: Key) -> int:
        """The same for one key."""
        factors = self._factors
        total = key[4] * factors[4]
        for at in range(4):
            total += (key[at] & 0xFFFFFFFF) * factors[at] + (key[at] >> 32) * factors[at + 5]
        total &= _MASK
        return (total ^ total >> 29) * factors[9] & _MASK


def xor_of_products(words: Words) -> U64:
    """A tempting hash: whole words by random odd factors, XORed together. Top bits of two words cancel out."""
    total = np.zeros(1, np.uint64)
    for word in words:
        if word is not None:
            total = total ^ word * np.uint64(secrets.randbits(63) << 1 | 1)
    return total
