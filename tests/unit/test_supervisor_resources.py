"""Limits on what the supervisor holds. (What it refuses one by one: tests/netns/test_attacks.py.)"""

import resource
import socket

import pytest

from mrelay.messages import HoldUnicast, JoinGroup, OpenIngress, Resource, SetGro
from mrelay.supervisor import resources
from mrelay.supervisor.resources import Opened, Refused, Resources


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Resources:
    """Resources that cost nothing."""
    openers = dict.fromkeys(resources._OPENERS, lambda *_: Opened([], lambda: None))
    monkeypatch.setattr(resources, "_OPENERS", openers)
    found = Resources()
    found.workers = 2
    return found


def holds(*ports: int) -> list[Resource]:
    return [HoldUnicast("127.0.0.1", port) for port in ports]


def test_no_more_of_a_kind_than_rules_can_need(held: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources._MOST, HoldUnicast, 3)
    for what in holds(1, 2, 3, 3, 2):
        held.open(what)
    with pytest.raises(Refused, match="3 HoldUnicast: no rules need more"):
        held.open(HoldUnicast("127.0.0.1", 4))
    held.open(JoinGroup(1, "239.1.1.1", None))  # another kind
    held.close(HoldUnicast("127.0.0.1", 1))
    held.close(HoldUnicast("127.0.0.1", 1))  # once is enough
    held.open(HoldUnicast("127.0.0.1", 4))
    with pytest.raises(Refused):
        held.open(HoldUnicast("127.0.0.1", 1))


def test_descriptors_stay_for_children(held: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resources._SPARE + 5, 1024))
    held.open(OpenIngress(1, 256))  # two rings for each of two workers
    with pytest.raises(Refused, match="4 of 133 descriptors are in use") as refusal:
        held.open(OpenIngress(2, 256))
    assert "LimitNOFILE=" in refusal.value.remedy
    held.open(SetGro(1))
    held.open(*holds(1))
    with pytest.raises(Refused):
        held.open(*holds(2))


def test_a_failure_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources._MOST, HoldUnicast, 1)
    held = Resources()
    for _ in range(3):
        with pytest.raises(OSError, match="assign requested address"):
            held.open(HoldUnicast("192.0.2.1", 5000))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    held.open(HoldUnicast("127.0.0.1", port))
    held.close_all()
