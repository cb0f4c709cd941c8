"""What streams there are on an interface, whether a rule names them or not: the view of /v1/discover.

Owns one discovery for as long as a client asks. Called by api; reads a tap, joins nothing, blocks nothing.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Final, NamedTuple

from mrelay.control.supervisor import Supervisor
from mrelay.control.tap import Tap, TapFilter, open_tap
from mrelay.model.ruleset import FlowKey, address_text
from mrelay.model.suggest import rule_line
from mrelay.protocols.discovery import Discovery, Group, Place

Table = dict[str, Any]

WHAT: Final = TapFilter(networks=("224.0.0.0/4", "ff00::/8"), membership=True, snap=2048)
PROTOCOLS: Final = {4: "IGMP", 6: "MLD"}
EVERY: Final = 1.0  # seconds between two views
SHOWN: Final = 1000  # groups in a view, the busiest first


class Asked(NamedTuple):
    """What to look at: an interface, by name and number.

    `to`: the interface that suggested rules send to. `rules_of`: the names of the rules that take a flow.
    """

    interface: str
    ifindex: int
    to: str
    rules_of: Callable[[FlowKey], list[str]]


async def discover(supervisor: Supervisor, asked: Asked, seconds: float) -> AsyncGenerator[Table, None]:
    """A view about every second, for so long. RequestFailed when there can't be a tap."""
    found, started = Discovery(), time.monotonic()
    async with open_tap(supervisor, asked.ifindex, WHAT) as tap:
        reading = asyncio.create_task(_read(tap, found))
        try:
            while (passed := time.monotonic() - started) < seconds:
                await asyncio.sleep(min(EVERY, seconds - passed))
                found.tick(time.monotonic())
                yield view(found, asked, time.monotonic() - started, tap.dropped)
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


async def _read(tap: Tap, found: Discovery) -> None:
    async for frame in tap:
        found.add(frame.data, time.monotonic(), link=frame.network, vlan=frame.vlan, segment=frame.segment)


def view(found: Discovery, asked: Asked, seconds: float, missed: int) -> Table:
    """/v1/discover: all that was found in `seconds`; `missed` frames found the tap's buffer full."""
    members = _members(found.groups)
    with_port = {place[:3] for place in found.groups if place.port}
    rows = [
        _group(place, group, found, members[place[:3]], asked)
        for place, group in found.groups.items()
        if place.port or place[:3] not in with_port
    ]
    rows = [row for row in rows if row["sources"] or row["members"] or row["names"]]
    rows.sort(key=lambda row: (-row["bps"], -row["packets"], row["group"], row["port"] or 0))
    return {
        "interface": asked.interface,
        "seconds": round(seconds, 1),
        "missed": missed,
        "left_out": found.left_out + max(0, len(rows) - SHOWN),
        "queriers": [
            {
                "address": address_text(family, address),
                "protocol": "IGMP" if family == 4 else "MLD",
                "version": version,
            }
            for address, (version, family) in found.queriers.items()
        ],
        "groups": rows[:SHOWN],
        "services": [{"name": name, "host": host, "port": port} for name, (host, port) in found.services.items()],
    }


def _members(groups: dict[Place, Group]) -> dict[tuple[int, int, int], set[int]]:
    """Who wants each group, whatever the port, by VLAN, family and group."""
    wanted: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for place, group in groups.items():
        wanted[place[:3]] |= group.members
    return wanted


def _group(place: Place, group: Group, found: Discovery, members: Iterable[int], asked: Asked) -> Table:
    packets, octets = group.totals()
    sources = [address_text(place.family, source) for source in group.sources]
    known = sources or [address_text(place.family, source) for source in group.announced]
    address = address_text(place.family, place.group)
    names = sorted(group.names)
    return {
        "vlan": place.vlan or None,
        "group": address,
        "port": place.port or None,
        "sources": [
            {
                "address": text,
                "host": found.hosts.get(text),
                "packets": source.packets,
                "bytes": source.bytes,
                "ttl": source.ttl,
            }
            for text, source in zip(sources, group.sources.values(), strict=True)
        ],
        "packets": packets,
        "bytes": octets,
        "pps": round(group.rates[0], 1),
        "bps": round(group.rates[1], 1),
        "members": sorted(address_text(place.family, member) for member in members),
        "names": names,
        "rules": _rules(place, group, asked),
        "rule": rule_line(
            asked.interface,
            asked.to,
            address,
            place.port,
            vlan=place.vlan,
            sources=known,
            ttl=min((source.ttl for source in group.sources.values()), default=0),
            name=names[0].rpartition(" (")[0] if names else "",
        ),
    }


def _rules(place: Place, group: Group, asked: Asked) -> list[str]:
    """The rules that take it from any source that was heard, or that is announced."""
    found: dict[str, None] = {}
    for source in group.sources or group.announced or (0,):
        key = FlowKey(asked.ifindex, place.vlan, place.family, source, place.group, place.port)
        found |= dict.fromkeys(asked.rules_of(key))
    return list(found)
