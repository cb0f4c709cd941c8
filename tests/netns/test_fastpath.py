"""The kernel carries what the rules say: every kind of rule, seen on the wire, with the worker left alone.

One relay with many rules serves all tests of a module's star, once with plain interfaces at the outputs, once with
offloads: each test has a group of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from netns import fast
from netns.frames import Packet, multicast_mac
from netns.lab import RELAY_IN, RELAY_IN_6, SOURCE, SOURCE_2, SOURCE_6, Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, payloads

pytestmark = pytest.mark.netns
COUNT = 20
TTL = 16
EXTRA = "10.1.0.77"  # another address of the relay's


@dataclass(frozen=True)
class Case:
    """A rule, what is sent, and what leaves: (interface, source, address, port, TTL, DSCP) for each output."""

    name: str
    from_: str
    to: tuple[str, ...]
    leaves: tuple[tuple[int, str, str, int, int, int], ...]
    group: str
    source: str = SOURCE
    dscp: int = 0
    options: dict[str, bool | str] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """In TOML."""
        return rule(self.name, self.from_, *self.to, **self.options)


def own(i: int) -> str:
    """The relay's address on out`i`."""
    return f"10.1.{i}.1"


CASES = [
    Case("one-to-one", "in0:239.1.1.1:5000", ("out0:239.1.1.1:5000",), ((0, own(0), "239.1.1.1", 5000, 15, 0),),
         "239.1.1.1"),
    Case("fan-out", "in0:239.1.1.2:5000", tuple(f"out{i}:239.2.2.{i}:6000" for i in range(8)),
         tuple((i, own(i), f"239.2.2.{i}", 6000, 15, 0) for i in range(8)), "239.1.1.2"),
    Case("one-interface", "in0:239.1.1.3:5000", ("out0:239.2.3.1:6001", "out0:239.2.3.2:6002"),
         ((0, own(0), "239.2.3.1", 6001, 15, 0), (0, own(0), "239.2.3.2", 6002, 15, 0)), "239.1.1.3"),
    Case("kept", "in0:239.1.4.0/24:5000", ("out1:*:*",), ((1, own(1), "239.1.4.4", 5000, 15, 0),), "239.1.4.4"),
    Case("host", "in0:239.1.1.5:5000", ("out1:10.1.1.2:6000",), ((1, own(1), "10.1.1.2", 6000, 15, 0),),
         "239.1.1.5"),
    Case("gateway", "in0:239.1.1.6:5000", ("out0:10.50.0.9:6000",), ((0, own(0), "10.50.0.9", 6000, 15, 0),),
         "239.1.1.6"),
    Case("tunnel-exit", f"in0:{RELAY_IN}:5000", ("out0:239.2.7.1:6000",), ((0, own(0), "239.2.7.1", 6000, 15, 0),),
         RELAY_IN),
    Case("ssm", f"in0:{SOURCE}@232.1.1.1:5000", ("out0:232.2.2.2:6000",), ((0, own(0), "232.2.2.2", 6000, 15, 0),),
         "232.1.1.1"),
    Case("source-kept", "in0:239.1.1.8:5000", ("out0:239.2.8.1:6000,source=keep",),
         ((0, SOURCE_2, "239.2.8.1", 6000, 15, 0),), "239.1.1.8", SOURCE_2),
    Case("source-named", "in0:239.1.1.9:5000", (f"out0:239.2.9.1:6000,source={EXTRA}",),
         ((0, EXTRA, "239.2.9.1", 6000, 15, 0),), "239.1.1.9"),
    Case("ttl", "in0:239.1.1.10:5000", ("out0:239.2.10.1:6000,ttl=99", "out1:239.2.10.1:6000"),
         ((0, own(0), "239.2.10.1", 6000, 99, 46), (1, own(1), "239.2.10.1", 6000, 15, 46)), "239.1.1.10",
         dscp=46),
    Case("dscp", "in0:239.1.1.11:5000", ("out0:239.2.11.1:6000,dscp=10", "out1:239.2.11.1:6000,dscp=0"),
         ((0, own(0), "239.2.11.1", 6000, 15, 10), (1, own(1), "239.2.11.1", 6000, 15, 0)), "239.1.1.11", dscp=46),
    Case("six", "in0:[ff3e::1]:5000", ("out0:[ff3e::2]:6000", "out1:[fd00:1:1::2]:6001,ttl=7,dscp=10"),
         ((0, "fd00:1::1", "ff3e::2", 6000, 15, 46), (1, "fd00:1:1::1", "fd00:1:1::2", 6001, 7, 10)), "ff3e::1",
         SOURCE_6, dscp=46),
    Case("six-kept", "in0:[ff3e:4::/64]:5000", ("out0:*:6000,source=keep",),
         ((0, SOURCE_6, "ff3e:4::4", 6000, 15, 0),), "ff3e:4::4", SOURCE_6),
    Case("six-exit", f"in0:[{RELAY_IN_6}]:5000", ("out0:[ff3e::7]:6000",),
         ((0, "fd00:1::1", "ff3e::7", 6000, 15, 0),), RELAY_IN_6, SOURCE_6),
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A star with the relay in it."""

    star: Star
    relay: Relay
    kernel: fast.Kernel
    offload: bool


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "offload"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Eight outputs; a relay with the rules of all cases."""
    fast.require()
    with Lab() as lab:
        star = lab.star(outputs=8, offload=request.param)
        star.relay.ip(f"addr add {EXTRA}/24 dev out0", "route add 10.50.0.0/24 via 10.1.0.2")
        config = "".join(case.rule for case in CASES)
        with Relay(star.relay, config) as relay, fast.kernel_of(relay) as kernel:
            for case in CASES:
                relay.await_rule(case.name, "up")
            yield Place(star, relay, kernel, request.param)


def warm(relay: Relay, send: Callable[[bytes], None], **wanted: object) -> None:
    """Send until the flow is the kernel's."""

    def sent() -> bool:
        send(b"warm")
        found = [f for f in relay.flows() if all(f[name] == value for name, value in wanted.items())]
        return bool(found) and found[0]["engine"] == "ebpf"

    eventually(sent, f"{wanted} is carried by the kernel: {relay.flows()}")


def fields(packet: Packet) -> tuple[str, str, int, int, int]:
    """What a case says of a packet."""
    return packet.source, packet.destination, packet.dport, packet.ttl, packet.dscp


def assert_leaves(got: list[Packet], sent: list[bytes], expected: list[tuple[str, str, int, int, int]]) -> None:
    """Each of `expected` had all that was sent, in order, with good checksums, and nothing else came."""
    assert {fields(packet) for packet in got} == set(expected)
    for each in expected:
        assert [packet.payload for packet in got if fields(packet) == each] == sent
    assert all(packet.header_good and packet.checksum_good is not False for packet in got)
    assert len({packet.sport for packet in got}) == len(expected), "each output's socket has its own port"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_forwards(place: Place, case: Case) -> None:
    """By every rule, what leaves is what the rule says, and no ring is touched."""
    star, relay, kernel = place.star, place.relay, place.kernel
    sent = [b"", b"1", b"odd", *payloads(COUNT, 200), *payloads(2, 1452)]
    interfaces = sorted({leave[0] for leave in case.leaves})
    with ExitStack() as stack:
        wires = {i: stack.enter_context(Capture(star.sink, f"k{i}")) for i in interfaces}
        sender = stack.enter_context(Sender(star.source, case.source, ttl=TTL, dscp=case.dscp))
        warm(relay, lambda payload: sender.send(case.group, 5000, [payload]), group=case.group)
        before = fast.flow(relay, group=case.group)
        sender.send(case.group, 5000, [b"begin"])
        each = {i: [leave[1:] for leave in case.leaves if leave[0] == i] for i in interfaces}
        for i, wire in wires.items():
            for _ in each[i]:
                wire.until(b"begin")
        accepted, carried = kernel.accepted(), kernel.carried()
        sender.send(case.group, 5000, sent)
        for i, wire in wires.items():
            assert_leaves(wire.wait(len(sent) * len(each[i])), sent, each[i])
            if not any(leave[2].startswith("2") or leave[2].startswith("ff") for leave in case.leaves):
                macs = {star.sink.mac(f"k{i}")}
                assert {packet.destination_mac for packet in wire.arrived()} <= macs
        assert (kernel.accepted(), kernel.carried()) == (accepted, carried + len(sent)), "no ring let one in"
    after = relay_flow_of(relay, case.group, before["packets"] + 1 + len(sent))
    assert (after["engine"], after["why"]) == ("ebpf", "")
    counted = next(r for r in relay.stats()["rules"] if r["name"] == case.name)
    assert {(output["packets"], output["errors"]) for output in counted["outputs"]} == {(after["packets"], 0)}
    assert {output["bytes"] for output in counted["outputs"]} == {after["bytes"]}


def relay_flow_of(relay: Relay, group: str, packets: int) -> dict[str, object]:
    """The flow, once it counts so many."""
    return eventually(
        lambda: next((f for f in relay.flows() if (f["group"], f["packets"]) == (group, packets)), {}),
        f"{group} counts {packets}: {relay.flows()}",
    )


def test_link_layer_addresses(place: Place) -> None:
    """Of a group, of a host, of a gateway."""
    star, relay = place.star, place.relay
    expected = {
        "239.1.1.1": (0, multicast_mac("239.1.1.1")), "239.1.1.5": (1, star.sink.mac("k1")),
        "239.1.1.6": (0, star.sink.mac("k0")),
    }  # fmt: skip
    with Sender(star.source, ttl=TTL) as sender:
        for group, (i, mac) in expected.items():
            with Capture(star.sink, f"k{i}") as wire:
                warm(relay, lambda payload, group=group: sender.send(group, 5000, [payload]), group=group)  # type: ignore[misc]
                sender.send(group, 5000, [b"look"])
                found = wire.until(b"look")[-1]
                assert (found.destination_mac, found.source_mac) == (mac, star.relay.mac(f"out{i}"))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("fan-out", "six", "ttl")], ids=lambda c: c.name)
