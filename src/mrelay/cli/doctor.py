"""`mrelay doctor`: is this host fit for a relay, and what to change if not.

Called by the command line. Looks at the host (host.py) and asks a running relay, if there is one, which
may block for the client's timeout. Changes nothing.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rich.console import RenderableType
from rich.text import Text

from mrelay.cli import host, output
from mrelay.cli.client import Client
from mrelay.cli.failure import FAILED, NOT_PERMITTED, Failure
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Socket
from mrelay.ebpf import load
from mrelay.ebpf.carry import CHOSEN
from mrelay.ebpf.pins import PIN_DIR
from mrelay.kernel import caps, ethtool, libbpf
from mrelay.supervisor.host import CONTROL_USER, WORKER_USER

Verdict = Literal["ok", "warn", "bad"]
GRO: Final = "rx-udp-gro-forwarding"
SEGMENTATION: Final = "tx-udp-segmentation"
_COLOURS: Final = {"ok": "green", "warn": "yellow", "bad": "red"}
_RMEM: Final = 4 << 20  # bytes; a millisecond of 10 Gbit/s is 1.25 MB, and the kernel counts double
_NEEDED: Final = {
    caps.CAP_NET_RAW: "receive frames (AF_PACKET)",
    caps.CAP_NET_ADMIN: "send from other addresses, set offloads",
    caps.CAP_SETUID: "run its workers as another user",
    caps.CAP_SETGID: "run its workers as another group",
    caps.CAP_KILL: "end its workers",
}

_NEEDED_BY_THE_FAST_PATH: Final = {
    caps.CAP_BPF: "load the fast path: it forwards in user space",
    caps.CAP_PERFMON: "load it without barriers against speculative execution: it costs more CPU",
}
_NO_FAST_PATH: Final = "no kernel fast path: every datagram passes through a worker"


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, what follows from it, the command that changes it."""

    check: str
    verdict: Verdict
    found: str
    consequence: str = ""
    remedy: str = ""


def doctor(*, as_json: AsJson = False, socket: Socket = DEFAULT_SOCKET) -> int:
    """Print every finding; 1 when one of them is bad."""
    relay = _ask(Client(socket))
    findings = [finding for look in _LOOKS for finding in look()] + list(_relay(relay))
    verdicts = {finding.verdict for finding in findings}
    worst = next(verdict for verdict in ("bad", "warn", "ok") if verdict in verdicts)
    if as_json:
        output.print_json({"verdict": worst, "checks": [asdict(finding) for finding in findings]})
    else:
        output.print_view(_view(findings))
    return FAILED if worst == "bad" else 0


def _view(findings: list[Finding]) -> RenderableType:
    parts: list[RenderableType] = []
    for finding in findings:
        parts.append(
            Text.assemble(
                (f"{finding.verdict:4}", f"bold {_COLOURS[finding.verdict]}"),
                f"  {finding.check}: ",
                (finding.found, "bold"),
            )
        )
        parts += [f"      {text}" for text in (finding.consequence,) if text]
        parts += [f"      → {text}" for text in (finding.remedy,) if text]
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _COLOURS}
    return output.stack(*parts, ", ".join(f"{number} {verdict}" for verdict, number in counts.items()))


# ---- the host ----------------------------------------------------------------------------------


def _version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _kernel() -> Iterator[Finding]:
    release, version = os.uname().release, _version()
    if version < (5, 3):  # pidfd_open; SO_BINDTOIFINDEX is 5.1, PACKET_IGNORE_OUTGOING 4.20
        why = "before 5.3 a relay cannot watch its processes or bind its outputs"
        yield Finding("kernel", "bad", release, why, "upgrade the kernel, 6.1 or later for all there is")
    elif version < (6, 1):
        why = "before 6.1 io_uring lacks what sends cheapest, and before 5.17 sendmmsg is used"
        yield Finding("kernel", "warn", release, why, "upgrade the kernel to 6.1 or later")
    else:
        yield Finding("kernel", "ok", release)


def _io_uring() -> Iterator[Finding]:
    number = host.try_io_uring()
    disabled = host.sysctl("kernel.io_uring_disabled") or 0
    slower = "sending falls back to sendmmsg: works, costs more CPU"
    enable = "sysctl -w kernel.io_uring_disabled=0"
    if disabled == 1 and number == 0:
        why = f"only for privileged processes, and workers are not: {slower}"
        yield Finding("io_uring", "warn", "kernel.io_uring_disabled = 1", why, enable)
    elif number == 0:
        yield Finding("io_uring", "ok", "usable")
    elif disabled:
        yield Finding("io_uring", "warn", f"kernel.io_uring_disabled = {disabled}", slower, enable)
    elif number == errno.EPERM:
        remedy = "allow io_uring_setup and io_uring_enter in the container's seccomp profile"
        yield Finding("io_uring", "warn", "refused by a seccomp filter", slower, remedy)
    else:
        remedy = "use a kernel built with CONFIG_IO_URING=y"
        yield Finding("io_uring", "warn", f"not usable: {os.strerror(number)}", slower, remedy)


