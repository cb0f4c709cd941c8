"""What happens to descriptors on their way: lost, leaked, inherited, attributed to the wrong message.

Called by poc_fd_passing_privdrop.py, all in one process. A pipe's writing end is what is passed: when no copy
of it is left anywhere, its reading end says so, and nothing has to be guessed. Nothing blocks.
"""

import contextlib
import os
import resource
import socket
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from experiment import Experiment
from mrelay.messages import Stop
from mrelay.wire import MAX_FDS, BadMessage, Channel, channel_pair

PASSED: Final = 3


class Pipe:
    """A pipe whose writing end is passed around. A context manager."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe()
        os.set_blocking(self._reading, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()
        os.close(self._reading)

    def forget(self) -> None:
        """Close our own copy of the writing end."""
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def held(self) -> bool:
        """Whether a copy of the writing end is left, in a process or on its way to one."""
        try:
            return os.read(self._reading, 1) != b""
        except BlockingIOError:
            return True


class Got(NamedTuple):
    """One recvmsg: how many descriptors came, and whether MSG_CTRUNC said that others didn't."""

    data: bytes
    descriptors: int
    truncated: bool
    inheritable: bool


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """One message with these descriptors, as it was never meant to be sent."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes())])


def receive(sock: socket.socket, room: int) -> Got:
    """Receive with `room` bytes for control messages, and close what came."""
    data, ancillary, flags, _ = sock.recvmsg(100, room)
    fds = [fd for *_, raw in ancillary for fd in array("i", raw[: len(raw) // 4 * 4])]
    inheritable = any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    return Got(data, len(fds), bool(flags & socket.MSG_CTRUNC), inheritable)


def in_room(room: int) -> Got:
    """Three descriptors arrive where there is `room`."""
    here, there = channel_pair()
    with here, there, Pipe() as pipe:
        send(here, b"x", [pipe.writing] * PASSED)
        return receive(there, room)


def lost_by_recv() -> bool:
    """recv has no room for any: whether what was passed is then gone for good, without a word."""
    here, there = channel_pair()
    with here, there, Pipe() as pipe:
        send(here, b"x", [pipe.writing])
        pipe.forget()
        on_its_way = pipe.held()
        there.recv(100)
        return on_its_way and not pipe.held()


def closed_with_channel() -> bool:
    """A channel is closed with a message unread: whether the descriptor in it is closed too."""
    here, there = channel_pair()
    with here, there, Pipe() as pipe:
        send(here, b"x", [pipe.writing])
        pipe.forget()
        here.close()
        on_its_way = pipe.held()
        there.close()
        return on_its_way and not pipe.held()


def boundaries(kind: int) -> list[tuple[str, int]]:
    """Two messages, the second with a descriptor, as the receiver sees them."""
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here, there, Pipe() as pipe:
        here.send(b"first,")
        send(here, b"second", [pipe.writing])
        here.close()
        seen = []
        while (got := receive(there, socket.CMSG_SPACE(4))).data:
            seen.append((got.data.decode(), got.descriptors))
        return seen


def hostile(sending: Callable[[socket.socket, int], None], *, full: bool) -> tuple[str, int]:
    """What the relay's Channel makes of it, and how many descriptors more are open here afterwards.

    `full`: this process has room for one more only.
    """
    here, there = channel_pair()
    with here, there, Pipe() as pipe:
        sending(here, pipe.writing)
        before = _open_now()
        with _room_for_one() if full else contextlib.nullcontext():
            try:
                said = "end" if Channel(there).receive() is None else "a message"
            except BadMessage:
                said = "BadMessage"
        leaked = sorted(_open_now() - before)
        for fd in leaked:
            os.close(fd)
        return said, len(leaked)


HOSTILE: Final[dict[str, tuple[Callable[[socket.socket, int], None], bool]]] = {
    "no message": (lambda sock, fd: send(sock, b"garbage", [fd] * PASSED), False),
    f"more than {MAX_FDS}": (lambda sock, fd: send(sock, b"garbage", [fd] * (MAX_FDS + 1)), False),
    "no room in our table": (lambda sock, fd: Channel(sock).send(Stop(), [fd] * PASSED), True),
    "an empty datagram": (lambda sock, fd: send(sock, b"", [fd] * PASSED), False),
}


def _open_now() -> set[int]:
    """Without the descriptor by which the directory was read."""
    return {int(name) for name in os.listdir("/proc/self/fd") if Path("/proc/self/fd", name).is_symlink()}


@contextlib.contextmanager
def _room_for_one() -> Iterator[None]:
    """RLIMIT_NOFILE just above the lowest free number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def pass_cost(rounds: int) -> float:
    """Microseconds to send and receive one descriptor by a Channel: median."""
    one, two = (Channel(sock) for sock in channel_pair())
    taken = []
    with one.sock, two.sock, Pipe() as pipe:
        for _ in range(rounds):
            start = time.perf_counter()
            one.send(Stop(), [pipe.writing])
            got = two.receive()
            taken.append((time.perf_counter() - start) * 1e6)
            assert got is not None
            os.close(got[1][0])
    return statistics.median(taken)