@pytest.mark.parametrize("burst", ["segmented-by-source", "merged-by-gro", "whole-checksums"])
def test_bursts(place: Place, case: Case, burst: str) -> None:
    """A UDP_SEGMENT sender's burst, which comes merged, or is merged on the way in: one frame, all datagrams."""
    star, relay, kernel = place.star, place.relay, place.kernel
    star.source.run("ethtool", "-K", "s0", "tx", "on", "tx-udp-segmentation", "on")
    if burst == "merged-by-gro":
        star.source.run("ethtool", "-K", "s0", "tx-udp-segmentation", "off")
    if burst == "whole-checksums":
        star.source.run("ethtool", "-K", "s0", "tx", "off")
    sent = [*payloads(40, 1200), b"the short last one"]
    with ExitStack() as stack:
        wires = [
            stack.enter_context(Receiver(star.sink, f"k{leave[0]}", leave[3], leave[2], v6=":" in leave[2]))
            if leave[2].startswith(("2", "ff"))
            else stack.enter_context(Receiver(star.sink, f"k{leave[0]}", leave[3], v6=":" in leave[2]))
            for leave in case.leaves
        ]
        sender = stack.enter_context(Sender(star.source, case.source, ttl=TTL, dscp=case.dscp))
        warm(relay, lambda payload: sender.send(case.group, 5000, [payload]), group=case.group)
        accepted, carried = kernel.accepted(), kernel.carried()
        for _ in range(3):
            sender.send_segmented(case.group, 5000, sent)
        for wire in wires:
            got = wire.receive(1)
            while got[-1] == b"warm":
                got = wire.receive(1)
            got += wire.receive(3 * len(sent) - 1)
            assert got == sent * 3
        assert (kernel.accepted(), kernel.carried()) == (accepted, carried + 3 * len(sent))


