"""The systems compared: how each is started for a case, and how to tell that it forwards.

Owns the one table of systems and the processes started from it; relay_bench.py calls `running`, which
blocks until the system is ready and, afterwards, until it is gone. Each runs in the relay's namespace on
the relay's core, with its files in a directory of its own that is removed afterwards.
"""

import contextlib
import ctypes
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lab as labs
from traffic import Flow

PORT: Final = 5000  # of every flow at ingress
OUT_GROUP, OUT_PORT = "239.2.2.2", 6000  # where a relay that rewrites sends the one flow
INTERLEAVED_FLOWS: Final = 200
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP = 1, 22  # <linux/prctl.h>
_SECCOMP_MODE_FILTER: Final = 2  # <linux/seccomp.h>
_NR_IO_URING_SETUP: Final = 425  # <asm-generic/unistd.h>, the same on every architecture


@dataclass(frozen=True)
class Case:
    """One kind of load: `flows` is "one" or "interleaved"; mrelay gets a prefix rule or `rule_per_flow`.

    `gro`: mrelay may have frames merged. `df`: the sender sets Don't Fragment, as Linux does.
    """

    flows: str
    outputs: int
    rule_per_flow: bool = False
    gro: bool = True
    df: bool = True

    def __str__(self) -> str:
        what = "one flow" if self.flows == "one" else f"{INTERLEAVED_FLOWS} interleaved flows"
        special = ("" if self.gro else ", no GRO") + ("" if self.df else ", no DF")
        return f"{what}, {self.outputs} output{'s' if self.outputs > 1 else ''}{special}"

    def traffic(self) -> list[Flow]:
        """What the source sends, in turn."""
        if self.flows == "one":
            return [Flow(labs.SOURCE_ADDRESS, "239.1.1.1", PORT)]
        groups = (f"239.1.0.{n}" for n in range(1, INTERLEAVED_FLOWS + 1))
        return [Flow(labs.SOURCE_ADDRESS, group, PORT) for group in groups]


@dataclass(frozen=True)
class System:
    """One relay. `command` writes what files it needs into the directory and returns the command line.

    `ready(pid, log)`: does it forward yet. `most_outputs`, `interleaved`: what it can be asked to do.
    `sink`: where the one flow comes out. `gro_forwarding`: the benchmark switches UDP GRO on for it.
    """

    name: str
    command: Callable[[Case, Path], list[str]]
    ready: Callable[[int, Path, Case], bool]
    peer: bool = False
    most_outputs: int = 99
    interleaved: bool = True
    sink: tuple[str, int] = (OUT_GROUP, OUT_PORT)
    gro_forwarding: bool = False
    deny_io_uring: bool = False
    needs_no_df: bool = False

    def can(self, case: Case) -> bool:
        """Whether this system takes part in `case`."""
        if self.needs_no_df and (case.df or not case.gro):
            return False
        return case.outputs <= self.most_outputs and (self.interleaved or case.flows == "one")


def known(core: int) -> list[System]:
    """mrelay's engines, the userspace one with io_uring and without, then the peers."""

    def uring(case: Case, directory: Path) -> list[str]:
        return _mrelay(case, directory, core, "uring")

    def ebpf(case: Case, directory: Path) -> list[str]:
        return _mrelay(case, directory, core, "ebpf")

    def xdp(case: Case, directory: Path) -> list[str]:
        return _mrelay(case, directory, core, "ebpf", "xdp = true\n")

    mroute = System("mroute", _mroute, _mroute_ready, peer=True, sink=("239.1.1.1", PORT))
    return [
        System("mrelay-uring", uring, _said_ready),
        System("mrelay-sendmmsg", uring, _said_ready, deny_io_uring=True),
        System("mrelay-ebpf", ebpf, _said_ready),
        System("mrelay-xdp", xdp, _said_ready),
        mroute,
        # It drops merged frames with DF, so this is for networks where no sender sets that.
        dataclasses.replace(mroute, name="mroute-gro", gro_forwarding=True, needs_no_df=True),
        System("socat", _socat, _socat_ready, peer=True, most_outputs=1, interleaved=False),
    ]


def from_command(text: str) -> System:
    """A system from `NAME=COMMAND`; NAME ending in `+gro` gets UDP GRO; {nout} and {python} are filled in."""
    name, equals, template = text.partition("=")
    if not (name and equals and template):
        raise ValueError(f"--extra {text!r}: write NAME=COMMAND")

    def command(case: Case, _: Path) -> list[str]:
        return shlex.split(template.format(nout=case.outputs, python=sys.executable))

    return System(name, command, _packet_ready, interleaved=False, gro_forwarding=name.endswith("+gro"))


