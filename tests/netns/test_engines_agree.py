"""One corpus of rules and frames through all engines and a reference in plain Python: the same comes out.

Hypothesis makes rules and frames. Relays, one an engine, get the same rules and frames, again and again, so that
tc carries what it can from the second time on, and XDP, where it is asked for, what came single often enough. What
leaves is compared with what RuleSet and the strict parser say, the counters with each other.
"""

import itertools
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mrelay.ebpf.layout import SINGLE
from mrelay.messages import PutRule, RuleOutput
from mrelay.model.ruleset import FlowKey, RuleSet
from mrelay.worker.parse import Datagram, parse
from netns import fast, frames
from netns.driver import XDP, require, xdp_star
from netns.frames import Packet
from netns.lab import RELAY_IN, RELAY_IN_6, Lab, Star, eventually
from netns.relay import Relay
from netns.traffic import Capture, send_frames

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]
EXAMPLES: Final = 12
ROUNDS: Final = SINGLE + 4  # in which the corpus is sent
MTU: Final = 3300  # what XDP has room for
ETHERNET: Final = 14
OUT_ADDRESSES: Final = {0: ("10.1.0.1", "fd00:1::1"), 1: ("10.1.1.1", "fd00:1:1::1")}

# ---- rules ----


class Output(NamedTuple):
    """What a rule says of an output, and what it means."""

    text: str
    oif: int
    address: str | None
    port: int | None
    ttl: int = 0
    dscp: int = -1
    keep: bool = False


OUTPUTS: Final = (
    Output("out0:239.2.2.1:6000", 0, "239.2.2.1", 6000),
    Output("out1:239.2.2.2:6001,ttl=9", 1, "239.2.2.2", 6001, ttl=9),
    Output("out1:10.1.1.2:6002,dscp=10", 1, "10.1.1.2", 6002, dscp=10),
    Output("out0:239.2.2.3:6003,source=keep", 0, "239.2.2.3", 6003, keep=True),
    Output("out0:[ff3e::21]:6004", 0, "ff3e::21", 6004),
    Output("out1:[fd00:1:1::2]:6005,ttl=3,dscp=46", 1, "fd00:1:1::2", 6005, ttl=3, dscp=46),
)
KEPT: Final = Output("out1:*:*", 1, None, None)
SIX: Final = {OUTPUTS[4], OUTPUTS[5]}


class Input(NamedTuple):
    """What a rule takes: text, family, addresses, ports, and source (None: any)."""

    text: str
    family: int
    low: str
    high: str
    ports: tuple[int, int] = (5000, 5000)
    source: str | None = None


INPUTS: Final = (
    Input("in0:239.1.1.1:5000", 4, "239.1.1.1", "239.1.1.1"),
    Input("in0:239.1.1.0/30:5000-5001", 4, "239.1.1.0", "239.1.1.3", (5000, 5001)),
    Input("in0:10.99.9.1@232.1.1.1:5000", 4, "232.1.1.1", "232.1.1.1", source="10.99.9.1"),
    Input(f"in0:{RELAY_IN}:5000", 4, RELAY_IN, RELAY_IN),
    Input("in0:[ff3e::1]:5000", 6, "ff3e::1", "ff3e::1"),
    Input("in0:[ff3e:1::/64]:5001", 6, "ff3e:1::", "ff3e:1::ffff:ffff:ffff:ffff", (5001, 5001)),
    Input(f"in0:[{RELAY_IN_6}]:5000", 6, RELAY_IN_6, RELAY_IN_6),
)


@st.composite
def rules(draw: st.DrawFn) -> list[tuple[Input, tuple[Output, ...]]]:
    """One to four, of different inputs."""
    inputs = draw(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=4, unique=True))
    return [(origin, draw(outputs_of(origin))) for origin in inputs]


def outputs_of(origin: Input) -> st.SearchStrategy[tuple[Output, ...]]:
    """Some outputs; source=keep and `*` only where they make sense."""
    multicast = origin.text not in (INPUTS[3].text, INPUTS[6].text)
    fitting = [o for o in OUTPUTS if not o.keep or origin.family == 4] + [KEPT] * multicast
    own = [o for o in fitting if (o in SIX) == (origin.family == 6) or o is KEPT]  # what the kernel can carry

    def some(of: list[Output]) -> st.SearchStrategy[tuple[Output, ...]]:
        return st.lists(st.sampled_from(of), min_size=1, max_size=4, unique=True).map(tuple)

    return st.one_of(some(own), some(own), some(fitting))


# ---- frames ----


