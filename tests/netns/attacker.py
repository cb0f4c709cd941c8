"""A relay in which one role has been taken over: attacking code runs in the real, settled and confined process.

`attacker.py supervise ROLE ATTACK WITHOUT FOLDER run …` is `mrelay run …` with the real supervisor, except that it
starts this file in place of that role. `attacker.py mrelay.ROLE ATTACK WITHOUT FOLDER …` is the role itself, which
attacks once it is confined and at work (a worker: when its first frame comes), and says so on standard error.
WITHOUT names mechanisms to leave away (`seccomp`, `landlock`), with commas. `attacker.py free FOLDER PID PID`
tries everything unconfined.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

from mrelay.kernel import landlock, seccomp
from mrelay.messages import (
    AT_ONCE,
    AttachXdp,
    CloseTap,
    Done,
    Failed,
    Grant,
    HoldUnicast,
    JoinGroup,
    Listen,
    Listening,
    ListeningTcp,
    ListenTcp,
    Message,
    OpenEgress,
    OpenIngress,
    OpenTap,
    Outcome,
    ProbeNeighbour,
    Ready,
    Release,
    Resource,
    SetGro,
    StartWorkers,
    TapFilter,
    Tapped,
    parts,
)
from mrelay.wire import Channel, encode

sys.path.insert(0, str(Path(__file__).parents[1]))
from netns import attempts

WORD: Final = "ATTACK "
BIG: Final = 1 << 70
_libc: Final = ctypes.CDLL(None, use_errno=True)
_DEEP: Final = b'{"v":2,"m":' + b"[" * 20000


class Taken:
    """What the attacker has in hand: the channels, and the pids of the others."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.supervisor = int(sys.argv[2])  # behind the version; see mrelay.child
        self.control = -1  # a worker's channel to control
        self.parent = os.getppid()
        self.sibling = 0
        self.link = socket.if_nametoindex("in0")
        self.kept: list[socket.socket] = []


def say(what: object) -> None:
    """To the test."""
    os.write(2, f"{WORD}{json.dumps(what)}\n".encode())


# ---- attacks ---------------------------------------------------------------------------------------


def probe(taken: Taken) -> None:
    """Everything that there is to try."""
    say(attempts.probe(attempts.Targets(taken.folder, taken.parent, taken.sibling)))


def sending(*datagrams: bytes, fds: int = 0) -> Callable[[Taken], None]:
    """Send these to the supervisor, with so many descriptors."""

    def attack(taken: Taken) -> None:
        with socket.socket(fileno=os.dup(taken.supervisor)) as sock:
            ours = [taken.supervisor, 0, 2, *[1] * (fds - 3)][:fds]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={fds}i", *ours))] if fds else []
            say("sent")  # before we are ended for it
            for datagram in datagrams:
                sock.sendmsg([datagram], rights)

    return attack


def flood(taken: Taken) -> None:
    """Requests without end, and no answer read."""
    with socket.socket(fileno=os.dup(taken.supervisor)) as sock:
        datagram = encode(Release(7, (HoldUnicast("10.0.0.1", 1),)))
        say("sent")
        while True:  # until we are ended
            try:
                sock.sendmsg([datagram])
            except BlockingIOError:
                os.sched_yield()


def nonsense_to_control(taken: Taken) -> None:
    """From a worker."""
    say("sent")
    with socket.socket(fileno=os.dup(taken.control)) as sock:
        sock.sendmsg([b"nonsense"])


def requests(taken: Taken) -> None:
    """Each request that no rule can need; what the supervisor said to it."""
    with asking(taken) as channel:
        each = {name: ask(channel, request) for name, request in hostile(taken.link).items()}
        several = parts(list(whats(taken.link).values()))
        say(each | {f"{len(part)} at once": ask(channel, Grant(1, part)) for part in several})


