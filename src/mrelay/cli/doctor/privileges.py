"""What a relay may do here, and what keeps its processes from doing more: capabilities, seccomp, Landlock, users.

Called by the package. Reads /proc/self and asks the kernel; nothing blocks.
"""

from collections.abc import Callable, Iterator
from typing import Final

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding
from mrelay.kernel import caps
from mrelay.supervisor.host import CONTROL_USER, WORKER_USER

NEEDED: Final = {
    caps.CAP_NET_RAW: "receive frames (AF_PACKET)",
    caps.CAP_NET_ADMIN: "send from other addresses, set offloads",
    caps.CAP_SETUID: "run its workers as another user",
    caps.CAP_SETGID: "run its workers as another group",
    caps.CAP_KILL: "end its workers",
}


def _capabilities() -> Iterator[Finding]:
    withheld = [cap for cap in NEEDED if not host.may_hold(cap)]
    absent = [cap for cap in NEEDED if not host.holds(cap) and cap not in withheld]
    for cap in withheld:
        name = caps.NAMES[cap]
        why = f"a relay here cannot {NEEDED[cap]}: 'mrelay run' exits 77"
        remedy = f"docker run --cap-add {name[4:]}, or add it to the unit's CapabilityBoundingSet="
        yield Finding("capabilities", "bad", f"{name} is withheld", why, remedy)
    if absent:
        names = ", ".join(caps.NAMES[cap] for cap in absent)
        why = "'mrelay run' from this shell would exit 77; commands that only talk to a relay need none"
        remedy = "sudo mrelay run …, or systemctl start mrelay"
        yield Finding("capabilities", "warn", f"you lack {names}", why, remedy)
    if not withheld and not absent:
        yield Finding("capabilities", "ok", "all that a relay needs")


def _confinement() -> Iterator[Finding]:
    if not host.seccomp_available():
        why = "control and workers do not start without their system call filters"
        remedy = "use a kernel built with CONFIG_SECCOMP_FILTER=y, on x86_64 or aarch64"
        yield Finding("seccomp", "bad", "not usable", why, remedy)
    else:
        yield Finding("seccomp", "ok", "usable")
    version = host.landlock_abi()
    if version == 0:
        why = "a control that was taken over could read what every user may read"
        yield Finding("landlock", "warn", "not usable", why, "boot with landlock in the kernel's lsm= list")
    else:
        yield Finding("landlock", "ok", f"usable, ABI {version}")


def _users() -> Iterator[Finding]:
    why = "control and workers share one user with each other, or with others on this host"
    for name in (CONTROL_USER, WORKER_USER):
        if host.user_exists(name):
            yield Finding(f"user {name}", "ok", "there")
        else:
            command = f"useradd --system --shell /usr/sbin/nologin {name}"
            yield Finding(f"user {name}", "warn", "absent", why, command=command)


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (_capabilities, _confinement, _users)
