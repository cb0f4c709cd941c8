"""`mrelay discover`: the streams on an interface, and the rule that would relay each.

Called by the command line. Blocks on the control socket for as long as it listens. With --join this process itself
is the member, so that the memberships end with it.
"""

import contextlib
import ipaddress
import json
import socket
import sys
from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any, Final

from cyclopts import Parameter, validators
from rich.console import RenderableType
from rich.live import Live

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import USAGE, Failure
from mrelay.cli.options import DEFAULT_SOCKET, AsJson
from mrelay.cli.options import Socket as SocketPath

_COLUMNS: Final = (
    "GROUP",
    "PORT",
    "VLAN",
    "SOURCE",
    "PACKETS",
    "PACKETS/S",
    "BITRATE",
    "TTL",
    "WANTED BY",
    "NAME",
    "RULE",
)
_NUMBERS: Final = ("PORT", "VLAN", "PACKETS", "PACKETS/S", "BITRATE", "TTL")
_SNOOPING: Final = (
    "A switch with IGMP or MLD snooping sends here only what somebody on this port asks for: a group that is "
    "missing may well be there. --join GROUP asks for it."
)


def discover(
    interface: Annotated[str, Parameter(help="Where to listen; it need not have a rule.")],
    /,
    *,
    seconds: Annotated[
        float, Parameter(validator=validators.Number(gt=0, lte=3600), help="How long to listen, up to 3600.")
    ] = 10.0,
    to: Annotated[
        str | None,
        Parameter(metavar="IFACE", help="Where the suggested rules send to; default: another interface."),
    ] = None,
    join: Annotated[
        tuple[str, ...],
        Parameter(
            metavar="GROUP", help="Ask for this group meanwhile; repeat for several. By default nothing is joined."
        ),
    ] = (),
    as_json: AsJson = False,
    socket: SocketPath = DEFAULT_SOCKET,
) -> None:
    """POST the request and show what comes, live."""
    body = {"interface": interface, "seconds": seconds, **({"to": to} if to else {})}
    with _joined(interface, join), Client(socket).opened("POST", "/v1/discover", body) as answer:
        views = (json.loads(line) for line in answer)
        last = _live(views) if sys.stdout.isatty() and not as_json else _last(views)
    if as_json:
        output.print_json(last)
    else:
        output.print_view(_view(last))
        print(f"\n{_SNOOPING}", file=sys.stderr)


def _last(views: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return _some(next(iter(deque(views, maxlen=1)), {}))


def _live(views: Iterator[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with (
        Live(console=output.console(), auto_refresh=False, transient=True) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for found in views:
            live.update(_view(found), refresh=True)
    return _some(found)


def _some(found: dict[str, Any]) -> dict[str, Any]:
    if not found:
        raise Failure("the relay ended before it heard anything: see its log, then try again")
    return found


@contextlib.contextmanager
def _joined(interface: str, groups: tuple[str, ...]) -> Iterator[None]:
    """Member of these groups meanwhile."""
    if not groups:
        yield
        return
    from mrelay.kernel.membership import MembershipPool

    try:
        pool = MembershipPool(socket.if_nametoindex(interface))
    except OSError as error:
        raise Failure(f"no interface {interface} here: `ip link` lists them", status=USAGE) from error
    try:
        for group in groups:
            _join(pool, interface, group)
        yield
    finally:
        pool.close()


def _join(pool: Any, interface: str, group: str) -> None:
    try:
        address = ipaddress.ip_address(group)
        if not address.is_multicast:
            raise ValueError
        pool.join(address)
    except ValueError:
        raise Failure(f"'{group}' is no multicast group: write for example 239.1.1.1", status=USAGE) from None
    except OSError as error:
        raise Failure(f"can't join {group} on {interface}: {error.strerror or error}") from error


def _view(found: dict[str, Any]) -> RenderableType:
    groups = found["groups"]
    heard = f"{found['interface']}, {found['seconds']:.0f} s: {output.plural(len(groups), 'group')}"
    queriers = ", ".join(f"{q['protocol']}v{q['version']} {q['address']}" for q in found["queriers"])
    lines = [f"{heard}; querier: {queriers or 'none heard'}"]
    if found["missed"]:
        lines.append(f"{output.count(found['missed'])} frames came too fast: counts and rates are too low")
    if found["left_out"]:
        lines.append(f"{output.count(found['left_out'])} more than there is room for")
    table = [output.table(_COLUMNS, map(_row, groups), right=_NUMBERS)] if groups else []
    new = [group["rule"] for group in groups if not group["rules"]]
    suggested = ["", "To relay what no rule takes yet:", *new] if new else []
    services = [f"{one['name']} at {one['host']}:{one['port']}" for one in found["services"]]
    named = ["", "Services that multicast DNS tells of:", *services] if services else []
    return output.stack(*lines, "", *table, *suggested, *named)


def _row(group: dict[str, Any]) -> list[str]:
    sources = group["sources"]
    ttls = sorted({source["ttl"] for source in sources})
    return [
        group["group"],
        "-" if group["port"] is None else str(group["port"]),
        "-" if group["vlan"] is None else str(group["vlan"]),
        "\n".join(_source(source) for source in sources) or "-",
        output.count(group["packets"]),
        output.scaled(group["pps"], ""),
        output.scaled(group["bps"], "bit/s"),
        ", ".join(map(str, ttls)) or "-",
        "\n".join(group["members"]) or "-",
        "\n".join(group["names"]) or "-",
        "\n".join(group["rules"]) or "-",
    ]


def _source(source: dict[str, Any]) -> str:
    return f"{source['address']} ({source['host']})" if source["host"] else str(source["address"])
