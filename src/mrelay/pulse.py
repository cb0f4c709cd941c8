"""A child's pulse: a count in shared memory that it raises at each turn of its loop.

Owns the memory's layout: one u64. Control and workers beat; the supervisor, which made the memory, reads it
(supervisor/watch.py). Memory rather than messages, so that nothing piles up while the supervisor is stopped,
and a beat costs no system call. Standard library only; nothing here blocks.
"""

import mmap
import os
from typing import Final

INTERVAL: Final = 0.5  # seconds: an idle child beats at least this often
SIZE: Final = 8  # bytes of the memory that mean something


class Pulse:
    """The child's end. Takes over `fd`."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)
        os.close(fd)
        self._count = memoryview(self._memory)[:SIZE].cast("Q")

    def beat(self) -> None:
        """This process's main loop has turned, or its long work goes on."""
        self._count[0] += 1
