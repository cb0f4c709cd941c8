"""The table of links: epochs, names; and a real dump, which needs no privilege."""

import asyncio
import struct
from dataclasses import replace

from pyroute2 import AsyncIPRoute

from fake_roles import run
from mrelay.control.links import Link, LinkTable, LinkWatcher, deleted, dump
from mrelay.messages import OpenEgress

ETH0 = Link("eth0", 2, True, frozenset({"10.0.0.1"}), frozenset({"fe80::1"}))


def test_update_says_whether_anything_changed() -> None:
    table = LinkTable()
    assert table.update([ETH0])
    assert not table.update([ETH0])
    assert table.update([replace(ETH0, up=False)])
    assert table.update([])


def test_an_epoch_counts_changes_of_its_family_only() -> None:
    table = LinkTable()
    table.update([ETH0])
    assert (table.epoch(2, 4), table.epoch(2, 6)) == (0, 0)
    table.update([replace(ETH0, ipv4=frozenset({"10.0.0.2"}))])
    assert (table.epoch(2, 4), table.epoch(2, 6)) == (1, 0)


def test_a_flap_is_no_change_of_address() -> None:
    table = LinkTable()
    table.update([ETH0])
    table.update([replace(ETH0, up=False, ipv6=frozenset())])
    table.update([ETH0])
    assert table.epoch(2, 6) == 0


def test_epochs_go_on_from_what_is_held() -> None:
    table = LinkTable([OpenEgress(0, 2, 4, "239.1.1.1", 5000, "egress", 3)])
    table.update([ETH0])
    assert table.epoch(2, 4) == 3


def test_a_link_that_comes_back_is_another_link() -> None:
    table = LinkTable()
    table.update([ETH0])
    table.update([])
    assert table.name(2) == "2"
    table.update([replace(ETH0, ifindex=9)])
    assert table.name(9) == "eth0"
    assert table.epoch(9, 4) == 0


def test_a_number_that_another_link_has_now_is_told_once() -> None:
    table = LinkTable()
    table.update([ETH0])
    assert table.update([ETH0], {2, 7}), "gone and there again: another one"
    assert table.take_replaced() == {2}
    assert table.take_replaced() == set()


def test_links_that_went_are_read_from_the_events() -> None:
    def message(kind: int, family: int, ifindex: int, attributes: bytes = b"") -> bytes:
        body = struct.pack("=BxHiII", family, 1, ifindex, 0, 0) + attributes
        return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body

    gone = message(17, 0, 5, b"\x08\0\1\0abcd") + message(16, 0, 6) + message(17, 7, 8) + message(17, 0, 9)
    assert deleted(gone) == {5, 9}
    assert deleted(gone[:-20]) == {5}
    assert deleted(bytes(400)) == set()


def test_a_dump_has_the_loopback_interface() -> None:
    async def work() -> None:
        async with AsyncIPRoute(groups=0) as netlink:
            links = {link.name: link for link in await dump(netlink)}
        assert links["lo"].ifindex == 1

    run(work)


def test_the_watcher_fills_the_table_before_it_is_ready() -> None:
    async def work() -> None:
        table, ready, changes = LinkTable(), asyncio.Event(), [0]
        task = asyncio.create_task(LinkWatcher(table, lambda: changes.append(1)).run(ready))
        await ready.wait()
        assert "lo" in table.by_name
        assert len(changes) == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(work)