def abuse_a_tap(taken: Taken) -> None:
    """A tap that was opened as why or capture would; what else its descriptor is good for."""
    with asking(taken) as channel:
        sock = tapped(channel, OpenTap(800, taken.link, TapFilter(_ALL)))
        frame = bytes(10 + 12) + b"\x08\x00" + bytes(60)
        where = struct.pack("=HHiHBB8s", socket.AF_PACKET, 8, taken.link, 0, 0, 6, bytes(8))
        attempts_ = {
            "bind": lambda: libc("bind", sock, where, len(where)),
            "send": lambda: libc("send", sock, frame, len(frame), 0),
            "sendto": lambda: libc("sendto", sock, frame, len(frame), 0, where, len(where)),
            "write": lambda: libc("write", sock, frame, len(frame)),
            "another filter": lambda: sock.setsockopt(socket.SOL_SOCKET, 26, bytes(16)),  # SO_ATTACH_FILTER
            "no transmit ring": lambda: sock.setsockopt(263, 13, bytes(16)),  # SOL_PACKET, PACKET_TX_RING
        }
        found = {name: tried(attempt) for name, attempt in attempts_.items()}
        more = range(801, 804)
        held = [tapped(channel, OpenTap(number, taken.link, TapFilter(_ALL))) for number in more]
        for number in range(800, 804):
            channel.send(CloseTap(number))
        found["after closing"] = ask(channel, OpenTap(898, taken.link, TapFilter(_ALL)))
    taken.kept = [sock, *held]
    say(found)


def libc(name: str, sock: socket.socket, *arguments: Any) -> int:
    """A call as the C library makes it; OSError."""
    done = int(getattr(_libc, name)(sock.fileno(), *arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), name)
    return done


def tried(attempt: Callable[[], Any]) -> str:
    """What it returned, or the name of its error."""
    try:
        return str(attempt())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tapped(channel: Channel, request: OpenTap) -> socket.socket:
    """The tap, which must be opened."""
    channel.send(request)
    while True:
        message, fds = channel.receive() or (None, [])
        if isinstance(message, Tapped):
            return socket.socket(fileno=fds[0])


def fuzz(taken: Taken) -> None:
    """Requests of the right shape with anything in them."""
    seed = int.from_bytes(os.getrandom(4))
    chance = random.Random(seed)
    with asking(taken) as channel:
        # As many as leave it time to beat its pulse, also on a busy machine.
        answers = [ask(channel, anything(chance)) for _ in range(700)]
    say(
        {"seed": seed, "answers": len(answers), "refused": sum(answer.startswith("refused") for answer in answers)}
    )


@contextlib.contextmanager
def asking(taken: Taken) -> Iterator[Channel]:
    """Control's channel, for requests whose answers are waited for."""
    with socket.socket(fileno=os.dup(taken.supervisor)) as sock:
        sock.setblocking(True)
        yield Channel(sock)
        sock.setblocking(False)


def ask(channel: Channel, request: Any) -> str:
    """The answer in words; events that come meanwhile are dropped."""
    channel.send(request)
    while True:
        got = channel.receive()
        if got is None:
            return "hung up"
        message, fds = got
        for fd in fds:
            os.close(fd)
        if isinstance(message, Failed):
            return f"refused: {message.problem}"
        if isinstance(message, Outcome):
            whole = len(message.refused) == len(request.what)
            return f"refused: {message.refused[0].problem}" if whole else "granted"
        if isinstance(message, Done | Listening | ListeningTcp | Tapped):
            return "granted"


def hostile(link: int) -> dict[str, Message]:
    """Requests that must be refused. `link` is an interface that is there and has rings."""
    return {name: Grant(number, (what,)) for number, (name, what) in enumerate(whats(link).items())} | OTHERS


