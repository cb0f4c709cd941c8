"""Which interfaces take frames from XDP, as the kernel says, and that it says when that changes."""

import select
import socket

import pytest

from mrelay.kernel import netdev
from netns.lab import Lab

pytestmark = pytest.mark.netns


def test_a_veth_takes_frames_while_its_peer_has_napi(lab: Lab) -> None:
    """GRO gives it that."""
    star = lab.star()
    with star.relay.inside():
        ifindex = socket.if_nametoindex("out0")
        try:
            watch = netdev.Watch()
        except OSError as error:
            pytest.skip(f"needs generic netlink's family netdev (Linux 6.3): {error}")
        assert watch.targets() == frozenset()
        for gro, targets in (("on", {ifindex}), ("off", set())):
            watch.drain()
            assert not select.select([watch], [], [], 0)[0]
            star.sink.run("ethtool", "-K", "k0", "gro", gro)
            assert select.select([watch], [], [], 10)[0] == [watch]
            assert watch.targets() == targets
        watch.close()


def test_a_family_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Linux 6.3."""
    monkeypatch.setattr(netdev, "FAMILY", "no-such-family")
    with pytest.raises(FileNotFoundError):
        netdev.Watch()