@dataclass(frozen=True)
class Frame:
    """An IP packet and where it goes; `fragments`: it is sent as these, one after the other."""

    packet: bytes
    group: str
    bare: bool = False  # IPv4 without a UDP checksum
    fragments: tuple[bytes, ...] = field(default=())

    def sent(self, own: bytes) -> list[bytes]:
        """As Ethernet frames; `own` is the relay's address on the wire."""
        to = own if self.group in (RELAY_IN, RELAY_IN_6) else frames.multicast_mac(self.group)
        kind = frames.ETH_P_IPV6 if ":" in self.group else frames.ETH_P_IP
        packets = [numbered(each, ident) for ident in (next(_idents),) for each in self.fragments] or [self.packet]
        return [frames.ethernet(to, packet, ethertype=kind) for packet in packets]


_idents = itertools.count(100)


def numbered(fragment: bytes, ident: int) -> bytes:
    """With another identification: two rings' fanout groups put fragments together in one place, so what one of
    them left there would complete what the next datagram of that number begins (see test_receive)."""
    head = fragment[:4] + struct.pack("!H", ident & 0xFFFF) + fragment[6:10] + bytes(2) + fragment[12:20]
    return head[:10] + struct.pack("!H", frames.checksum(head)) + head[12:] + fragment[20:]


PAYLOADS: Final = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"x" * 1000, b"y" * 1472, b"z" * 1452]), st.just(b"same size")
)
TTLS: Final = st.sampled_from([16, 16, 64, 2, 1, 0, 255])
TOS: Final = st.sampled_from([0, 0, 0xB8, 0xB9, 0x03])


@st.composite
def frames4(draw: st.DrawFn) -> Frame:
    """IPv4, whole or odd."""
    source = draw(st.sampled_from(["10.99.9.1", "10.99.9.2"]))
    group = draw(st.sampled_from(["239.1.1.1", "239.1.1.1", "239.1.1.2", "239.1.1.9", "232.1.1.1", RELAY_IN]))
    port, ttl, tos = draw(st.sampled_from([5000, 5000, 5001, 4999])), draw(TTLS), draw(TOS)
    kind = draw(
        st.sampled_from(["plain"] * 8 + ["bare", "options", "fragments", "lone", "short", "sum", "cut", "tcp"])
    )
    payload = draw(PAYLOADS)
    if kind == "fragments":  # of a datagram that is longer than a short ring's: see test_receive
        payload = (payload + b"f" * 3000)[:3000]
    datagram = bytearray(frames.udp(source, group, 4000, port, payload))
    if kind == "bare":
        datagram[6:8] = bytes(2)
    if kind == "short" and len(payload) > 2:  # UDP says that it ends before IP does
        datagram = bytearray(frames.udp(source, group, 4000, port, payload[:-2])) + payload[-2:]
    options = frames.ROUTER_ALERT if kind == "options" else b""
    packet = frames.ipv4(
        source, group, bytes(datagram), ttl=ttl, tos=tos, options=options, protocol=6 if kind == "tcp" else 17
    )
    if kind == "fragments":
        return Frame(packet, group, fragments=halves(source, group, bytes(datagram), ttl, tos))
    if kind == "lone":
        return Frame(b"", group, fragments=(frames.ipv4(source, group, bytes(16), fragment=frames.IP_MF),))
    if kind == "sum":
        packet = packet[:10] + struct.pack("!H", struct.unpack("!H", packet[10:12])[0] ^ 1) + packet[12:]
    if kind == "cut":
        packet = packet[: max(20, len(packet) - 3)]
    return Frame(packet, group, bare=kind == "bare")


