"""Who may change the rules: the kernel's word about a client, and the rule."""

import os
import socket

import pytest

from mrelay.control.peers import Access, Peer, peer_of

OWNER, GROUP, OTHER = 61000, 61001, 61002


@pytest.mark.parametrize(
    ("uid", "groups", "may"),
    [
        (0, {0}, True),
        (OWNER, {OWNER}, True),
        (OTHER, {OTHER, GROUP}, True),
        (OTHER, {GROUP}, True),
        (OTHER, {OTHER, 0, OWNER}, False),
        (GROUP, {OTHER}, False),
    ],
)
def test_who_may_change(uid: int, groups: set[int], may: bool) -> None:
    assert Access(OWNER, GROUP).may_change(Peer(1, uid, frozenset(groups))) is may


def test_what_the_kernel_says() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        peer = peer_of(left)
        assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
        assert peer.groups == {os.getgid(), *os.getgroups()}
        assert str(peer) == f"uid {os.getuid()}, pid {os.getpid()}"


def test_more_groups_than_fit() -> None:
    class Crowded:
        """A socket whose peer has too many."""

        def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
            if optname == socket.SO_PEERCRED:
                return (7).to_bytes(4, "little") + (8).to_bytes(4, "little") + (9).to_bytes(4, "little")
            raise OSError(34, "ERANGE")

    assert peer_of(Crowded()) == Peer(7, 8, frozenset({9}))
