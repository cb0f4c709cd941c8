"""A supervisor that dies and comes back under a service manager: no leave on the wire; what is stale is refused.

The manager is a stand-in that keeps descriptors as systemd does and hands them to the next start.
"""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from manager import Manager
from netns.lab import Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender

pytestmark = pytest.mark.netns
GROUP, GONE, SSM, GROUP_6 = "239.1.1.1", "239.1.1.2", "232.1.1.1", "ff3e::1:1"
CONFIG = (
    rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    + rule("gone", f"in0:{GONE}:5000", "out0:239.2.2.2:6001")
    + rule("ssm", f"in0:10.99.9.1@{SSM}:5000", "out0:239.2.2.2:6002")
    + rule("six", f"in0:[{GROUP_6}]:5000", "out0:[ff3e::2]:6003")
)
# RFC 3376 §4.2.12, RFC 3810 §5.2.12: the records that a leave makes, and the old protocols' own messages
TO_IN, BLOCK = 3, 6
V2_LEAVE, V3_REPORT, MLD_DONE, MLD2_REPORT = 0x17, 0x22, 132, 143
START = """
import os, sys
fds = [int(fd) for fd in sys.argv[2].split(',') if fd]
spare = [os.dup(fd) for fd in fds]
for place, fd in enumerate(spare, 3):
    os.dup2(fd, place + 100)
for place in range(3, 3 + len(spare)):
    os.dup2(place + 100, place, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[1])
os.execv(sys.argv[3], sys.argv[3:])
"""


class Listener:
    """Every frame that reaches the source's end of the relay's input link."""

    def __init__(self, star: Star) -> None:
        with star.source.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self._sock.bind(("s0", 3))
        self._sock.setblocking(False)

    def leaves(self) -> list[str]:
        """The groups that were left since the last call, by IGMP or MLD, whole or for a source."""
        found: list[str] = []
        while True:
            try:
                found += leaves_in(self._sock.recv(2048))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._sock.close()


def leaves_in(frame: bytes) -> list[str]:
    """The groups that one Ethernet frame leaves."""
    if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_IGMP:
        message, width = frame[14 + (frame[14] & 15) * 4 :], 4
    elif frame[12:14] == b"\x86\xdd" and frame[54:55] == b"\x3a":  # hop-by-hop header, then ICMPv6
        message, width = frame[14 + 40 + 8 :], 16
    else:
        return []
    family = socket.AF_INET if width == 4 else socket.AF_INET6
    if message[0] in (V2_LEAVE, MLD_DONE):
        start = 4 if width == 4 else 8
        return [socket.inet_ntop(family, message[start : start + width])]
    if message[0] not in (V3_REPORT, MLD2_REPORT):
        return []
    return [socket.inet_ntop(family, group) for kind, group in records(message, width) if kind in (TO_IN, BLOCK)]


def records(message: bytes, width: int) -> list[tuple[int, bytes]]:
    """Type and group of each record of a v3 report (RFC 3376 §4.2); a TO_IN with sources is no leave."""
    found, at = [], 8
    for _ in range(int.from_bytes(message[6:8], "big")):
        kind, extra, sources = message[at], message[at + 1], int.from_bytes(message[at + 2 : at + 4], "big")
        if not (kind == TO_IN and sources):
            found.append((kind, message[at + 4 : at + 4 + width]))
        at += 4 + width + width * sources + 4 * extra
    return found


def start_again(manager: Manager, star: Star, folder: Path, config: str) -> Relay:
    """A relay that is started with what the manager keeps."""
    names = ":".join(name for name, _ in manager.store)
    numbers = ",".join(str(fd) for _, fd in manager.store)
    launcher = (sys.executable, "-c", START, names, numbers)
    return Relay(star.relay, config, launcher=launcher, pass_fds=[fd for _, fd in manager.store], folder=folder)


def kill(relay: Relay) -> None:
    """SIGKILL, and wait for its end and its children's."""
    family = relay.family()
    relay.signal(signal.SIGKILL)
    assert relay.process is not None
    relay.process.wait(20)
    eventually(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()], "all have ended")


@pytest.fixture
def manager(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    made = Manager(folder)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_leave_while_the_supervisor_restarts(lab: Lab, folder: Path, manager: Manager, how: int) -> None:
    star = lab.star()
    wire = Listener(star)
    with manager, Capture(star.sink, "k0") as sink, Sender(star.source) as sender:
        first = Relay(star.relay, CONFIG, folder=folder).start()
        first.wait_ready()
        eventually(lambda: not wire.leaves(), "joined")
        manager.take_all()
        assert len(manager.store) >= 2, "IPv4 and IPv6 never share a socket"
        if how == signal.SIGKILL:
            kill(first)
        else:
            first.stop()
        manager.take_all()
        first.close()
        assert GROUP in star.relay.groups("in0"), "the manager's copy holds it"
        with start_again(manager, star, folder, CONFIG.replace(f"in0:{GONE}", "in9:239.1.1.9")) as second:
            eventually(lambda: GONE not in star.relay.groups("in0"), "what no rule wants is left")
            sender.send(GROUP, 5000, [b"again"])
            assert sink.wait(1)[0].payload == b"again"
            left: list[str] = []
            while GONE not in left:  # it is on its way: the kernel has taken it off the interface
                left += wire.leaves()
            assert set(left) == {GONE}, "and it alone, over the whole restart"
            manager.take_all()
            for name in ("a", "ssm"):
                second.remove_rule(name)
            eventually(lambda: star.relay.groups("in0") == set(), "adopted memberships can be left")
            second.remove_rule("six")
            manager.take_all()
            assert manager.store == [], "and what holds nothing is not kept"
    wire.close()


def test_stale_and_foreign_descriptors_are_refused(lab: Lab, folder: Path, manager: Manager) -> None:
    star = lab.star()
    index = 0
    with star.relay.inside():
        index = socket.if_nametoindex("in0")
        stream, right = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        gone = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    elsewhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    file = os.open("/etc/passwd", os.O_RDONLY)

    def named(fd: int, ifindex: int) -> tuple[str, int]:
        return f"join-{ifindex}-{os.fstat(fd).st_ino}", os.dup(fd)

    with manager:
        manager.store += [
            ("etc", os.dup(file)),
            named(file, index),
            named(stream.fileno(), index),
            named(elsewhere.fileno(), index),
            named(gone.fileno(), 4_000_000),
            (f"join-{index}-1", os.dup(right.fileno())),
        ]
        with start_again(manager, star, folder, CONFIG) as relay:
            assert relay.stderr.count("is not taken back") == 6
            for reason in ("what its name says", "no UDP socket", "another network namespace", "No such device"):
                assert reason in relay.stderr, relay.stderr
            manager.take_all()
            assert all(name.startswith(f"join-{index}-") for name, _ in manager.store), "their copies are let go"
            assert relay.rules()["a"]["state"] == "up"
    for sock in (stream, right, gone, elsewhere):
        sock.close()
    os.close(file)
