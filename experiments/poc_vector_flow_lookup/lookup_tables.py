"""Hash tables in arrays: probing by tag, two places for each flow, perfect hashing in two levels.

All find a slot without looking at keys, by a few gathers over the whole batch, and compare keys once at the end.
A table has room for four times the flows it is built from, as the relay's has.
"""

import secrets

import numpy as np
from lookup_keys import I32, U64, Mix, Store, Words
from lookup_simple import Method
from numpy.typing import NDArray

I64 = NDArray[np.int64]
_EMPTY, _GONE = 0, 2  # tags of places without a flow; flows' tags are odd
_TAG_MASK = 0xFFFFFFFF
_KICKS = 500
_MASK = (1 << 64) - 1


def _room(flows: int) -> int:
    """Bits of a table's index."""
    return max(10, (4 * flows - 1).bit_length())


def _tags(hashes: U64) -> NDArray[np.uint32]:
    return hashes.astype(np.uint32) | np.uint32(1)


class Probing(Method):
    """Open addressing: go on from the hash's place until its tag, or an empty place, is met."""

    name = "open addressing, tags"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        bits = _room(store.used)
        self._shift, self._last = 64 - bits, (1 << bits) - 1
        self._slots = np.full(1 << bits, -1, np.int32)
        self._tag = np.zeros(1 << bits, np.uint32)
        hashes = mix.many(store.words(slice(store.used)))
        place, todo = self._first(hashes), np.arange(store.used)
        while len(todo):
            at = place[todo] & self._last
            free = self._slots[at] < 0
            self._slots[at[free]] = todo[free]  # of several that want one place, the last gets it
            todo = todo[self._slots[at] != todo]
            place[todo] += 1
        taken = self._slots >= 0
        self._tag[taken] = _tags(hashes)[self._slots[taken]]

    def _first(self, hashes: U64) -> I64:
        return (hashes >> np.uint64(self._shift)).astype(np.int64)

    def lookup(self, words: Words) -> I32:
        hashes = self.mix.many(words)
        tags, place = _tags(hashes), self._first(hashes)
        there = self._tag.take(place)
        rows = np.flatnonzero((there != tags) & (there != _EMPTY))
        while len(rows):
            place[rows] = at = (place.take(rows) + 1) & self._last
            there = self._tag.take(at)
            rows = rows[(there != tags.take(rows)) & (there != _EMPTY)]
        return self.store.confirm(self._slots.take(place), words)

    def install(self, slot: int) -> None:
        value = self.mix.one(self.store.key(slot))
        at = value >> self._shift
        while self._tag[at] & 1:
            at = (at + 1) & self._last
        self._tag[at], self._slots[at] = value & _TAG_MASK | 1, slot

    def remove(self, slot: int) -> None:
        at = self.mix.one(self.store.key(slot)) >> self._shift
        while self._slots[at] != slot:
            at = (at + 1) & self._last
        self._tag[at], self._slots[at] = _GONE, -1  # not empty: others may have gone on from here


