"""What the supervisor checks before it starts workers, and what it does for a control that asks again."""

import os
from unittest.mock import Mock

import pytest

from mrelay.messages import MAX_BUSY_POLL, Done, StartWorkers
from mrelay.supervisor.requests import Requests, check_sizes
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


def test_a_fast_path_that_was_refused_is_not_tried_again_beside_workers_without_it() -> None:
    """A control that was started again is told the same as the one before."""
    asked, resources, control = StartWorkers(1, (CORE,), 1000, 0, fast=True), Mock(), Mock()
    refused = resources.fast.message.return_value
    resources.fast.fds.return_value = []
    workers: list[Mock] = []
    started = Mock(side_effect=lambda _: workers.append(Mock(core=CORE, flow_limit=1000, busy_poll=0)))
    requests = Requests("", resources, Mock(), Mock(), control, workers, started)
    for _ in range(2):
        requests.answer(asked)
        assert [call.args for call in control.tell.call_args_list] == [(refused, []), (Done(1), [])]
        control.reset_mock()
    resources.fast.start.assert_called_once_with(1, 1000)
    started.assert_called_once_with(asked)