def halves(source: str, group: str, datagram: bytes, ttl: int, tos: int) -> tuple[bytes, ...]:
    """Two fragments of one datagram."""
    cut = len(datagram) // 16 * 8
    if not cut:
        return (frames.ipv4(source, group, datagram, ttl=ttl, tos=tos),)
    return tuple(
        frames.ipv4(source, group, piece, ttl=ttl, tos=tos, fragment=flags)
        for piece, flags in ((datagram[:cut], frames.IP_MF), (datagram[cut:], cut // 8))
    )


@st.composite
def frames6(draw: st.DrawFn) -> Frame:
    """IPv6, whole or odd."""
    group = draw(st.sampled_from(["ff3e::1", "ff3e::1", "ff3e::2", "ff3e:1::5", RELAY_IN_6]))
    port, ttl, tos = draw(st.sampled_from([5000, 5000, 5001])), draw(TTLS), draw(TOS)
    kind = draw(st.sampled_from(["plain"] * 6 + ["options", "fragment", "cut", "tcp"]))
    datagram = frames.udp("fd99::1", group, 4000, port, draw(PAYLOADS)[:1452])
    following, head = {
        "options": (0, bytes((17, 0, 1, 4, 0, 0, 0, 0))), "fragment": (44, bytes((17, 0, 0, 1, 0, 0, 0, 5))),
        "tcp": (6, b""),
    }.get(kind, (17, b""))  # fmt: skip
    packet = frames.ipv6("fd99::1", group, head + datagram, next_header=following, hops=ttl, tos=tos)
    return Frame(packet[: len(packet) - 3] if kind == "cut" else packet, group)


CORPUS: Final = st.lists(st.one_of(frames4(), frames6()), min_size=10, max_size=50)


# ---- the reference ----


class Delivery(NamedTuple):
    """A datagram as it leaves."""

    oif: int
    source: str
    destination: str
    dport: int
    ttl: int
    tos: int
    payload: bytes


@dataclass
class Reference:
    """What should become of frames under these rules.

    `unordered`: flows with frames that have options or extension headers, which the rings do not number: the
    kernel may overtake those.
    """

    rules: RuleSet
    unordered: set[FlowKey] = field(default_factory=set)

    def run(self, sent: list[Frame]) -> tuple[list[tuple[FlowKey, Delivery]], int]:
        """What leaves, in order of arrival, and how many datagrams are received."""
        found: list[tuple[FlowKey, Delivery]] = []
        received = 0
        for frame in sent:
            family = 6 if ":" in frame.group else 4
            if not frame.packet or not self.rules.names(1, family, int(ip_address(frame.group))):
                continue
            received += 1
            datagram = parse(memoryview(frame.packet), 0, len(frame.packet))
            if isinstance(datagram, Datagram):
                found += self._leaves(frame.packet, datagram)
        return found, received

    def _leaves(self, packet: bytes, datagram: Datagram) -> Iterator[tuple[FlowKey, Delivery]]:
        key = FlowKey(1, 0, datagram.family, datagram.source, datagram.group, datagram.port)
        if datagram.start != (28 if datagram.family == 4 else 48):
            self.unordered.add(key)
        payload = packet[datagram.start : datagram.start + datagram.length]
        for to in self.rules.resolve(key).destinations:
            ttl = to.ttl or (datagram.hop >> 8) - 1
            tos = datagram.hop & 255 if to.dscp < 0 else to.dscp << 2 | datagram.hop & 3
            own = OUT_ADDRESSES[to.oif][to.family == 6]
            kept = str(ip_address(datagram.source.to_bytes(4 if key.family == 4 else 16)))
            if ttl > 0:
                yield key, Delivery(to.oif, kept if to.keep else own, to.address, to.port, ttl, tos, payload)


def reference(chosen: list[tuple[Input, tuple[Output, ...]]]) -> Reference:
    """For these rules, on an interface 1."""
    made = RuleSet()
    for slot, (origin, outputs) in enumerate(chosen):
        top = 2 ** (32 if origin.family == 4 else 128) - 1
        exact = origin.source and int(ip_address(origin.source))
        source = (exact, exact) if exact else (0, top)
        compiled = tuple(
            RuleOutput(10 * slot + i, i, to.oif, to.address, to.port, to.ttl, to.dscp, to.keep)
            for i, to in enumerate(outputs)
        )
        addresses = int(ip_address(origin.low)), int(ip_address(origin.high))
        (low, high), (first, last) = addresses, origin.ports
        put = PutRule(slot, 1, 0, origin.family, low, high, first, last, source[0], source[1], 0, 0, (), compiled)
        made.put(put)
    return Reference(made)


# ---- the engines ----


class Engine:
    """A star with a relay of one engine: uring, ebpf (tc alone) or xdp."""

    def __init__(self, lab: Lab, stack: ExitStack, name: str) -> None:
        self.name = name
        self.star: Star = xdp_star(lab, 2, mtu=MTU)
        self.star.relay.ip(
            f"neigh replace 10.1.1.2 lladdr {self.star.sink.mac('k1').hex(':')} dev out1",
            f"neigh replace fd00:1:1::2 lladdr {self.star.sink.mac('k1').hex(':')} dev out1",
        )
        config = XDP if name == "xdp" else f'[relay]\nengine = "{name}"\n'
        self.relay = stack.enter_context(Relay(self.star.relay, config))
        self.kernel = stack.enter_context(fast.kernel_of(self.relay)) if name != "uring" else None
        self.wires = [stack.enter_context(Capture(self.star.sink, f"k{i}")) for i in range(2)]
        self.own = self.star.relay.mac("in0")

    def set_rules(self, tables: list[dict[str, object]]) -> dict[str, Any]:
        """Exactly these; the counters that they start from."""
        status, body = self.relay.request("PUT", "/v1/rules", {"rules": []})
        assert status == 200, body
        status, body = self.relay.request("PUT", "/v1/rules", {"rules": tables})
        assert status == 200, body
        eventually(lambda: {r["state"] for r in self.relay.rules().values()} == {"up"}, "the rules are up")
        return self.relay.stats()

    def send(self, sent: list[Frame], received: int) -> None:
        """All of it, once; returns when it is counted and nothing is on its way any more."""
        send_frames(self.star.source, "s0", [each for frame in sent for each in frame.sent(self.own)])
        eventually(
            lambda: self.relay.stats()["received"] >= received, f"{received} received: {self.relay.stats()}"
        )
        if self.kernel is not None:
            progress = self.kernel.maps.progress
            eventually(
                lambda: not np.any(progress[:, 0] != progress[:, 8]), "the slow path has sent what it holds"
            )

    def deliveries(self, count: list[int]) -> list[tuple[int, Packet]]:
        """What left, by output interface: as many as should, and whatever else."""
        found: list[tuple[int, Packet]] = []
        for oif, wire in enumerate(self.wires):
            got = wire.wait(count[oif]) if count[oif] else []
            found += [(oif, packet) for packet in [*got, *wire.arrived()]]
        return found


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    """All of them."""
    fast.require()
    require()
    with ExitStack() as stack:
        yield [Engine(stack.enter_context(Lab()), stack, name) for name in ("uring", "ebpf", "xdp")]


def delivery(oif: int, packet: Packet) -> Delivery:
    """As the reference has it."""
    tos = packet.dscp << 2 | packet.ecn
    return Delivery(oif, packet.source, packet.destination, packet.dport, packet.ttl, tos, packet.payload)


def counters(before: dict[str, Any], after: dict[str, Any]) -> dict[object, Any]:
    """What was counted in between."""
    found: dict[object, Any] = {name: after[name] - before[name] for name in ("received", "matched")}
    found |= {name: after["drops"][name] - before["drops"][name] for name in after["drops"]}
    for old, new in zip(before["rules"], after["rules"], strict=True):
        found[new["name"]] = new["packets"] - old["packets"], new["bytes"] - old["bytes"]
        for was, now in zip(old["outputs"], new["outputs"], strict=True):
            found[new["name"], now["to"]] = [now[key] - was[key] for key in ("packets", "bytes", "errors")]
    return found


def place(each: Delivery) -> tuple[int, str, int]:
    """An output."""
    return each.oif, each.destination, each.dport


def test_all_engines_and_the_reference_agree(engines: list[Engine]) -> None:
    """Deliveries, their order within a flow, and counters."""
    carried: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck)
    )
    @given(rules(), CORPUS)
    def agree(chosen: list[tuple[Input, tuple[Output, ...]]], corpus: list[Frame]) -> None:
        tables: list[dict[str, object]] = [
            {"name": f"r{i}", "from": origin.text, "to": [to.text for to in outputs]}
            for i, (origin, outputs) in enumerate(chosen)
        ]
        told = reference(chosen)
        once, received = told.run(corpus)
        expected = [each for _, each in once]
        count = [ROUNDS * sum(each.oif == oif for each in expected) for oif in range(2)]
        counted = []
        for engine in engines:
            before = engine.set_rules(tables)
            for again in range(ROUNDS):
                engine.send(corpus, before["received"] + (again + 1) * received)
            got = engine.deliveries(count)
            found, wanted = Counter(delivery(*each) for each in got), Counter(expected * ROUNDS)
            assert short(found - wanted) == short(wanted - found) == [], engine.relay.namespace
            assert_sound(got, corpus)
            assert_ordered([delivery(*each) for each in got], once, told.unordered)
            counted.append(counters(before, engine.relay.stats()))
            carried.update(flow["engine"] for flow in engine.relay.flows())
        assert counted[0] == counted[1] == counted[2]
        assert counted[0]["received"] == ROUNDS * received

    agree()
    assert carried["ebpf"] > 0 < carried["xdp"], f"tc and XDP had their share: {carried}"


