"""Offload features of a veth, ours against what `ethtool -k` says."""

import pytest

from mrelay.kernel.ethtool import features, set_features
from netns.lab import Lab, Namespace

pytestmark = pytest.mark.netns

# `ethtool -k` shows these under older names, or as the sum of several features
SAME_NAME = ("tx-udp-segmentation", "rx-udp-gro-forwarding", "rx-gro-list", "tx-nocache-copy", "rx-all")


@pytest.fixture
def veth(lab: Lab) -> Namespace:
    """A namespace with a veth pair v0, v1."""
    namespace = lab.namespace("host")
    namespace.ip("link add v0 type veth peer name v1", "link set v0 up", "link set v1 up")
    return namespace


def test_reads_what_ethtool_reads(veth: Namespace) -> None:
    with veth.inside():
        ours = features("v0")
    theirs = veth.features("v0")
    for name in SAME_NAME:
        assert ours[name].active is theirs[name].startswith("on"), name
        assert ours[name].changeable is ("[fixed]" not in theirs[name]), name


def test_sets_and_puts_back(veth: Namespace) -> None:
    wanted = {"rx-gro": True, "rx-udp-gro-forwarding": True}
    with veth.inside():
        original = features("v0")
        before = set_features("v0", wanted)
    assert before == {name: original[name].requested for name in wanted}
    assert veth.features("v0")["rx-udp-gro-forwarding"] == "on"
    assert veth.features("v0")["generic-receive-offload"] == "on"
    with veth.inside():
        assert set_features("v0", before) == wanted
        assert features("v0") == original
    assert veth.features("v0")["rx-udp-gro-forwarding"] == "off"


def test_leaves_alone_what_is_unknown_or_fixed(veth: Namespace) -> None:
    with veth.inside():
        original = features("v0")
        fixed = next(name for name, feature in original.items() if not feature.changeable)
        assert set_features("v0", {"no-such-feature": True, fixed: not original[fixed].active}) == {}
        assert features("v0") == original


def test_a_missing_interface_is_an_error(veth: Namespace) -> None:
    with veth.inside():
        for name in ("nothere", "a-name-that-is-too-long"):
            with pytest.raises(OSError, match="No such device"):
                features(name)