def _capabilities() -> Iterator[Finding]:
    withheld = [cap for cap in _NEEDED if not host.may_hold(cap)]
    absent = [cap for cap in _NEEDED if not host.holds(cap) and cap not in withheld]
    for cap in withheld:
        name = caps.NAMES[cap]
        why = f"a relay here cannot {_NEEDED[cap]}: 'mrelay run' exits 77"
        remedy = f"docker run --cap-add {name[4:]}, or add it to the unit's CapabilityBoundingSet="
        yield Finding("capabilities", "bad", f"{name} is withheld", why, remedy)
    if absent:
        names = ", ".join(caps.NAMES[cap] for cap in absent)
        why = "'mrelay run' from this shell would exit 77; commands that only talk to a relay need none"
        remedy = "sudo mrelay run …, or systemctl start mrelay"
        yield Finding("capabilities", "warn", f"you lack {names}", why, remedy)
    if not withheld and not absent:
        yield Finding("capabilities", "ok", "all that a relay needs")


def _fast_path() -> Iterator[Finding]:
    """What the kernel's fast path needs; without it all works, so nothing here is bad."""
    for check, problem, remedy in (
        ("libbpf", libbpf.available(), "apt install libbpf1"),
        ("kernel programs", load.missing(), "reinstall mrelay; in a source tree: make"),
        ("kernel for the fast path", load.outdated(), "upgrade the kernel, 6.6 or later for all there is"),
    ):
        if problem:
            yield Finding(check, "warn", problem, _NO_FAST_PATH, remedy)
        else:
            yield Finding(check, "ok", "there" if check != "kernel for the fast path" else os.uname().release)
    yield _tc()
    yield from _fast_path_capabilities()
    yield _pins()
    yield from _bpf_settings()


def _tc() -> Finding:
    if _version() >= (6, 6):
        return Finding("tc ingress", "ok", "tcx")
    why = "before 6.6 the program sits in the clsact qdisc, where it stays when the relay is killed"
    remedy = "after kill -9, unless a relay starts again: tc qdisc del dev IFACE clsact"
    return Finding("tc ingress", "ok", "clsact", why, remedy)


def _fast_path_capabilities() -> Iterator[Finding]:
    check, fine = "capabilities for the fast path", True
    for cap, purpose in _NEEDED_BY_THE_FAST_PATH.items():
        if host.holds(cap) or (host.may_hold(cap) and not all(map(host.holds, _NEEDED))):
            continue  # what an ordinary user lacks was said above
        name, fine = caps.NAMES[cap], False
        remedy = f"docker run --cap-add {name[4:]}, or add it to the unit's AmbientCapabilities="
        yield Finding(check, "warn", f"{name} is withheld", f"a relay here cannot {purpose}", remedy)
    if fine:
        yield Finding(check, "ok", "none is withheld")


def _pins() -> Finding:
    if libbpf.is_bpffs(PIN_DIR):
        return Finding("BPF file system", "ok", f"at {PIN_DIR.parent}")
    why = "the fast path ends with the relay: its restart or crash interrupts the streams"
    remedy = f"mount -t bpf -o mode=700 bpf {PIN_DIR.parent}"
    return Finding("BPF file system", "warn", f"none at {PIN_DIR.parent}", why, remedy)


def _bpf_settings() -> Iterator[Finding]:
    name = "net.core.bpf_jit_enable"
    if host.sysctl(name) == 0:
        why = "the kernel interprets the fast path's program: several times the CPU"
        yield Finding(name, "warn", "0", why, f"sysctl -w {name}=1")
    else:
        yield Finding(name, "ok", _value(name))
    name = "kernel.unprivileged_bpf_disabled"
    yield Finding(name, "ok", _value(name), "no matter: control and workers use maps that they were handed")
    btf = "there" if host.has_btf() else "absent"
    yield Finding("BTF", "ok", btf, "no matter: the programs use none of the kernel's own types")


def _value(name: str) -> str:
    value = host.sysctl(name)
    return "not shown here" if value is None else str(value)


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
    absent = [name for name in (CONTROL_USER, WORKER_USER) if not host.user_exists(name)]
    if not absent:
        yield Finding("users", "ok", f"{CONTROL_USER} and {WORKER_USER}")
        return
    why = "control and workers share one user with each other, or with others on this host"
    remedy = "; ".join(f"useradd --system --shell /usr/sbin/nologin {name}" for name in absent)
    yield Finding("users", "warn", f"no user {', '.join(absent)}", why, remedy)


