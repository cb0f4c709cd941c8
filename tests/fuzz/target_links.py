"""Netlink dumps with any attributes missing: a table of links, with no address that can't be a source."""

import ipaddress
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from pyroute2 import AsyncIPRoute

from fuzz.data import Data
from mrelay.control.links import Link, LinkTable, dump

ADDRESSES = ["10.0.0.1", "10.0.0.2", "169.254.1.1", "fe80::1", "2001:db8::1", None, None]
FAMILIES = [2, 2, 10, 10, 45]  # AF_INET, AF_INET6, AF_MCTP


class Netlink:
    """As much of AsyncIPRoute as `dump` uses."""

    def __init__(self, choices: Data) -> None:
        self.links = [
            {
                "index": 1 + choices.below(4),
                "ifi_type": 1,
                "flags": choices.integer(2),
                "ifname": choices.pick(["a", "b", "c"]),
            }
            for _ in range(choices.below(5))
        ]
        self.addresses = list(self._addresses(choices))

    def _addresses(self, choices: Data) -> Iterator[dict[str, Any]]:
        for _ in range(choices.below(8)):
            yield {
                "index": choices.below(6),
                "family": choices.pick(FAMILIES),
                "address": choices.pick(ADDRESSES),
                "local": choices.pick(ADDRESSES),
                "flags": choices.pick([None, 0, 0x40, 0x08, 0x80]),
            }

    async def get_links(self) -> AsyncIterator[dict[str, Any]]:
        return _each(self.links)

    async def get_addr(self) -> AsyncIterator[dict[str, Any]]:
        return _each(self.addresses)


async def _each(items: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    for item in items:
        yield item


def check(data: bytes) -> None:
    choices = Data(data)
    table = LinkTable()
    while choices:
        links = _run(Netlink(choices))
        table.update(links)
        assert set(table.by_name) == {link.name for link in links}
        assert not table.update(links), "the same dump changes nothing"
        for link in links:
            assert all(table.epoch(link.ifindex, family) >= 0 for family in (4, 6))
            for address in link.ipv4 | link.ipv6:
                assert not address.startswith("169.254.")
                ipaddress.ip_address(address)


def _run(netlink: Netlink) -> list[Link]:
    """`dump` never waits for a fake, so no event loop is needed."""
    work = dump(cast(AsyncIPRoute, netlink))
    try:
        work.send(None)
    except StopIteration as result:
        links: list[Link] = result.value
        return links
    raise AssertionError("it waits")
