"""A peer at work: started in the relay's namespace, awaited, asked, stopped.

Owns the processes started from peers.toml, and their directories; measure.py calls `running`, which blocks until
the peer forwards and, afterwards, until it is gone. A peer runs on the relay's core (and a second worker's).
"""

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import lab as labs
import peers
import scheduling
from cases import Case
from peers import Peer, Request
from traffic import Flow

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0
_RECOVERY: Final = 2.0  # seconds in which a relay may start a process of its own again
_POLL: Final = 0.03
_MEMBERSHIPS: Final = 20  # net.ipv4.igmp_max_memberships
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP = 1, 22  # linux/prctl.h
_SECCOMP_MODE_FILTER: Final = 2  # linux/seccomp.h
_NR_IO_URING_SETUP: Final = 425  # asm-generic/unistd.h, the same on every architecture


class Relay:
    """A peer that runs. RuntimeError with its own words when it does not start or last."""

    def __init__(self, peer: Peer, lab: labs.Lab, case: Case, cores: labs.Cores, directory: Path) -> None:
        self.peer, self.directory, self._lab, self._case = peer, directory, lab, case
        self._cores = [core for core in (cores.relay, cores.second)[: case.workers] if core is not None]
        self.variables = peers.context(peer, case, directory, self._cores)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Write its files and start it; returns when it forwards."""
        (self.directory / "state").mkdir(mode=0o777, exist_ok=True)
        (self.directory / "state").chmod(0o777)
        for name, text in self.peer.files.items():
            (self.directory / name).write_text(peers.render(text, self.variables))
        line = ["ip", "netns", "exec", self._lab.relay, *self.peer.command_line(self.variables)]
        with self._on_its_cores():
            self.process = self._popen(line)
        if self.peer.merges == "bench":
            self._lab.gro_forwarding()
        self._await_ready()
        scheduling.prefer(self.pids())

    @contextlib.contextmanager
    def _on_its_cores(self) -> Iterator[None]:
        """What is started in the block is there: on the load's core it would not run before the load ends."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _popen(self, line: list[str]) -> subprocess.Popen[bytes]:
        def prepare() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # no orphan, whatever happens to us
            if not self.peer.io_uring:
                _deny_io_uring()

        with (self.directory / "stdout").open("wb") as out, (self.directory / "stderr").open("wb") as err:
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509  nothing else of this process runs meanwhile
            )

    def _await_ready(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while self.process is not None and self.process.poll() is None and time.monotonic() < end:
            if self.shell(self.peer.ready).returncode == 0:
                return
            time.sleep(_POLL)
        raise RuntimeError(f"{self.peer.name} is not ready: {self.words()}")

    def shell(self, template: str) -> subprocess.CompletedProcess[str]:
        """Run one of the peer's shell commands in its namespace."""
        return self._run(peers.render(template, self.variables))

    def _run(self, line: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", line]
        # `ip netns exec` takes long enough to be seen in what it starts.
        with self._on_its_cores(), labs.inside(self._lab.relay):
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_START_SECONDS)

    def words(self) -> str:
        """The end of what it said."""
        text = "".join((self.directory / name).read_text(errors="replace") for name in ("stderr", "stdout"))
        return text.strip()[-600:] or "(it said nothing)"

    def drops(self) -> dict[str, int]:
        """What it says that it dropped so far, by reason; empty when it does not count."""
        if not self.peer.drops:
            return {}
        done = self.shell(self.peer.drops)
        if done.returncode:
            raise RuntimeError(f"{self.peer.name}: its counters: {done.stderr.strip()}")
        return {str(reason): int(count) for reason, count in json.loads(done.stdout)["drops"].items()}

    def adding(self, number: int) -> tuple[Flow, Callable[[], None]]:
        """A flow to add, and what has it forwarded, which returns when the relay has answered.

        What is sent is made here, so that it takes none of the time that the relay is measured by.
        """
        self.variables |= peers.adding(number)
        flow: Flow = self.variables["new"]
        if isinstance(add := self.peer.add, Request):
            return flow, self._asking(add)
        return flow, partial(self._add, peers.render(add, self.variables))

    def putting(self, number: int) -> tuple[Flow, Callable[[], None]]:
        """The same for PUT: with thousands of rules, in the place of all there are."""
        if self.peer.put is None:
            raise RuntimeError(f"{self.peer.name} cannot be given thousands of rules at once")
        self.variables |= peers.adding(number)
        return self.variables["new"], self._asking(self.peer.put)

    def _asking(self, request: Request) -> Callable[[], None]:
        texts = (peers.render(text, self.variables) for text in (request.socket, request.path, request.body))
        return partial(_ask, request.method, *texts)

    def _add(self, line: str) -> None:
        if (done := self._run(line)).returncode:
            raise RuntimeError(f"{self.peer.name}: add: {done.stderr.strip()}")

    def reload(self) -> None:
        """Have it read its configuration again."""
        if (done := self.shell(self.peer.reload)).returncode:
            raise RuntimeError(f"{self.peer.name}: reload: {done.stderr.strip()}")

    def restart(self) -> None:
        """Stop it as whoever operates it would, and start it."""
        self.stop(gently=True)
        self.start()

    def killed(self) -> None:
        """Each process of it ends by SIGKILL, one at a time; the first is the last, and is started again."""
        process, pids = self.process, self.pids()
        if process is None:
            return
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):  # it ended with another
                os.kill(pid, signal.SIGKILL)
            time.sleep(_RECOVERY)
        process.wait()
        self.start()

    def pids(self) -> list[int]:
        """It and all its descendants."""
        return _family(self.process.pid) if self.process else []

    def lasts(self) -> None:
        """RuntimeError when it has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"{self.peer.name} ended by itself: {self.words()}")

    def stop(self, *, gently: bool = False) -> None:
        """Return when it is gone. `gently`: to be started again, by its own command if it has one."""
        process, self.process = self.process, None
        if process is None:
            return
        if not (gently and self.peer.halt and self.shell(self.peer.halt).returncode == 0):
            process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # the usual case: the whole session has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running(peer: Peer, lab: labs.Lab, case: Case, cores: labs.Cores) -> Iterator[Relay]:
    """`peer` forwards `case` in the relay's namespace for the block. RuntimeError when it does not."""
    with tempfile.TemporaryDirectory(prefix="mrelay-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)  # a relay's own users must reach what it puts there
        stack.enter_context(_bpffs(directory / "bpf"))
        relay = Relay(peer, lab, case, cores, directory)
        stack.callback(relay.stop)
        relay.start()
        if peer.joins:
            stack.enter_context(_joined(lab, case))
        yield relay
        relay.lasts()


@contextlib.contextmanager
def _bpffs(folder: Path) -> Iterator[None]:
    """A BPF file system of the peer's own: `ip netns exec` hides the host's. Where there is none, a folder."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "bpf", "bpf", str(folder)], capture_output=True, check=False)
    try:
        yield
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=False)


@contextlib.contextmanager
def _joined(lab: labs.Lab, case: Case) -> Iterator[None]:
    """Receivers behind each output are members of each group: IGMP reports go out, now and when asked for."""
    memberships = [(flow.group, index) for index in lab.sink_indexes() for flow in case.traffic()]
    with contextlib.ExitStack() as stack:
        for n, (group, index) in enumerate(memberships):
            if n % _MEMBERSHIPS == 0:
                with labs.inside(lab.sink):
                    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            membership = struct.pack("4s4si", socket.inet_aton(group), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        yield


def _ask(method: str, where: str, path: str, body: str) -> None:
    """RuntimeError when the answer is no 2xx."""
    connection = http.client.HTTPConnection("localhost", timeout=_START_SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(where)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    if response.status // 100 != 2:
        raise RuntimeError(f"{method} {path}: {response.status} {text}")


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _family(int(child))
    return found


def _deny_io_uring() -> None:
    """Make io_uring_setup fail with EPERM from here on, as container runtimes' seccomp profiles do."""
    instructions = [
        (0x20, 0, 0, 0),  # BPF_LD | BPF_W | BPF_ABS: seccomp_data.nr
        (0x15, 0, 1, _NR_IO_URING_SETUP),  # BPF_JMP | BPF_JEQ | BPF_K
        (0x06, 0, 0, 0x00050000 | 1),  # BPF_RET: SECCOMP_RET_ERRNO | EPERM
        (0x06, 0, 0, 0x7FFF0000),  # BPF_RET: SECCOMP_RET_ALLOW
    ]
    filters = (_SockFilter * len(instructions))(*(_SockFilter(*each) for each in instructions))
    program = _SockFprog(len(instructions), filters)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


class _SockFilter(ctypes.Structure):
    """struct sock_filter, linux/filter.h."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _SockFprog(ctypes.Structure):
    """struct sock_fprog, linux/filter.h."""

    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_SockFilter)))
