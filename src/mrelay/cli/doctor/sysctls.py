"""Sysctls that bite, and the kernel's own multicast routing.

Called by the package. Reads /proc/sys and /proc/net.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding, Verdict, set_sysctl

_BURST: Final = 4 << 20  # bytes; a millisecond of 10 Gbit/s is 1.25 MB, and the kernel counts double
_MESSAGES: Final = 212992  # bytes, the kernel's default: a message between two of our processes has up to 128 KiB


class Least(NamedTuple):
    """A sysctl below `least` is `verdict`, and this follows; `set_to` mends it. `fine`: what to say above it."""

    name: str
    least: int
    set_to: int
    verdict: Verdict
    consequence: str
    fine: str = ""


TABLE: Final = (
    Least(
        "net.ipv4.igmp_max_memberships",
        1,
        20,
        "bad",
        "no group can be joined",
        "joins above it go to further sockets",
    ),
    Least(
        "net.ipv4.igmp_max_msf",
        1,
        10,
        "bad",
        "no source of a group can be joined",
        "joins above it go to further sockets",
    ),
    Least(
        "net.core.rmem_max",
        _BURST,
        _BURST,
        "warn",
        "bursts may overrun receivers here, 'mrelay receive' too; the relay's rings are not bound by it",
    ),
    Least(
        "net.core.wmem_max",
        _MESSAGES,
        _MESSAGES,
        "warn",
        "control and workers may fail to tell each other about rules with many outputs",
        "the relay's own outputs are not bound by it",
    ),
    Least(
        "net.ipv6.mld_max_msf",
        1,
        64,
        "warn",
        "no source of an IPv6 group can be joined",
        "joins above it go to further sockets",
    ),
)
_MUST_BE_THERE: Final = ("net.ipv4.igmp_max_memberships", "net.ipv4.igmp_max_msf")


def _limits() -> Iterator[Finding]:
    for row in TABLE:
        value = host.sysctl(row.name)
        if value is None and row.name in _MUST_BE_THERE:
            remedy = "use a kernel built with CONFIG_IP_MULTICAST=y"
            yield Finding(row.name, "bad", "absent", "no IPv4 group can be joined", remedy)
        elif value is not None and value < row.least:
            command = set_sysctl(row.name, row.set_to)
            yield Finding(row.name, row.verdict, str(value), row.consequence, command=command)
        else:
            yield Finding(row.name, "ok", "not shown here" if value is None else str(value), row.fine)


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


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (_limits, _rp_filter, _multicast_routing)
