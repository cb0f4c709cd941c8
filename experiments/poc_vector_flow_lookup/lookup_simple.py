"""Lookups that need no table of ours: Python's dict, np.unique before it, np.searchsorted.

Each method is built from a store and answers batches with slots; `install` and `remove` change one flow.
"""

import sys
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from lookup_keys import I32, U64, Key, Mix, Store, Words


class Method(ABC):
    """One way of finding slots. What a method holds is found only if its whole key is the same."""

    name: ClassVar[str]

    def __init__(self, store: Store, mix: Mix) -> None:
        """Build the method's index of the store's flows."""
        self.store, self.mix = store, mix

    @abstractmethod
    def lookup(self, words: Words) -> I32:
        """Slots of a batch; -1 for keys that are not there."""

    @abstractmethod
    def install(self, slot: int) -> None:
        """Take in the flow whose key now stands in this slot of the store."""

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Forget the flow in this slot, whose key still stands there."""


class EachPacket(Method):
    """A dict of tuples, asked packet by packet."""

    name = "dict, each packet"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        self._slots = {key: slot for slot, key in enumerate(_keys(store.words(slice(store.used))))}

    def lookup(self, words: Words) -> I32:
        get = self._slots.get
        return np.array([get(key, -1) for key in _keys(words)], np.int32)

    def install(self, slot: int) -> None:
        self._slots[self._key(slot)] = slot

    def remove(self, slot: int) -> None:
        del self._slots[self._key(slot)]

    def memory(self) -> int:
        """Bytes of the dict, its tuples and their numbers."""
        objects = sum(sys.getsizeof(key) + sum(map(sys.getsizeof, key)) for key in self._slots)
        return sys.getsizeof(self._slots) + objects

    def _key(self, slot: int) -> tuple[int, ...]:
        key: Key = self.store.key(slot)
        return key[1], key[3], key[4]


def _keys(words: Words) -> list[tuple[int, ...]]:
    return list(zip(*(word.tolist() for word in words if word is not None), strict=True))


class UniqueFirst(EachPacket):
    """The same dict, asked once for each different flow of the batch."""

    name = "np.unique, then dict"

    def lookup(self, words: Words) -> I32:
        _, first, where = np.unique(self.mix.many(words), return_index=True, return_inverse=True)
        each: Words = [None if word is None else word[first] for word in words]
        return self.store.confirm(super().lookup(each)[where], words)


class Sorted(Method):
    """Hashes in order, with their slots beside them."""

    name = "sorted, searchsorted"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        hashes = mix.many(store.words(slice(store.used)))
        order = np.argsort(hashes)
        self._hashes: U64 = hashes[order]
        self._slots = order.astype(np.int32)

    def lookup(self, words: Words) -> I32:
        place = np.searchsorted(self._hashes, self.mix.many(words))
        slots: I32 = self._slots.take(place, mode="clip")
        return self.store.confirm(slots, words)

    def install(self, slot: int) -> None:
        place = self._place(slot)
        value = np.uint64(self.mix.one(self.store.key(slot)))
        self._hashes, self._slots = np.insert(self._hashes, place, value), np.insert(self._slots, place, slot)

    def remove(self, slot: int) -> None:
        place = self._place(slot)
        self._hashes, self._slots = np.delete(self._hashes, place), np.delete(self._slots, place)

    def _place(self, slot: int) -> int:
        return int(np.searchsorted(self._hashes, np.uint64(self.mix.one(self.store.key(slot)))))
