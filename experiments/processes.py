"""Child processes for the experiments about the supervisor: the parent's side, and the program they run.

Owns both ends of one small protocol. The upper half is the parent's: `Trial` is the product's own
`supervisor.children.Child`, with this file as its program; it is told what to do, and how to fail, by plain
words beside the product's messages. The lower half is that program: it settles like every child of the relay
(other user, parent-death signal, ignored signals) and waits in one `poll` for its channel, as a worker does.
Every wait here is bounded by `IN_TIME`. A child ends with its parent in any case, and on the channel's end.
"""

import contextlib
import hashlib
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Self

from mrelay.child import settle
from mrelay.kernel.caps import set_parent_death_signal
from mrelay.kernel.packet import ETH_P_ALL
from mrelay.messages import (
    Commit,
    Committed,
    DropRules,
    Granted,
    Message,
    OpenEgress,
    PutRule,
    PutRules,
    RuleOutput,
    Stop,
    Sync,
    Synced,
)
from mrelay.pulse import INTERVAL, Pulse
from mrelay.supervisor.children import Child, Process
from mrelay.wire import MAX_MESSAGE, Channel, decode

NOBODY: Final = 65534
IN_TIME: Final = 10.0  # seconds; what takes longer on any machine is a failure of the experiment itself
SO_COOKIE: Final = 57  # asm-generic/socket.h: the kernel's name for one socket, the same in every duplicate
BEATS, LOOPS, WORDS = 0, 1, 2  # words of the shared memory: beats of a timer, turns of the loop
READY: Final = b"ready"
GROUPS: Final = 0xEF000000  # 239.0.0.0/8


# ---- what both sides use ------------------------------------------------------------------------


def rule(slot: int, generation: int = 0) -> PutRule:
    """A rule for counter slot `slot`; `generation` makes it another one."""
    group = GROUPS + slot
    output = RuleOutput(
        link=slot, output=1, oif=1, address="192.0.2.1", port=5000 + generation % 1000, ttl=0, dscp=-1, keep=False
    )
    return PutRule(
        rule=slot,
        ifindex=1,
        vlan=0,
        family=4,
        group_low=group,
        group_high=group,
        port_low=5000,
        port_high=5000,
        source_low=0,
        source_high=0xFFFFFFFF,
        pps=0,
        bps=0,
        own=(),
        outputs=(output,),
    )


def digest(rules: Mapping[int, PutRule], cookies: Mapping[int, bytes]) -> bytes:
    """What a worker's whole state comes to: its rules by slot, and which sockets it has for which output."""
    total = hashlib.sha256()
    for _, put in sorted(rules.items()):
        total.update(repr(put).encode())
    for output, cookie in sorted(cookies.items()):
        total.update(b"%d=%s" % (output, cookie))
    return total.hexdigest().encode()


def cookie(sock: socket.socket) -> bytes:
    """The kernel's name for this socket."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)


# ---- the parent's side --------------------------------------------------------------------------


class Trial(Child):
    """A product child that runs this file's program. `options`: words, see `_Worker`."""

    def __init__(self, options: str = "plain", core: int | None = None, program: list[str] | None = None) -> None:
        super().__init__(f"trial ({options})", "", NOBODY, NOBODY)
        self._command = program or [sys.executable, __file__, options]
        self._core = core

    def __enter__(self) -> Self:
        self.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.put_away()

    def start(self, ready: Process | None = None) -> Process:
        process = super().start(ready)
        if self._core is not None:
            os.sched_setaffinity(process.pid, {self._core})
        return process

    def launch(self) -> None:
        """Start it, and wait until it has settled."""
        self.start()
        assert self.answer() == READY

    def say(self, text: str, fds: tuple[int, ...] = ()) -> None:
        """One plain word, as its own datagram."""
        assert self.channel is not None
        socket.send_fds(self.channel.sock, [text.encode()], list(fds))

    def answer(self) -> bytes:
        """The next datagram from it; b"" when it is gone."""
        assert self.channel is not None
        readable([self.channel.fileno()])
        with contextlib.suppress(ConnectionResetError):
            return self.channel.sock.recv(MAX_MESSAGE)
        return b""

    @property
    def pulse(self) -> int:
        """The descriptor of its pulse's memory."""
        assert self.process is not None
        return self.process._pulse

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def put_away(self) -> None:
        """Whatever state it is in: end it and forget it."""
        if self.process is not None:
            self.kill()
            readable([self.pidfd])
            self.ended()


