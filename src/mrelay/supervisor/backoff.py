"""When a child that ended may start again.

Owns the delays and the budget. Pure: told how long each life was. A child that worked for a while starts again at
once, however often it ends: that serves best. One that ends early, again and again, waits longer each time; beyond
its budget it is said to be in a crash loop, until it lives.
"""

from typing import Final

CAP: Final = 30.0  # seconds: the longest delay
_DELAYS: Final = (0.0, 0.0, 0.0, 0.1, 0.5, 2.0, 5.0, CAP)  # by how many early ends came in a row
_EARLY: Final = 1.0  # seconds of life: it has not done its work yet
_BUDGET: Final = 5.0  # ends
_FORGIVEN: Final = 2.0  # seconds of life that make up for one end


class BackOff:
    """One child's."""

    def __init__(self) -> None:
        self._row = 0
        self._ends = 0.0

    def ended(self, life: float) -> float:
        """It ended after `life` seconds of work: how many seconds to wait before the next start."""
        self._row = min(self._row + 1, len(_DELAYS) - 1) if life < _EARLY else 0
        self._ends = max(0.0, self._ends - life / _FORGIVEN) + 1
        return _DELAYS[self._row]

    def looping(self, life: float = 0.0) -> bool:
        """Whether the budget is used up, with the `life` of the present process to its credit."""
        return self._ends - life / _FORGIVEN >= _BUDGET
