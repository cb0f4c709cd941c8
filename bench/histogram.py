"""Histograms of nanoseconds as load.bpf.c fills them: 64 buckets in each octave, so 1.6 % wide. Pure."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FINE: Final = 6  # as in load.bpf.c
BUCKETS: Final = (64 - FINE + 1) << FINE
Counts = NDArray[np.uint64]


def _bounds() -> NDArray[np.float64]:
    """The lowest value of each bucket, and of the one after the last."""
    index = np.arange(BUCKETS + 1)
    octave, step = (index >> FINE) - 1, index & ((1 << FINE) - 1)
    wide = ((1 << FINE) + step) * 2.0 ** np.maximum(octave, 0)
    return np.where(octave < 0, index, wide)


BOUNDS: Final = _bounds()


def quantiles(counts: Counts, wanted: Sequence[float]) -> list[float]:
    """The values that such shares of all are not above (0.5: the median); NaN when there are none.

    Within a bucket its middle, but for 1.0, the maximum, its upper end.
    """
    total = int(counts.sum())
    if not total:
        return [float("nan")] * len(wanted)
    ranks = [min(total, max(1, int(np.ceil(share * total)))) for share in wanted]
    places = np.searchsorted(np.cumsum(counts), ranks)
    middles = (BOUNDS[:-1] + BOUNDS[1:]) / 2
    return [float(BOUNDS[at + 1] if share >= 1 else middles[at]) for at, share in zip(places, wanted, strict=True)]


def curve(counts: Counts) -> list[list[float]]:
    """[value, share of all that is above it] wherever there are some: what a plot of the distribution needs."""
    total = float(counts.sum())
    above = total - np.cumsum(counts).astype(float)
    used: Any = np.flatnonzero(counts)
    return [[round(float(BOUNDS[at + 1]), 1), float(above[at]) / total] for at in used]