@contextlib.contextmanager
def running(trials: list[Trial]) -> Iterator[list[Trial]]:
    """All of them, started together and settled; none is left afterwards."""
    try:
        for trial in trials:
            trial.start()
        for trial in trials:
            assert trial.answer() == READY
        yield trials
    finally:
        for trial in trials:
            trial.put_away()


def readable(fds: list[int], seconds: float = IN_TIME) -> list[int]:
    """Which of these are readable, as soon as one is; an empty list only for a short `seconds`."""
    ready: list[int] = select.select(fds, [], [], seconds)[0]
    assert ready or seconds < IN_TIME, "a child did nothing for too long"
    return ready


def all_readable(fds: list[int], seconds: float = IN_TIME) -> list[int]:
    """The same once all are, or the time is over."""
    deadline = time.monotonic() + seconds
    ready: list[int] = []
    while len(ready) < len(fds) and (left := deadline - time.monotonic()) > 0:
        ready = select.select(fds, [], [], left)[0]
        if len(ready) < len(fds):
            select.select([fd for fd in fds if fd not in ready], [], [], max(0.0, deadline - time.monotonic()))
    return ready


@contextlib.contextmanager
def no_way_back() -> Iterator[None]:
    """What a forked process does ends here, and within a time; nothing of the program runs on in it."""
    signal.alarm(int(IN_TIME))
    try:
        yield
    finally:
        os._exit(0)