def whats(link: int) -> dict[str, Resource]:
    """Resources that no rule can need."""
    return {
        "ring nowhere": OpenIngress(0, 256),
        "ring on a negative interface": OpenIngress(-1, 256),
        "ring on a huge interface": OpenIngress(BIG, 256),
        "ring on no interface": OpenIngress(99999, 256),
        "ring of odd size": OpenIngress(link, 300),
        "ring of huge size": OpenIngress(link, 1 << 30),
        "second ring": OpenIngress(link, 256),
        "second ring of a family": OpenIngress(link, 256, 4),
        "ring of family 5": OpenIngress(link, 256, 5),
        "ring of a huge family": OpenIngress(link, 256, BIG),
        "join of a host": JoinGroup(link, "10.0.0.1", None),
        "join of nothing": JoinGroup(link, "", None),
        "join of a name": JoinGroup(link, "example.org", None),
        "join with NUL": JoinGroup(link, "239.1.1.1\0", None),
        "join with surrogate": JoinGroup(link, "\ud800", None),
        "join of two families": JoinGroup(link, "239.1.1.1", "fd00::1"),
        "join with scope": JoinGroup(link, "ff02::9%lo", None),
        "join on a huge interface": JoinGroup(BIG, "239.1.1.1", None),
        "hold of a group": HoldUnicast("239.1.1.1", 5000),
        "hold of every address": HoldUnicast("0.0.0.0", 5000),
        "hold of every IPv6 address": HoldUnicast("::", 5000),
        "hold of port 0": HoldUnicast("127.0.0.1", 0),
        "hold of port 65536": HoldUnicast("127.0.0.1", 65536),
        "hold of a foreign address": HoldUnicast("192.0.2.1", 5000),
        "egress of family 16": OpenEgress(1, link, 16, None, None, "egress", 0),
        "egress to everywhere": OpenEgress(1, link, 4, "0.0.0.0", 6000, "egress", 0),
        "egress to another family": OpenEgress(1, link, 4, "ff3e::1", 6000, "egress", 0),
        "egress to port -1": OpenEgress(1, link, 4, "239.2.2.2", -1, "egress", 0),
        "egress from a group": OpenEgress(1, link, 4, "239.2.2.2", 6000, "239.1.1.1", 0),
        "egress from a file": OpenEgress(1, link, 4, "239.2.2.2", 6000, "/etc/passwd", 0),
        "egress number -1": OpenEgress(-1, link, 4, None, None, "egress", 0),
        "egress epoch too large": OpenEgress(1, link, 4, None, None, "egress", BIG),
        "egress on a huge interface": OpenEgress(1, BIG, 4, None, None, "egress", 0),
        "gro nowhere": SetGro(0),
        "gro on no interface": SetGro(99999),
        "gro on a huge interface": SetGro(BIG),
        "xdp nowhere": AttachXdp(0),
        "xdp on no interface": AttachXdp(99999),
        "xdp without rings": AttachXdp(1),
        "xdp on a huge interface": AttachXdp(BIG),
    }


_ALL: Final = ("224.0.0.0/4", "ff00::/8")
OTHERS: Final[dict[str, Message]] = {
    "tap nowhere": OpenTap(920, 0, TapFilter(_ALL)),
    "tap on no interface": OpenTap(921, 99999, TapFilter(_ALL)),
    "tap on a huge interface": OpenTap(922, BIG, TapFilter(_ALL)),
    "tap for all that hosts say": OpenTap(923, 1, TapFilter(("0.0.0.0/0",))),
    "tap for some hosts": OpenTap(924, 1, TapFilter(("10.0.0.0/31",))),
    "tap for all of IPv6": OpenTap(925, 1, TapFilter(("::/0",))),
    "tap for more than groups": OpenTap(926, 1, TapFilter(("192.0.0.0/2",))),
    "tap for a scope": OpenTap(927, 1, TapFilter(("ff02::1%lo",))),
    "tap for a surrogate": OpenTap(928, 1, TapFilter(("\ud800",))),
    "tap for nothing": OpenTap(929, 1, TapFilter(())),
    "tap for neither direction": OpenTap(930, 1, TapFilter(_ALL, incoming=False)),
    "tap for too many": OpenTap(931, 1, TapFilter(("239.1.1.1/32",) * 65)),
    "tap of no bytes": OpenTap(932, 1, TapFilter(_ALL, snap=0)),
    "tap of huge frames": OpenTap(933, 1, TapFilter(_ALL, snap=BIG)),
    "tap of none in one": OpenTap(934, 1, TapFilter(_ALL, one_in=0)),
    "tap of family 5": OpenTap(936, 1, TapFilter(_ALL, family=5)),
    "tap of a huge family": OpenTap(937, 1, TapFilter(_ALL, family=BIG)),
    "tap of one in a huge number": OpenTap(935, 1, TapFilter(_ALL, one_in=BIG)),
    "socket mode 0777": Listen(901, 0o777, None),
    "socket mode with set-uid": Listen(902, 0o4660, None),
    "socket mode negative": Listen(903, -1, None),
    "socket mode another": Listen(904, 0o666, None),
    "socket group another": Listen(905, 0o660, "shadow"),
    "socket group with NUL": Listen(906, 0o660, "adm\0"),
    "socket group surrogate": Listen(907, 0o660, "\ud800"),
    "a TCP listener": ListenTcp(911, "127.0.0.1", 8080),
    "a TCP listener for everyone": ListenTcp(912, "0.0.0.0", 8080),
    "a TCP listener at a port of the host's": ListenTcp(913, "127.0.0.1", 80),
    "a TCP listener at a name": ListenTcp(914, "localhost", 8080),
    "a TCP listener at surrogates": ListenTcp(915, "\ud800", BIG),
    "workers more": StartWorkers(908, (0, 1, 2, 3, 4, 5), 64, 0),
    "workers on a huge core": StartWorkers(909, (BIG,), 64, 0),
    "workers with more flows": StartWorkers(910, (0,), BIG, 0),
}