def test_fragmented_and_plain_datagrams_of_one_flow(place: Place) -> None:
    """The slow path has the large ones; the plain ones behind them wait for it: all come, in order."""
    star, relay, kernel = place.star, place.relay, place.kernel
    group = "239.1.1.2"
    sent = [each for i in range(8) for each in (payloads(1, 60_000, first=i)[0], *payloads(5, 300, first=8 * i))]
    with Receiver(star.sink, "k1", 6000, "239.2.2.1") as application, Sender(star.source, ttl=TTL) as sender:
        warm(relay, lambda payload: sender.send(group, 5000, [payload]), group=group)
        accepted, shape = kernel.accepted(), kernel.passed()["shape"]
        sender.send(group, 5000, [b"begin", *sent])
        while application.receive(1) != [b"begin"]:
            continue
        assert application.receive(len(sent)) == sent
        assert kernel.passed()["shape"] > shape
        assert kernel.accepted() >= accepted + 8
    warm_again = lambda payload: sender.send(group, 5000, [payload])  # noqa: E731
    with Sender(star.source, ttl=TTL) as sender:
        warm(relay, warm_again, group=group)


def test_what_other_sources_send_is_a_flow_of_its_own(place: Place) -> None:
    """A flow is exact: another source is a miss, and then the kernel's too; an unwanted source stays out."""
    star, relay = place.star, place.relay
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, ttl=TTL) as first,
        Sender(star.source, SOURCE_2, ttl=TTL) as second,
    ):
        for sender, source in ((first, SOURCE), (second, SOURCE_2)):
            warm(relay, lambda p, s=sender: s.send("239.1.1.1", 5000, [p]), group="239.1.1.1", source=source)  # type: ignore[misc]
        second.send("232.1.1.1", 5000, [b"unwanted"])
        second.send("239.1.1.1", 5000, [b"last"])
        assert b"unwanted" not in [packet.payload for packet in wire.until(b"last")]
