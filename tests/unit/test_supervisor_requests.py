"""What the supervisor checks before it starts workers."""

import os

import pytest

from mrelay.messages import MAX_BUSY_POLL, StartWorkers
from mrelay.supervisor.requests import check_sizes
from mrelay.supervisor.resources import Refused

CORE = min(os.sched_getaffinity(0))
MOST_FLOWS = 1 << 20


def test_what_can_be() -> None:
    check_sizes(StartWorkers(1, (CORE,), 1, 0))
    check_sizes(StartWorkers(1, (CORE,), MOST_FLOWS, MAX_BUSY_POLL))


@pytest.mark.parametrize(
    ("cores", "flows", "busy_poll", "problem"),
    [
        ((), 1, 0, "cores"),
        ((CORE, CORE), 1, 0, "cores"),
        ((CORE, 1 << 40), 1, 0, "cores"),
        ((-1,), 1, 0, "cores"),
        ((CORE,), 0, 0, "flow limit"),
        ((CORE,), MOST_FLOWS + 1, 0, "flow limit"),
        ((CORE,), 1, -1, "busy_poll"),
        ((CORE,), 1, MAX_BUSY_POLL + 1, "busy_poll"),
    ],
)
def test_what_can_not(cores: tuple[int, ...], flows: int, busy_poll: int, problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        check_sizes(StartWorkers(1, cores, flows, busy_poll))
