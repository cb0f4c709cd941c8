"""What a client may see of the wire: discovery and captures, and what is asked of them.

Owns the checks of such requests. Called by api; each is served by a tap of its own for as long as it lasts.
"""

from collections.abc import AsyncGenerator
from typing import Any, Final

from mrelay.control.discovery import Asked, discover
from mrelay.control.links import Link, LinkTable
from mrelay.control.stats import Stats
from mrelay.control.streams import Streams
from mrelay.control.supervisor import Supervisor
from mrelay.model.issue import ConfigError, Issue, did_you_mean, show

Table = dict[str, Any]

MOST_SECONDS: Final = 3600.0


class Observe:
    """Everything that reads taps for a client."""

    def __init__(self, supervisor: Supervisor, links: LinkTable, stats: Stats, streams: Streams) -> None:
        self._supervisor, self._links, self._stats = supervisor, links, stats
        self.streams = streams

    def discover(self, table: Table) -> AsyncGenerator[Table, None]:
        """/v1/discover: views until the time is over. ConfigError now; RequestFailed at the first of them."""
        only(table, "interface", "to", "seconds")
        link = self._link("interface", table.get("interface"))
        to = self._link("to", table["to"]).name if table.get("to") else self._elsewhere(link)
        names = self._stats.names()
        asked = Asked(link.name, link.ifindex, to, names.rules_of)
        return discover(self._supervisor, asked, bounded("seconds", table.get("seconds", 10.0), MOST_SECONDS))

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