@contextlib.contextmanager
def running(system: System, lab: labs.Lab, case: Case, core: int) -> Iterator[Path]:
    """`system` forwards `case` in the relay's namespace for the block, which gets its directory.

    RuntimeError with the system's own words when it doesn't start or doesn't last.
    """
    with tempfile.TemporaryDirectory(prefix="mrelay-bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        command = system.command(case, directory)
        line = ["ip", "netns", "exec", lab.relay, "taskset", "-c", str(core), *command]
        process = _start(line, directory, system)
        try:
            if system.gro_forwarding:
                lab.gro_forwarding()
            _await_ready(system, process, directory, case)
            _prefer(process.pid)
            yield directory
            if process.poll() is not None:
                raise RuntimeError(f"{system.name} ended by itself: {words(directory)}")
        finally:
            _stop(process)


def _start(line: list[str], directory: Path, system: System) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # no orphan, whatever happens to us
        if system.deny_io_uring:
            _deny_io_uring()

    with (directory / "stdout").open("wb") as out, (directory / "stderr").open("wb") as err:
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=prepare,  # noqa: PLW1509 - this process has one thread
        )


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
    """struct sock_filter, <linux/filter.h>."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _SockFprog(ctypes.Structure):
    """struct sock_fprog, <linux/filter.h>."""

    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_SockFilter)))


def _await_ready(system: System, process: subprocess.Popen[bytes], directory: Path, case: Case) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if system.ready(process.pid, directory, case):
            return
        time.sleep(0.05)
    state = "not ready in time" if process.poll() is None else f"ended with {process.returncode}"
    raise RuntimeError(f"{system.name}: {state}: {words(directory)}")


def _prefer(pid: int) -> None:
    """Put other work on this machine behind a process and its descendants, as `Lab.thread_napi` does for NAPI.

    All get the same, so their shares beside each other stay as they were. Both kinds of niceness count:
    within a session, and, where sched_autogroup is on, of the session.
    """
    with contextlib.suppress(OSError):  # no sched_autogroup here, or the process has ended
        Path(f"/proc/{pid}/autogroup").write_text("-20")
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, -20)
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                _prefer(int(child))


def words(directory: Path) -> str:
    """The end of what the system that runs in `directory` said."""
    text = (directory / "stderr").read_text(errors="replace") + (directory / "stdout").read_text(errors="replace")
    return text.strip()[-600:] or "(it said nothing)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):  # the usual case: the whole session has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the table's functions: one pair for each kind of system --------------------------------------


def _mrelay(case: Case, directory: Path, core: int, engine: str, more: str = "") -> list[str]:
    config = directory / "relay.toml"
    gro = '"auto"' if case.gro else "false"
    text = f'[relay]\nworkers = [{core}]\nengine = "{engine}"\ngro = {gro}\n{more}'
    config.write_text(text + "".join(_mrelay_rules(case)))
    state = directory / "state"
    state.mkdir(mode=0o777)
    state.chmod(0o777)
    socket_path = directory / "control.sock"
    run = [sys.executable, "-m", "mrelay", "run", "--config", str(config)]
    return [*run, "--socket", str(socket_path), "--state-dir", str(state)]


def _mrelay_rules(case: Case) -> Iterator[str]:
    if case.flows == "one":
        yield _mrelay_rule("one", f"r0:239.1.1.1:{PORT}", f"{OUT_GROUP}:{OUT_PORT}", case)
    elif case.rule_per_flow:
        for n in range(1, INTERLEAVED_FLOWS + 1):
            yield _mrelay_rule(f"flow-{n}", f"r0:239.1.0.{n}:{PORT}", f"239.2.0.{n}:{OUT_PORT}", case)
    else:
        yield _mrelay_rule("all", f"r0:239.1.0.0/24:{PORT}", "*:*", case)


def _mrelay_rule(name: str, source: str, output: str, case: Case) -> str:
    to = ", ".join(f'"r{i}:{output}"' for i in range(1, case.outputs + 1))
    return f'\n[[rule]]\nname = "{name}"\nfrom = "{source}"\nto = [{to}]\n'


def _said_ready(_: int, directory: Path, __: Case) -> bool:
    return "ready" in (directory / "stdout").read_text().split()


def _mroute(case: Case, directory: Path) -> list[str]:
    """Smcroute sets the kernel's routes, the kernel forwards. No GRO: it would drop merged frames with DF."""
    outputs = [f"r{i}" for i in range(1, case.outputs + 1)]
    lines = [f"phyint {name} enable ttl-threshold 1" for name in ("r0", *outputs)]
    for flow in case.traffic():
        lines.append(f"mroute from r0 source {flow.source} group {flow.group} to {' '.join(outputs)}")
    config = directory / "smcroute.conf"
    config.write_text("\n".join(lines) + "\n")
    own = ["-P", str(directory / "pid"), "-u", str(directory / "sock")]
    return ["smcrouted", "-n", "-N", "-f", str(config), "-l", "info", *own]


def _mroute_ready(pid: int, _: Path, case: Case) -> bool:
    """Every route is in the kernel's multicast forwarding cache."""
    return len(_proc_net(pid, "ip_mr_cache")) >= len(case.traffic())


def _socat(_: Case, __: Path) -> list[str]:
    join = f"ip-add-membership=239.1.1.1:{labs.INGRESS_ADDRESS}"
    egress = f"ip-multicast-if={labs.egress_address(1)},ip-multicast-ttl=8"
    source = f"UDP4-RECV:{PORT},{join},reuseaddr,rcvbuf=4194304"
    return ["socat", "-b", "65536", "-u", source, f"UDP4-DATAGRAM:{OUT_GROUP}:{OUT_PORT},{egress}"]


def _socat_ready(pid: int, _: Path, __: Case) -> bool:
    return any(f":{PORT:04X} " in line for line in _proc_net(pid, "udp"))


def _packet_ready(pid: int, _: Path, __: Case) -> bool:
    """It has a packet socket."""
    return bool(_proc_net(pid, "packet"))


def _proc_net(pid: int, name: str) -> list[str]:
    """Lines of /proc/net/`name` in the process's namespace, without the heading; none before it is there."""
    own = Path(f"/proc/{os.getpid()}/ns/net").stat().st_ino
    try:
        if Path(f"/proc/{pid}/ns/net").stat().st_ino == own:  # `ip netns exec` has not entered it yet
            return []
        return Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