def _memberships() -> Iterator[Finding]:
    for name, default in (("net.ipv4.igmp_max_memberships", 20), ("net.ipv4.igmp_max_msf", 10)):
        value = host.sysctl(name)
        if value is None:
            remedy = "use a kernel built with CONFIG_IP_MULTICAST=y"
            yield Finding(name, "bad", "absent", "no IPv4 group can be joined", remedy)
        elif value < 1:
            yield Finding(name, "bad", str(value), "no group can be joined", f"sysctl -w {name}={default}")
        else:
            yield Finding(name, "ok", str(value), "joins above it go to further sockets")


def _rmem() -> Iterator[Finding]:
    value = host.sysctl("net.core.rmem_max")
    if value is not None and value < _RMEM:
        why = "bursts may overrun receivers here, 'mrelay receive' too; the relay's rings are not bound by it"
        yield Finding("net.core.rmem_max", "warn", str(value), why, f"sysctl -w net.core.rmem_max={_RMEM}")
    else:
        yield Finding("net.core.rmem_max", "ok", str(value))


def _rp_filter() -> Iterator[Finding]:
    strict = [name for name, value in host.reverse_path_filters().items() if value == 1]
    if not strict:
        yield Finding("rp_filter", "ok", "not strict anywhere")
        return
    why = (
        "no matter to the relay, which takes frames before this check; ordinary receivers here get nothing "
        "from sources that the host has no route back to"
    )
    yield Finding("rp_filter", "ok", f"strict on {', '.join(strict)}", why)


def _multicast_routing() -> Iterator[Finding]:
    routed = host.multicast_routing_interfaces()
    if not routed:
        yield Finding("kernel multicast routing", "ok", "not active")
        return
    why = (
        "GRO stays off in this namespace, as the kernel's router drops merged frames that have DF set; "
        "and both may forward one group"
    )
    remedy = "stop the daemon that mrelay replaces, for example systemctl stop smcroute"
    yield Finding("kernel multicast routing", "warn", f"active on {', '.join(routed)}", why, remedy)


def _offloads() -> Iterator[Finding]:
    for name in host.interfaces():
        flags = host.interface_flags(name) or 0
        if flags & host.IFF_UP and not flags & host.IFF_LOOPBACK:
            yield _offload(name)


def _offload(name: str) -> Finding:
    try:
        found = ethtool.features(name)
    except OSError as error:
        found_text, why = f"not readable: {error.strerror}", "unknown whether merged frames can be had here"
        return Finding(f"offloads of {name}", "warn", found_text, why, f"ethtool -k {name}")
    gro, gso = found.get(GRO), found.get(SEGMENTATION)
    said = f"{GRO} {_on(gro)}, {SEGMENTATION} {_on(gso)}"
    if gro is None or not (gro.active or gro.changeable):
        why = "frames come one by one: more CPU for each datagram"
        remedy = "use a kernel of 5.12 or later, or another driver"
        return Finding(f"offloads of {name}", "warn", said, why, remedy)
    why = "" if gro.active else "the relay switches it on for interfaces with rules, and back off at its end"
    return Finding(f"offloads of {name}", "ok", said, why)


def _on(feature: ethtool.Feature | None) -> str:
    return "absent" if feature is None else "on" if feature.active else "off"


# ---- a running relay ---------------------------------------------------------------------------


def _ask(client: Client) -> dict[str, Any] | Failure:
    try:
        answer: dict[str, Any] = client.get("/v1/health")
    except Failure as failure:
        return failure
    return answer


def _relay(answer: dict[str, Any] | Failure) -> Iterator[Finding]:
    if isinstance(answer, Failure):
        denied = answer.status == NOT_PERMITTED
        yield Finding("relay", "warn" if denied else "ok", "not asked", "; ".join(answer.lines))
        return
    egress, state = answer["egress"], "ready" if answer["ready"] else "starting"
    landlock = f"Landlock ABI {answer['landlock']}" if answer["landlock"] else "no Landlock"
    said = f"{answer['version']} is {state}, engine {answer['engine']}, egress {egress}, seccomp and {landlock}"
    if egress == "sendmmsg":
        why = "its workers send without io_uring: works, costs more CPU"
        yield Finding("relay", "warn", said, why, "see io_uring above, then systemctl restart mrelay")
    else:
        yield Finding("relay", "ok", said)
    if answer["engine"] != "ebpf":
        yield _no_fast_path(answer["no_fast_path"])


def _no_fast_path(problem: str) -> Finding:
    if problem == CHOSEN:
        remedy = 'engine = "auto" under [relay], then systemctl restart mrelay'
        return Finding("relay's fast path", "ok", f"none: {problem}", "as it was told", remedy)
    remedy = "mend what the checks above say of it, then systemctl restart mrelay"
    return Finding("relay's fast path", "warn", f"none: {problem}", _NO_FAST_PATH, remedy)


_LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    _kernel,
    _io_uring,
    _capabilities,
    _fast_path,
    _confinement,
    _users,
    _memberships,
    _rmem,
    _rp_filter,
    _multicast_routing,
    _offloads,
)
