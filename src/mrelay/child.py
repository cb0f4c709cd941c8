"""How a child of the supervisor settles into its role, and how it locks the door behind it.

Owns both orders. Control and each worker call `settle` once, after their imports (which an unprivileged user
may not be able to read any more), and `confine` once, when they hold what they need and before they read
anything that others sent. Standard library and mrelay.kernel only; any step that fails ends the process.
"""

import gc
import resource
import signal
import socket
import sys
from typing import Final

from mrelay import __version__, logs
from mrelay.kernel import landlock, seccomp
from mrelay.kernel.caps import drop_privileges, set_parent_death_signal
from mrelay.pulse import Pulse
from mrelay.wire import Channel

EX_PROTOCOL: Final = 76  # sysexits.h: this program is not of the running relay's version

# At most this many descriptors, if the limit we were started with allows as many: control has one for each
# client and worker; a worker two for each interface and one for each output (counters_size.MAX_LINKS).
_MOST_DESCRIPTORS: Final = {"control": 4096, "worker": 1 << 17}
_FIXED_MEMORY: Final = {"control": 2 << 30, "worker": 256 << 20}  # bytes, measured with headroom: docs/security.md
_FLOW_MEMORY: Final = 4096  # bytes for each flow that a worker's table can hold


def collect_less() -> None:
    """Have the garbage collector look at what is new after 50,000 objects rather than 700, and at imports never.

    Thousands of rules are a million objects that stay: looking through them took 40 % of the time to load them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def settle(role: str) -> tuple[Channel, Pulse]:
    """Become unprivileged for good; the channel to the supervisor, and the pulse it watches.

    Arguments of the process: the relay's version, the channel's and the pulse's descriptors, the uid and the gid
    to become. Exits with EX_PROTOCOL when the version is not ours, with 1 when the drop fails.
    """
    logs.set_up(role)
    _check_version(role, sys.argv[1])
    fd, pulse, uid, gid = (int(text) for text in sys.argv[2:6])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, _MOST_DESCRIPTORS[role])
    drop_privileges(uid, gid)
    set_parent_death_signal(signal.SIGKILL)  # cleared by the change of uid, so set after it
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; the supervisor decides
    beating = Pulse(pulse)
    beating.beat()
    return Channel(socket.socket(fileno=fd)), beating


def _check_version(role: str, running: str) -> None:
    """The package may have been replaced under a running relay, whose messages and memory are of its version."""
    if running != __version__:
        print(
            f"mrelay {role}: the running relay is version {running}, this program is {__version__}:"
            " restart the relay",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EX_PROTOCOL)


def confine(role: str, *, directory: int | None = None, flows: int = 0) -> int:
    """Give up memory without bound, the filesystem but `directory`, and every system call the role can do without.

    `flows`: how many the role's flow table may hold. Returns the Landlock ABI version in use, 0 for none.
    OSError when a step fails: the process must end.
    """
    _limit(resource.RLIMIT_DATA, _FIXED_MEMORY[role] + _FLOW_MEMORY * flows)
    if role == "worker":
        _limit(resource.RLIMIT_NPROC, 0)
    version = landlock.restrict(directory)
    seccomp.restrict(seccomp.ROLES[role])
    return version


def _limit(what: int, most: int) -> None:
    """Soft and hard limit to `most`, or to the hard limit there is when that is lower."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))