def anything(chance: random.Random) -> Grant | Listen | ListenTcp | StartWorkers | OpenTap:
    """A well-formed request of ill-formed parts. Nothing is released: the relay goes on."""
    requests: list[Callable[[], Grant | Listen | ListenTcp | StartWorkers | OpenTap]] = [
        *[lambda: Grant(1, tuple(_resource(chance) for _ in range(chance.randint(1, 3))))] * 6,
        lambda: OpenTap(_number(chance), _number(chance), _tap_filter(chance)),
        lambda: Listen(1, _number(chance), _text(chance)),
        lambda: ListenTcp(1, _text(chance), _number(chance)),
        lambda: StartWorkers(1, (_number(chance), _number(chance)), _number(chance), _number(chance)),
    ]
    return chance.choice(requests)()


def _resource(chance: random.Random) -> Resource:
    kinds: list[Callable[[], Resource]] = [
        lambda: OpenIngress(_number(chance), _number(chance), _number(chance)),
        lambda: JoinGroup(_number(chance), _text(chance), chance.choice([None, _text(chance)])),
        lambda: HoldUnicast(_text(chance), _number(chance)),
        lambda: _egress(chance),
        lambda: SetGro(_number(chance)),
        lambda: AttachXdp(_number(chance)),
    ]
    return chance.choice(kinds)()


def _egress(chance: random.Random) -> OpenEgress:
    numbers = [_number(chance) for _ in range(5)]
    output, link, family, port, epoch = numbers
    return OpenEgress(output, link, chance.choice([4, 6, family]), _text(chance), port, _text(chance), epoch)


def _tap_filter(chance: random.Random) -> TapFilter:
    networks = tuple(_text(chance) for _ in range(chance.randrange(3)))
    membership, incoming, outgoing = (chance.random() < 0.5 for _ in range(3))
    numbers = [_number(chance) for _ in range(3)]
    return TapFilter(networks, membership, incoming, outgoing, *numbers)


def _number(chance: random.Random) -> int:
    return chance.choice([0, -1, 1, 2, 4, 6, 255, 65535, 65536, 1 << 31, BIG, -BIG, chance.getrandbits(40)])


def _text(chance: random.Random) -> str:
    odd = ["", "x", "\0", "\ud800", "a" * 5000, "%n", "\n", "keep", "egress"]
    return chance.choice([*odd, "0.0.0.0", "239.1.1.1", "::1", "fe80::1%1", "ff3e::1", "255.255.255.255"])


ATTACKS: Final[dict[str, Callable[[Taken], None]]] = {
    "probe": probe,
    "requests": requests,
    "fuzz": fuzz,
    "abuse a tap": abuse_a_tap,
    "flood": flood,
    "nonsense to control": nonsense_to_control,
    "no JSON": sending(b"\xff\xfe nonsense"),
    "another version": sending(b'{"v":99,"m":["Stop"]}'),
    "an unknown message": sending(b'{"v":2,"m":["OpenFile","/etc/shadow"]}'),
    "a field too many": sending(b'{"v":2,"m":["Ready","",1]}'),
    "a wrong type": sending(b'{"v":2,"m":["Ready",7]}'),
    "a group as neighbour": sending(encode(ProbeNeighbour(1, "239.1.1.1"))),
    "a neighbour without address": sending(encode(ProbeNeighbour(1, "\ud800"))),
    "a neighbour on a huge interface": sending(encode(ProbeNeighbour(BIG, "10.0.0.1"))),
    "a message for others": sending(encode(Done(1))),
    "truncated": sending(encode(Ready("x" * 100))[:50]),
    "oversized": sending(encode(Ready("x" * 150_000))),
    "deeply nested": sending(_DEEP),
    "a huge number": sending(b'{"v":2,"m":["Done",' + b"9" * 10000 + b"]}"),
    "too much at once": sending(encode(Grant(1, (SetGro(0),) * (AT_ONCE + 1)))),
    "descriptors": sending(encode(Ready("")), fds=3),
    "many descriptors": sending(encode(Ready("")), fds=250),
    "descriptors alone": sending(b"", fds=64),
    "a worker's request": sending(encode(Ready("ready"))),
}


