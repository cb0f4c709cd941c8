"""What flows counted is booked on each of their rules and links, once, however many there are at a time."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrelay.counters import Counters
from mrelay.model.ruleset import Destination, Route
from mrelay.supervisor.children import new_counters
from mrelay.worker import books
from mrelay.worker.books import Books

LIMIT = 16
TO = Destination(1, 2, 4, "239.2.2.2", 6000, False, 0, -1, False)
SLOTS = st.integers(0, LIMIT - 1)
ROUTES = st.builds(
    lambda rules, links: Route(tuple(rules), (TO,) * len(links), tuple(map(tuple, links)), (), (0,) * len(links)),
    st.lists(st.integers(0, 5), max_size=3, unique=True),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=4),
)


@pytest.fixture
def counters() -> Iterator[Counters]:
    fd = new_counters(LIMIT)
    made = Counters(fd, LIMIT, write=True)
    os.close(fd)
    yield made


@pytest.mark.parametrize("most", [1, 20, 1 << 16])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(SLOTS, ROUTES, max_size=LIMIT),
    st.lists(st.dictionaries(SLOTS, st.tuples(st.integers(0, 9), st.integers(0, 999))), max_size=3),
)
def test_rules_and_links_have_what_their_flows_counted(
    counters: Counters,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    routes: dict[int, Route],
    seconds: list[dict[int, tuple[int, int]]],
) -> None:
    """As adding one by one would. What no rule wants is lost; a slot without a route keeps its own for later."""
    monkeypatch.setattr(books, "_MOST", most)
    for table in (counters.flows, counters.folded, counters.rules, counters.links):
        table[:] = 0
    made = Books(counters, lambda: None)
    for slot, route in routes.items():
        made.follow(slot, route)
    rules, links = np.zeros((2, 6), np.uint64), np.zeros((2, 6), np.uint64)
    for second in seconds:
        for slot, counted in second.items():
            counters.flows[:, slot] += np.array(counted, np.uint64)
            for rule in routes[slot].rules if slot in routes else ():
                rules[:, rule] += np.array(counted, np.uint64)
            for link in (link for some in routes[slot].links for link in some) if slot in routes else ():
                links[:, link] += np.array(counted, np.uint64)
        made.fold()
    assert (counters.rules[:2, :6] == rules).all()
    assert (counters.links[:2, :6] == links).all()
    ours = list(routes)
    assert (counters.folded[:, ours] == counters.flows[:, ours]).all()
    assert not np.delete(counters.folded, ours, axis=1).any()


def test_who_leaves_is_booked_no_more(counters: Counters) -> None:
    made = Books(counters, lambda: None)
    route = Route((1,), (TO,), ((2,),), (), (0,))
    made.follow(3, route)
    made.follow(4, route)
    made.leave(3)
    counters.flows[:] = 7
    made.fold()
    assert counters.rules[:2, 1].tolist() == counters.links[:2, 2].tolist() == [7, 7]
    made.reset()
    counters.flows[:] = 9
    made.fold()
    assert counters.rules.sum() == counters.links.sum() == 14, "nobody at all"
