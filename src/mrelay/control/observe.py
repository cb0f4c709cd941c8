"""What a client may see of the wire: discovery and captures, and what is asked of them.

Owns the checks of such requests. Called by api; each is served by a tap of its own for as long as it lasts.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any, Final

from pydantic import ValidationError

from mrelay.control.capture import Bounds, Side, capture
from mrelay.control.discovery import Asked, discover
from mrelay.control.judge import Aim, Judge, aim_in, aim_out, anything_to, dropped, hits_one_of
from mrelay.control.links import Link, LinkTable
from mrelay.control.rulebook import Rulebook
from mrelay.control.stats import Stats
from mrelay.control.streams import MAX_NETWORKS, Streams
from mrelay.control.supervisor import Supervisor
from mrelay.model.endpoint import Input, Output, overlap
from mrelay.model.issue import ConfigError, Issue, did_you_mean, issues_of, show

Table = dict[str, Any]

MOST_SECONDS: Final = 3600.0
MOST_PACKETS: Final = 10_000_000
DEFAULT_BYTES: Final = 100_000_000
MOST_BYTES: Final = 10_000_000_000
SIDES: Final = ("in", "out", "dropped")
_WHAT: Final = "a rule's name, or an input such as eth0:10.1.1.9@239.1.1.1:5000"


class NoRule(Exception):
    """There is no rule of this name."""


class Observe:
    """Everything that reads taps for a client."""

    def __init__(
        self, supervisor: Supervisor, links: LinkTable, stats: Stats, streams: Streams, book: Rulebook
    ) -> None:
        self._supervisor, self._links, self._stats, self._book = supervisor, links, stats, book
        self.streams = streams

    def discover(self, table: Table) -> AsyncGenerator[Table, None]:
        """/v1/discover: views until the time is over. ConfigError now; RequestFailed at the first of them."""
        only(table, "interface", "to", "seconds")
        link = self._link("interface", table.get("interface"))
        to = self._link("to", table["to"]).name if table.get("to") else self._elsewhere(link)
        names = self._stats.names()
        asked = Asked(link.name, link.ifindex, to, names.rules_of)
        return discover(self._supervisor, asked, bounded("seconds", table.get("seconds", 10.0), MOST_SECONDS))

    def capture(self, table: Table) -> AsyncGenerator[bytes, None]:
        """/v1/capture: a pcapng file in pieces. ConfigError, NoRule now; RequestFailed at the first piece."""
        only(table, "what", "side", "seconds", "packets", "bytes")
        what, side = table.get("what"), table.get("side", "in")
        if not isinstance(what, str):
            raise wrong("what", f"{show(what)} is neither a rule nor a flow", f"write {_WHAT}")
        if side not in SIDES:
            raise wrong("side", f"{show(side)} is none of them", f"write one of: {', '.join(SIDES)}")
        bounds = Bounds(
            bounded("seconds", table.get("seconds", 10.0), MOST_SECONDS),
            int(bounded("packets", table.get("packets", MOST_PACKETS), MOST_PACKETS)),
            int(bounded("bytes", table.get("bytes", DEFAULT_BYTES), MOST_BYTES)),
        )
        origin, outputs = self._meant(what)
        exact = ":" in what
        if side == "out":
            sides = self._out(outputs)
        elif side == "in":
            sides = [self._side(origin, hits_one_of([aim_in(origin)]))]
        else:
            link = self._link("what", origin.interface)
            aim = aim_in(origin) if exact else anything_to(origin)
            judge = dropped(self._stats.names().rules, link.ifindex, aim)
            sides = [self._side(origin, judge)]
        return capture(self._supervisor, sides, bounds)

    def _meant(self, what: str) -> tuple[Input, list[tuple[Output, Input]]]:
        """What comes in, and what is sent of it."""
        if ":" not in what:
            rule = next((rule for rule in self._book.rules if rule.name == what), None)
            if rule is None:
                raise NoRule(what)
            return rule.from_, [(output, rule.from_) for output in rule.to]
        try:
            origin = Input.parse(what)
        except ValidationError as error:
            raise ConfigError(issues_of(error, key="what")) from None
        rules = [rule for rule in self._book.rules if _meets(rule.from_, origin)]
        return origin, [(output, origin) for rule in rules for output in rule.to]

    def _side(self, origin: Input, judge: Judge) -> Side:
        link = self._link("what", origin.interface)
        return Side(link, (str(origin.address),), False, judge)

    def _out(self, outputs: list[tuple[Output, Input]]) -> list[Side]:
        """A side for each interface that these leave by."""
        aims: dict[str, list[Aim]] = defaultdict(list)
        for output, origin in outputs:
            aims[output.interface].append(aim_out(output, origin))
        if not aims:
            raise wrong("what", "no rule takes it, so nothing goes out", "see: mrelay rule list")
        found = []
        for name, mine in aims.items():
            networks = tuple(dict.fromkeys(str(aim.address) for aim in mine))
            if len(networks) > MAX_NETWORKS:
                problem = f"{len(networks)} destinations on {name} are more than one tap can tell apart"
                raise wrong("what", problem, f"name what goes to at most {MAX_NETWORKS} of them")
            found.append(Side(self._link("what", name), networks, True, hits_one_of(mine)))
        return found

    def _link(self, key: str, name: object) -> Link:
        link = self._links.by_name.get(name) if isinstance(name, str) else None
        if link is None:
            remedy = did_you_mean(str(name), self._links.by_name)
            raise wrong(key, f"{show(name)} is no interface of this host", remedy)
        return link

    def _elsewhere(self, link: Link) -> str:
        """Another interface that is up, for want of a better one to send to."""
        others = (one for one in self._links.by_name.values() if one.up and not one.loopback and one is not link)
        return next((one.name for one in others), link.name)


def _meets(one: Input, other: Input) -> bool:
    """Whether some packet could be taken by both."""
    return (
        one.interface == other.interface
        and one.vlan == other.vlan
        and overlap(one.address, other.address)
        and one.ports.low <= other.ports.high
        and other.ports.low <= one.ports.high
        and (one.source is None or other.source is None or overlap(one.source, other.source))
    )


def wrong(key: str, problem: str, remedy: str) -> ConfigError:
    """What a request can't be carried out for."""
    return ConfigError([Issue("", "", key, problem, remedy)])


def only(table: Table, *known: str) -> None:
    """Refuse a request with other keys."""
    for key in table:
        if key not in known:
            raise wrong(key, f"there is no key {show(key)}", did_you_mean(key, known))


def bounded(key: str, value: object, most: float) -> float:
    """A number above 0, up to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        problem = f"{show(value)} is not a number from above 0 to {most:g}"
        raise wrong(key, problem, f"write for example {min(10, most):g}")
    return value