def short(found: Counter[Delivery]) -> list[str]:
    """For an assertion's message."""
    return [
        f"{count} × {each._replace(payload=each.payload[:8])}, {len(each.payload)}"
        for each, count in found.items()
    ]


def assert_sound(got: list[tuple[int, Packet]], corpus: list[Frame]) -> None:
    """Checksums are right; those of datagrams that came without may be missing."""
    bare = {frame.packet[28:] for frame in corpus if frame.bare}
    for _, packet in got:
        assert packet.header_good
        assert packet.checksum_good or packet.payload in bare, packet


def assert_ordered(got: list[Delivery], once: list[tuple[FlowKey, Delivery]], unordered: set[FlowKey]) -> None:
    """At each output, each flow's datagrams came in the order in which they were sent, where that shows."""
    flows: dict[Delivery, set[FlowKey]] = defaultdict(set)
    for key, each in once:
        flows[each].add(key)
    sent, came = defaultdict(list), defaultdict(list)
    for each in [each for _, each in once] * ROUNDS:
        sent[frozenset(flows[each]), place(each)].append(each)
    for each in got:
        came[frozenset(flows[each]), place(each)].append(each)
    for (keys, where), mine in sent.items():
        if len(keys) == 1 and not keys & unordered:
            assert came[keys, where] == mine