def shared_words() -> tuple[int, memoryview]:
    """A memfd of one page, and its words."""
    fd = os.memfd_create("trial", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd, memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")


def give_memory(trial: Trial) -> memoryview:
    """The words that it shares with us, once it counts there."""
    fd, words = shared_words()
    trial.say("memory", (fd,))
    os.close(fd)
    trial.say("digest")
    assert trial.answer()
    return words


def cpu_seconds(pid: int) -> float:
    """Time that a process's first thread has run (Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def state_letter(pid: int) -> str:
    """R, S, D, T, Z: proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # the listing's own


def zombies() -> int:
    """Children of ours that ended and were not waited for."""
    mine = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return sum(state_letter(int(pid)) == "Z" for pid in mine)


# ---- the program --------------------------------------------------------------------------------


class _Worker:
    """A worker without packets. Options, with commas: `deaf` (to Stop), `stubborn` (to SIGTERM too), `undying`;
    `beat=MS`: count BEATS every so many milliseconds, from its loop, and say "beat" unless `silent`.

    LOOPS is odd while it works and even while it waits. `link`: a packet socket whose failure ends it. The
    product's pulse is raised at each turn, `careless` also by the thread of `lie`.
    """

    def __init__(self, channel: Channel, pulse: Pulse, options: list[str], link: socket.socket | None) -> None:
        self._pulse, self._careless = pulse, "careless" in options
        self.channel, self._link, self._deaf = channel, link, "deaf" in options or "stubborn" in options
        if "stubborn" in options:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if "undying" in options:
            set_parent_death_signal(0)
            signal.alarm(int(IN_TIME))
        beats = [int(option[5:]) for option in options if option.startswith("beat=")]
        self._beat = beats[0] / 1000 if beats else None
        self._silent = "silent" in options
        self._words: Any = [0] * WORDS
        self._rules: dict[int, PutRule] = {}
        self._incoming: dict[int, PutRule | None] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self._poll.register(channel.sock, select.POLLIN)
        if link is not None:
            self._poll.register(link, 0)

    def run(self) -> NoReturn:
        """Until it is told to end, or nobody is there to tell."""
        self.channel.sock.send(READY)
        due = time.monotonic()
        while True:
            if self._beat is not None and time.monotonic() >= due:
                self._say_beat()
                due = time.monotonic() + self._beat
            wait = INTERVAL if self._beat is None else max(0.0, due - time.monotonic())
            ready = self._poll.poll(wait * 1000)
            self._pulse.beat()
            self._words[LOOPS] += 1  # odd: at work
            for fd, _ in ready:
                if self._link is not None and fd == self._link.fileno():
                    sys.exit(4)  # what a worker must not do: see there
                self._hear()
            self._words[LOOPS] += 1

    def _say_beat(self) -> None:
        self._words[BEATS] += 1
        if self._silent:
            return
        with contextlib.suppress(OSError):  # a channel that we closed ourselves
            self.channel.sock.send(b"beat", socket.MSG_NOSIGNAL)

    def _hear(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.channel.sock, MAX_MESSAGE, 4)
        if not data:
            sys.exit(0)
        if data.startswith(b"{"):
            self._take(decode(data), fds)
        else:
            name, *rest = data.decode().split()
            getattr(self, f"_do_{name}")(*rest, *fds)

    def _take(self, message: Message, fds: list[int]) -> None:
        match message:
            case PutRules(rules):
                self._incoming |= {put.rule: put for put in rules}
            case DropRules(slots):
                self._incoming |= dict.fromkeys(slots)
            case Commit(generation, whole):
                changed = ({} if whole else self._rules) | self._incoming
                self._rules = {slot: put for slot, put in changed.items() if put is not None}
                self._incoming = {}
                self.channel.send(Committed(generation, "none", 0))
            case Granted((OpenEgress(output),)):
                self._sockets[output] = socket.socket(fileno=fds[0])
            case Sync(number):
                self.channel.send(Synced(number, 0, 0))
            case Stop() if not self._deaf:
                sys.exit(0)

    # ---- what the parent says in words ------------------------------------------------------

    def _do_memory(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
        self._words[LOOPS] = 1
        os.close(fd)

    def _do_digest(self) -> None:
        cookies = {output: cookie(sock) for output, sock in self._sockets.items()}
        self.channel.sock.send(digest(self._rules, cookies))

    def _do_wake(self) -> None:
        """Nothing: that the loop turns is the answer."""

    def _do_exit(self, status: str) -> None:
        os._exit(int(status))

    def _do_spin(self) -> None:
        while True:
            pass

    def _do_toil(self, milliseconds: str) -> None:
        """Work that takes so much processor time; then it goes on."""
        end = time.thread_time() + int(milliseconds) / 1000
        while time.thread_time() < end:
            pass

    def _do_block(self) -> None:
        lock = threading.Lock()
        with lock:
            lock.acquire()  # for ever

    def _do_lie(self) -> None:
        """The loop hangs, and a thread goes on beating."""
        interval = self._beat or INTERVAL / 2

        def beat() -> None:
            while True:
                time.sleep(interval)
                self._say_beat()
                if self._careless:
                    self._pulse.beat()

        threading.Thread(target=beat, daemon=True).start()
        self._do_block()

    def _do_close(self) -> None:
        """Lose the channel, and go on."""
        self._poll.unregister(self.channel.sock)
        self.channel.close()

    def _do_leave(self) -> None:
        """End, with a child of ours that still has the channel: as a daemon started by a library would."""
        if os.fork():
            os._exit(0)
        signal.alarm(int(IN_TIME))
        while self.channel.sock.recv(MAX_MESSAGE):
            pass
        os._exit(0)


def _main() -> None:
    """`crash=STATUS` and `crash-while=PATH` end it before it is ready; `link=NAME` if there is no such link."""
    options = sys.argv.pop(1).split(",")  # `settle` reads what Child.start added
    values = dict(option.split("=") for option in options if "=" in option)
    if "crash" in values or os.path.exists(values.get("crash-while", "")):
        os._exit(int(values.get("crash", "3")))
    link = None
    if "link" in values:
        link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        try:
            link.bind((values["link"], ETH_P_ALL))
        except OSError:
            os._exit(4)
    _Worker(*settle("worker"), options, link).run()


if __name__ == "__main__":
    _main()
