"""Which routes of several outputs XDP may broadcast: by interfaces all of which take frames from it.

Owns this worker's share of `broadcasts` and of the devmaps that belong to them (bpf/mrelay.h), and `broadcast` of
`route`. Called by worker.fastpath; never blocks. Routes that leave by the same interfaces, in the same order,
share one; XDP compares it with the hops, so that one that is out of date leaves the route to tc, until `refresh`.
"""

import logging
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mrelay.ebpf.layout import BROADCAST_HOP, HOP_XDP, MAX_COPIES
from mrelay.ebpf.maps import Maps

log = logging.getLogger("mrelay.worker")

_KEY: Final = struct.Struct("=I")
_VALUE: Final = struct.Struct("=Ii")  # linux/bpf.h, struct bpf_devmap_val
_SEEN: Final = ["flags", "changes"]  # of struct hop: the former is set last
Interfaces = tuple[int, ...]  # ifindex of each output, in order


class Broadcasts:
    """Nothing of it is lost with the worker: the next one finds in the maps what each broadcast says."""

    def __init__(self, maps: Maps, worker: int) -> None:
        self._maps = maps
        self._numbers: dict[Interfaces, int] = {}
        self._spare: list[int] = []
        self._resting: list[int] = []  # out of use since the last `refresh`: a frame may still be on its way
        self._hops: dict[int, list[int]] = {}  # of each route, by its start: numbers of its outputs' hops
        self._all: list[int] | None = None  # of all of them; None: routes came or went since `refresh`
        self._seen: NDArray[Any] = maps.hops[:0]  # what was said of these
        for number in maps.sizes.broadcasts(worker):
            interfaces = tuple(filter(None, maps.broadcasts["ifindex"][number].tolist()))
            if interfaces:
                self._numbers[interfaces] = number
            else:
                self._spare.append(number)

    def forget(self) -> None:
        """All routes are built anew."""
        self._hops.clear()
        self._all = None

    def add(self, start: int, hops: Sequence[int]) -> None:
        """The route that starts there has outputs with these hops."""
        if 1 < len(hops) <= MAX_COPIES:
            self._hops[start] = list(hops)
            self._all = None
            self._assign(start)

    def refresh(self) -> None:
        """Hops may have changed, and routes gone."""
        changed = self._all is None or bool(self._resting)  # with room again, for routes that found none
        self._spare += self._resting
        self._resting = []
        if self._all is None:
            self._all = list(chain.from_iterable(self._hops.values()))
        now = self._maps.hops[_SEEN][self._all]
        if changed or not np.array_equal(now, self._seen):
            self._seen = now
            for start in self._hops:
                self._assign(start)
            self._rest()

    def _rest(self) -> None:
        """Those that no route has any more."""
        used = set(self._maps.route["broadcast"][list(self._hops)].tolist())
        for interfaces, number in list(self._numbers.items()):
            if number + 1 not in used:
                self._close(number, interfaces)

    def _close(self, number: int, interfaces: Interfaces) -> None:
        self._maps.broadcasts["ifindex"][number] = 0
        self._numbers.pop(interfaces, None)
        self._resting.append(number)

    def _assign(self, start: int) -> None:
        hops, flags = self._hops[start], self._maps.hops["flags"]
        value = BROADCAST_HOP
        if all(flags[hop] & HOP_XDP for hop in hops):
            interfaces = tuple(self._maps.hops["ifindex"][hops].tolist())
            value = self._number(interfaces, int(self._maps.hops["changes"][hops].max())) + 1
        self._maps.route["broadcast"][start] = value

    def _number(self, interfaces: Interfaces, changes: int) -> int:
        """A broadcast to these interfaces, good for hops up to this change; -1: no room, or one is gone."""
        number = self._numbers.get(interfaces)
        if number is None:
            if not self._spare:
                return -1
            number = self._spare.pop()
        elif self._maps.broadcasts["changes"][number] >= changes:
            return number
        try:
            self._write(number, interfaces)
        except OSError as error:
            log.debug("no broadcast to interfaces %s (%s): tc carries these", interfaces, error.strerror)
            self._close(number, interfaces)
            return -1
        self._numbers[interfaces] = number
        repeats = len(set(interfaces)) < len(interfaces)
        self._maps.broadcasts[number] = changes, repeats, interfaces + (0,) * (MAX_COPIES - len(interfaces))
        return number

    def _write(self, number: int, interfaces: Interfaces) -> None:
        devmap = self._maps.devmaps[number]
        for place in range(MAX_COPIES):
            if place < len(interfaces):
                devmap.update(_KEY.pack(place), _VALUE.pack(interfaces[place], self._maps.copier))
            else:
                devmap.delete(_KEY.pack(place))