def inheritable_by_channel() -> bool:
    """Whether a program that is started carelessly would inherit what a Channel received."""
    one, two = (Channel(sock) for sock in channel_pair())
    with one.sock, two.sock, Pipe() as pipe:
        one.send(Stop(), [pipe.writing])
        got = two.receive()
        assert got is not None
        try:
            return os.get_inheritable(got[1][0])
        finally:
            os.close(got[1][0])


# ---- what it proves --------------------------------------------------------------------------------


def show(experiment: Experiment) -> None:
    """Make the claims."""
    _claim_lost(experiment)
    raw, ours = in_room(socket.CMSG_SPACE(4 * PASSED)), inheritable_by_channel()
    experiment.claim(
        "A received descriptor survives exec unless one asks for MSG_CMSG_CLOEXEC, as Channel does",
        raw.inheritable and not ours,
        f"inheritable by recvmsg: {raw.inheritable}, by Channel: {ours}",
    )
    packets, stream = boundaries(socket.SOCK_SEQPACKET), boundaries(socket.SOCK_STREAM)
    experiment.claim(
        "On SOCK_STREAM one read takes two messages, so whose descriptor was it? SOCK_SEQPACKET keeps them apart",
        packets == [("first,", 0), ("second", 1)] and stream == [("first,second", 1)],
        f"(bytes, descriptors): SEQPACKET {packets}, STREAM {stream}",
    )
    answers = {name: hostile(sending, full=full) for name, (sending, full) in HOSTILE.items()}
    experiment.claim(
        "Whatever a peer sends, the relay's Channel keeps no descriptor of it",
        all(leaked == 0 for _, leaked in answers.values()),
        ", ".join(f"{name}: {said}, {leaked} left open" for name, (said, leaked) in answers.items()),
    )


def _claim_lost(experiment: Experiment) -> None:
    exact, padded = in_room(socket.CMSG_LEN(4)), in_room(socket.CMSG_SPACE(4))
    experiment.claim(
        "Where the control buffer is too small the rest is lost, and MSG_CTRUNC is all that says so",
        exact[1:3] == (1, True) and padded.truncated and padded.descriptors < PASSED,
        f"of {PASSED}, CMSG_LEN(4) lets in {exact.descriptors} and CMSG_SPACE(4), padded, {padded.descriptors}; "
        f"MSG_CTRUNC {exact.truncated}, {padded.truncated}",
    )
    recv, closed = lost_by_recv(), closed_with_channel()
    experiment.claim(
        "A descriptor on its way is the channel's: recv closes it without a word, so does closing the channel",
        recv and closed,
        f"gone after recv: {recv}, after the channel's close: {closed}",
    )