class TwoPlaces(Method):
    """Cuckoo hashing: a flow is in one of two places, so a batch takes two gathers and no loop."""

    name = "two places, tags"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        bits = _room(store.used)
        self._shift = np.uint64(64 - bits)
        hashes = mix.many(store.words(slice(store.used)))
        one, other = self._places(hashes)
        slots = np.full(1 << bits, -1, np.int64)
        at, todo = one.copy(), np.arange(store.used)
        for _ in range(_KICKS):
            if not len(todo):
                break
            wanted = at[todo]
            out = np.unique(slots[wanted])
            slots[wanted] = todo  # whoever was there, or came before, tries the other place
            todo = np.concatenate([todo[slots[wanted] != todo], out[out >= 0]])
            at[todo] = one[todo] + other[todo] - at[todo]
        else:
            raise RuntimeError(f"{len(todo)} flows found no place")
        self._entries = np.zeros(1 << bits, np.uint64)  # tag << 32 | slot; 0: empty
        taken = slots >= 0
        self._entries[taken] = _tags(hashes[slots[taken]]).astype(np.uint64) << np.uint64(32) | slots[
            taken
        ].astype(np.uint64)

    def _places(self, hashes: U64) -> tuple[I64, I64]:
        stirred = (hashes ^ hashes >> np.uint64(31)) * np.uint64(0x9E3779B97F4A7C15)
        return (hashes >> self._shift).astype(np.int64), (stirred >> self._shift).astype(np.int64)

    def lookup(self, words: Words) -> I32:
        hashes = self.mix.many(words)
        one, other = self._places(hashes)
        first = self._entries.take(one)
        right = (first >> np.uint64(32)).astype(np.uint32) == _tags(hashes)
        entry = np.where(right, first, self._entries.take(other))
        # The other place's tag is left unread: the key is compared anyhow. An empty place says slot 0.
        return self.store.confirm(entry.astype(np.int32), words)

    def _both(self, slot: int) -> tuple[int, int, int]:
        """The entry of a flow, and where it may stand."""
        value = self.mix.one(self.store.key(slot))
        one, other = self._places(np.array([value], np.uint64))
        return (value & _TAG_MASK | 1) << 32 | slot, int(one[0]), int(other[0])

    def install(self, slot: int) -> None:
        entry, at, _ = self._both(slot)
        for _ in range(_KICKS):
            out = int(self._entries[at])
            self._entries[at] = entry
            if not out:
                return
            entry, one, other = self._both(out & _TAG_MASK)
            at = one + other - at
        raise RuntimeError("no place: build the table anew")

    def remove(self, slot: int) -> None:
        entry, one, other = self._both(slot)
        self._entries[one if self._entries[one] == entry else other] = 0


class Perfect(Method):
    """Two levels (Fredman, Komlós, Szemerédi): each bucket of k flows has k² places and a factor of its own."""

    name = "perfect, two levels"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        bits = max(1, (store.used - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        hashes = mix.many(store.words(slice(store.used)))
        bucket = (hashes >> self._shift).astype(np.int64)
        self._space = np.bincount(bucket, minlength=1 << bits).astype(np.uint64) ** np.uint64(2)
        self._start = np.cumsum(self._space) - self._space
        self._factor = np.full(1 << bits, _odd(), np.uint64)
        self._end = int(self._space.sum())
        bad = np.arange(0)
        while True:
            place = self._places(hashes, bucket)
            bad = np.unique(bucket[np.bincount(place, minlength=self._end)[place] > 1])
            if not len(bad):
                break
            self._factor[bad] = [_odd() for _ in range(len(bad))]
        self._slots = np.full(2 * self._end, -1, np.int32)
        self._slots[place] = np.arange(store.used)

    def _places(self, hashes: U64, bucket: I64) -> I64:
        inside = (hashes * self._factor.take(bucket) >> np.uint64(32)) * self._space.take(bucket) >> np.uint64(32)
        place: I64 = (inside + self._start.take(bucket)).astype(np.int64)
        return place

    def lookup(self, words: Words) -> I32:
        hashes = self.mix.many(words)
        place = self._places(hashes, (hashes >> self._shift).astype(np.int64))
        return self.store.confirm(self._slots.take(place), words)

    def _bucket(self, slot: int) -> tuple[int, list[int]]:
        """A flow's bucket and the slots that are in it."""
        bucket = self.mix.one(self.store.key(slot)) >> int(self._shift)
        start, space = int(self._start[bucket]), int(self._space[bucket])
        return bucket, [there for there in self._slots[start : start + space].tolist() if there >= 0]

    def install(self, slot: int) -> None:
        bucket, members = self._bucket(slot)
        members.append(slot)
        start, space = self._end, len(members) ** 2
        self._end += space  # the old places are lost until the next build
        if self._end > len(self._slots):
            self._slots = np.concatenate([self._slots, np.full(self._end, -1, np.int32)])
        hashes = [self.mix.one(self.store.key(member)) for member in members]
        places: list[int] = []
        while len(set(places)) < len(members):
            factor = _odd()
            places = [(value * factor & _MASK) >> 32 for value in hashes]
            places = [(place * space >> 32) + start for place in places]
        self._slots[places] = members
        self._start[bucket], self._space[bucket], self._factor[bucket] = start, space, factor

    def remove(self, slot: int) -> None:
        bucket, _ = self._bucket(slot)
        start, space = int(self._start[bucket]), int(self._space[bucket])
        self._slots[start + self._slots[start : start + space].tolist().index(slot)] = -1


def _odd() -> int:
    return secrets.randbits(63) << 1 | 1
