"""The highest rate without loss, as in RFC 2544 §26.1: found by halving, in a bounded number of trials. Pure."""

import math
from collections.abc import Callable
from typing import Final

LOSS: Final = 1e-5  # share of datagrams: 0.001 %
GROSS: Final = 1e-3  # a trial that loses more is not tried again
RANGE: Final = 32  # how far below the ceiling the search goes


def highest(loss_at: Callable[[float], float], ceiling: float, steps: int) -> float:
    """The highest rate found at which no more than LOSS is lost; 0.0 when there is none above ceiling / RANGE.

    `loss_at` is one trial. A rate passes when one of two trials does: others use the machine too. Halving is on a
    logarithmic scale, so the result is within RANGE ** (1 / 2 ** steps) of the truth.
    """

    def passes(rate: float) -> bool:
        lost = loss_at(rate)
        return lost <= LOSS or (lost <= GROSS and loss_at(rate) <= LOSS)

    if passes(ceiling):
        return ceiling
    low, high, best = ceiling / RANGE, ceiling, 0.0
    for _ in range(steps):
        middle = math.sqrt(low * high)
        if passes(middle):
            low = best = middle
        else:
            high = middle
    return best