# ---- the roles -------------------------------------------------------------------------------------


def take_over(module: str, attack: str, folder: str) -> None:
    """Be that role, until it is confined and at work; then attack, the first time that it comes so far."""
    taken = Taken(folder)
    mark = Path(folder, "attacked")
    first = not mark.exists()
    mark.touch()
    act = ATTACKS[attack] if first else _nothing
    if module == "mrelay.control":
        _take_control(taken, act)
    else:
        _take_worker(taken, act)


def _nothing(_: Taken) -> None:
    """No attack: the next one is an honest process."""


def _take_control(taken: Taken, act: Callable[[Taken], None]) -> None:
    from mrelay.control import main, supervisor, workers

    up, ready = workers.Workers.up, supervisor.Supervisor.ready

    def and_note(self: workers.Workers, message: Any, fds: list[int]) -> None:
        taken.sibling = message.pid
        up(self, message, fds)

    def and_attack(self: supervisor.Supervisor, status: str) -> None:
        ready(self, status)
        act(taken)

    workers.Workers.up = and_note  # type: ignore[method-assign]
    supervisor.Supervisor.ready = and_attack  # type: ignore[method-assign]
    sys.exit(main.main())


def _take_worker(taken: Taken, act: Callable[[Taken], None]) -> None:
    from mrelay.worker import main
    from mrelay.worker.scalar import ScalarPath

    children = Path(f"/proc/{taken.parent}/task/{taken.parent}/children").read_text().split()
    taken.sibling = min(int(pid) for pid in children)  # control was started before us
    forward, take_control = ScalarPath.forward, main.Worker._take_control

    def and_note(self: main.Worker, fd: int) -> None:
        taken.control = fd
        take_control(self, fd)

    def and_attack(self: ScalarPath, ring: Any, count: int) -> None:
        nonlocal act
        forward(self, ring, count)
        act(taken)
        act = _nothing

    main.Worker._take_control = and_note  # type: ignore[method-assign]
    ScalarPath.forward = and_attack  # type: ignore[method-assign]
    main.main()


def leave_away(mechanisms: str) -> None:
    """So that a test sees what each of them is worth."""
    if "seccomp" in mechanisms:
        seccomp.restrict = lambda *_: None
    if "landlock" in mechanisms:
        landlock.restrict = lambda *_: 0


def supervise(role: str, attack: str, without: str, folder: str, *command: str) -> int:
    """The real supervisor, with one role that is ours."""
    from mrelay.cli import app
    from mrelay.supervisor import __main__ as entry
    from mrelay.supervisor import children

    with mock.patch("os.execv") as execv:
        app(command)  # `run`, which would become the supervisor

    settle = children.Child.__init__

    def and_replace(self: children.Child, *arguments: Any, **rest: Any) -> None:
        settle(self, *arguments, **rest)
        if self._command[-1] == f"mrelay.{role}":
            self._command = [sys.executable, __file__, f"mrelay.{role}", attack, without, folder]

    children.Child.__init__ = and_replace  # type: ignore[method-assign]
    with listening(folder):
        sys.argv = execv.call_args.args[1][-2:]  # the settings come last
        return entry.main()


def free(folder: str, supervisor: str, sibling: str) -> None:
    """Every attempt, as root and unconfined, at processes that are there for it."""
    with listening(folder):
        say(attempts.probe(attempts.Targets(folder, int(supervisor), int(sibling))))


@contextlib.contextmanager
def listening(folder: str) -> Iterator[None]:
    """Sockets that anyone may connect to: by path, and by abstract name."""
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as by_name:
        for listener, address in ((by_path, folder + "/open.sock"), (by_name, "\0" + folder)):
            listener.bind(address)
            listener.listen()
        os.chmod(folder + "/open.sock", 0o777)  # noqa: S103  that is what it is for
        yield
    os.unlink(folder + "/open.sock")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "supervise":
        sys.exit(supervise(*rest))
    if what == "free":
        free(*rest)
    else:
        attack_name, left_away, place, *sys.argv[1:] = rest
        leave_away(left_away)
        take_over(what, attack_name, place)
