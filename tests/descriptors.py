"""A check that every descriptor opened meanwhile is closed again. Called by tests."""

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def none_leaks() -> Iterator[None]:
    """AssertionError if other descriptors are open at the end than at the start.

    No garbage collection meanwhile: it would close what tests before left, and theirs would be missed.
    """
    gc.disable()
    try:
        before = os.listdir("/proc/self/fd")
        yield
        assert os.listdir("/proc/self/fd") == before, "descriptors leak"
    finally:
        gc.enable()
