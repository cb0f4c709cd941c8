"""What the kernel does not carry takes the slow path, which delivers it, and `flows` says why."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mrelay.ebpf.layout import VLAN_MARK
from netns import fast
from netns.frames import Packet, udp_frame
from netns.lab import SOURCE, SOURCE_6, Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
GROUP, OUT = "239.1.1.1", "239.2.2.2"
CONFIG = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
COUNT = 10
_serial = itertools.count()


@pytest.fixture(autouse=True)
def can_load() -> None:
    """Where there is no fast path there is nothing to say."""
    fast.require()


@contextmanager
def carrying(star: Star, config: str, engine: str = "ebpf", why: str = "") -> Iterator[tuple[Relay, Sender]]:
    """A relay whose flow to GROUP is carried by this engine for this reason, and the flow's sender."""
    with Sender(star.source) as sender, Relay(star.relay, config) as relay:
        carried(relay, sender, engine, why)
        yield relay, sender


def carried(relay: Relay, sender: Sender, engine: str = "ebpf", why: str = "", group: str = GROUP) -> None:
    """Send until the flow is listed with this engine and reason."""

    def listed() -> bool:
        sender.send(group, 5000, [b"warm"])
        flows = [f for f in relay.flows() if f["group"] == group and f["interface"] == "in0"]
        return [(f["engine"], f["why"]) for f in flows] == [(engine, why)]

    try:
        eventually(listed, f"{engine} {why!r}")
    except AssertionError as error:
        error.add_note(f"flows: {relay.flows()}")
        raise


def delivers(sender: Sender, wire: Capture, question: Callable[[Packet], bool] = lambda _: True) -> None:
    """What is sent arrives: in order, whole, with good checksums, and as it should be."""
    sent = payloads(COUNT, first=COUNT * next(_serial))
    sender.send(GROUP, 5000, sent)
    got = [packet for packet in wire.until(sent[-1]) if packet.payload in sent]
    assert [packet.payload for packet in got] == sent
    assert all(question(packet) and packet.header_good and packet.checksum_good for packet in got)


# ---- by the rule ----


def test_rules_of_which_some_have_a_rate(lab: Lab) -> None:
    """The kernel keeps the rate of a flow's only rule; where outputs differ in what they get, a worker decides."""
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", rate="100000pps")
    with Capture(star.sink, "k0") as wire, carrying(star, config) as (relay, sender):
        delivers(sender, wire)
        relay.add_rule("b", f"in0:{GROUP}:5000", f"out0:{OUT}:6002")
        carried(relay, sender, "uring", "of several rules, some have a rate")
        relay.remove_rule("a")
        carried(relay, sender)


def test_an_output_of_the_other_family(lab: Lab) -> None:
    """One such output, and the whole flow stays on the slow path."""
    star = lab.star(outputs=2)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", "out1:[fd00:1:1::2]:6000")
    why = "an output is IPv6, the stream IPv4"
    with (
        Capture(star.sink, "k0") as four,
        Receiver(star.sink, "k1", 6000, v6=True) as six,
        carrying(star, config, "uring", why) as (_, sender),
    ):
        delivers(sender, four)
        sent = payloads(COUNT, 300)
        sender.send(GROUP, 5000, sent)
        got: list[bytes] = []
        while got[-1:] != sent[-1:]:
            got += six.receive(1)
        assert [payload for payload in got if payload in sent] == sent


# ---- by the frame ----


def test_a_ttl_that_runs_out(lab: Lab) -> None:
    """Dropped and counted by the slow path; the flow's next one is the kernel's again."""
    star = lab.star()
    with Capture(star.sink, "k0") as wire, carrying(star, CONFIG) as (relay, sender):
        with Sender(star.source, ttl=1) as short:
            short.send(GROUP, 5000, payloads(3))
        relay.await_drops("ttl_expired", 3)
        fast.await_engine(relay, "uring", "TTL ran out", group=GROUP)
        delivers(sender, wire)
        carried(relay, sender)
        relay.await_drops("ttl_expired", 3)


def test_a_ttl_that_a_rule_sets_can_not_run_out(lab: Lab) -> None:
    """TTL 1 comes in, 9 goes out."""
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000,ttl=9")
    with (
        Capture(star.sink, "k0") as wire,
        carrying(star, config) as (relay, _),
        Sender(star.source, ttl=1) as short,
    ):
        carried(relay, short)
        delivers(short, wire)


@pytest.mark.parametrize("burst", [False, True], ids=["single", "merged"])
def test_longer_than_an_outputs_mtu(lab: Lab, burst: bool) -> None:
    """Leaves as fragments; short ones of the flow are the kernel's."""
    star = lab.star(mtu=9000)
    star.relay.ip("link set out0 mtu 1500")
    sent = payloads(5, 4000)
    with Receiver(star.sink, "k0", 6000, OUT) as application, carrying(star, CONFIG) as (relay, sender):
        (sender.send_segmented if burst else sender.send)(GROUP, 5000, sent)
        while (got := application.receive(1)) == [b"warm"]:
            continue
        assert got + application.receive(len(sent) - 1) == sent
        fast.await_engine(relay, "uring", "longer than an output's MTU", group=GROUP)
        carried(relay, sender)


def test_the_largest_that_fits(lab: Lab) -> None:
    """One byte more is too much."""
    star = lab.star(mtu=9000)
    star.relay.ip("link set out0 mtu 1500")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as application,
        carrying(star, CONFIG) as (relay, sender),
        fast.kernel_of(relay) as kernel,
    ):
        for size, passed in ((1472, 0), (1473, 1)):
            before = kernel.passed()["too_big"]
            sender.send(GROUP, 5000, payloads(1, size))
            while (got := application.receive(1)) == [b"warm"]:
                continue
            assert got == payloads(1, size)
            assert kernel.passed()["too_big"] == before + passed


# ---- by the host ----


@pytest.mark.parametrize("bound", ["", GROUP], ids=["any", "group"])
def test_a_listener_on_the_relay_host(lab: Lab, bound: str) -> None:
    """It keeps getting everything, and the outputs too; when it ends, the kernel takes over."""
    star = lab.star()
    star.relay.sysctl("ipv4/conf/all/rp_filter", 0)
    star.relay.sysctl("ipv4/conf/in0/rp_filter", 0)
    with Capture(star.sink, "k0") as wire, carrying(star, CONFIG) as (relay, sender):
        with Receiver(star.relay, "in0", 5000, GROUP) as listener:
            carried(relay, sender, "uring", "a program on this host listens to it")
            sent = payloads(50)
            sender.send(GROUP, 5000, sent)
            got: list[bytes] = []
            while got[-1:] != sent[-1:]:
                got += [payload for payload in listener.receive(1) if payload != b"warm"]
            assert got == sent
            got = [packet.payload for packet in wire.until(sent[-1]) if packet.payload != b"warm"]
            assert got == sent
        carried(relay, sender)
        with fast.kernel_of(relay) as kernel:
            accepted = kernel.accepted()
            delivers(sender, wire)
            assert kernel.accepted() == accepted


def test_a_listener_to_another_group_at_that_port(lab: Lab) -> None:
    """It may cost the fast path, never the listener's datagrams or the outputs'."""
    star = lab.star()
    with (
        Capture(star.sink, "k0") as wire,
        carrying(star, CONFIG) as (_, sender),
        Receiver(star.relay, "out0", 5000, "239.9.9.9"),
    ):
        delivers(sender, wire)


def test_a_port_of_a_bridge(lab: Lab) -> None:
    """The bridge takes the frames before the rings behind the fast path would; and back."""
    star = lab.star()
    why = "no fast path at its interface: no Ethernet, in a bridge or bond, or VLANs on top of it"
    try:
        star.relay.ip("link add br0 type bridge", "link set br0 up")
    except AssertionError:
        pytest.skip("the kernel has no bridges (CONFIG_BRIDGE)")
    with Capture(star.sink, "k0") as wire, carrying(star, CONFIG) as (relay, sender):
        star.relay.ip("link set in0 master br0")
        carried(relay, sender, "uring", why)
        delivers(sender, wire)
        star.relay.ip("link set in0 nomaster")
        carried(relay, sender)
        delivers(sender, wire)


@pytest.mark.parametrize(
    ("source", "group", "out"), [(SOURCE, GROUP, OUT), (SOURCE_6, "ff3e::1", "ff3e::2")], ids=["v4", "v6"]
)
def test_tagged_frames(lab: Lab, source: str, group: str, out: str) -> None:
    """Each VLAN's go their way, by the slow path first and then by the kernel; those of a third nowhere."""
    star = lab.star(outputs=2)
    bracketed = f"[{group}]" if ":" in group else group, f"[{out}]" if ":" in out else out
    config = rule("plain", f"in0:{bracketed[0]}:5000", f"out0:{bracketed[1]}:6000")
    config += rule("twenty", f"in0:{bracketed[0]}:5000,vlan=20", f"out1:{bracketed[1]}:6000")
    ways: tuple[tuple[int | None, str], ...] = (None, "k0"), (20, "k1")
    with Relay(star.relay, config) as relay, Capture(star.sink, "k0") as k0, Capture(star.sink, "k1") as k1:
        wires = {"k0": k0, "k1": k1}
        for turn in range(100):
            told = [b"%d %s" % (turn, wire.encode()) for _, wire in ways]
            foreign = udp_frame(source, group, 5000, b"foreign", vlan=30)
            send_frames(star.source, "s0", [foreign])
            for (vlan, wire), payload in zip(ways, told, strict=True):
                send_frames(star.source, "s0", [udp_frame(source, group, 5000, payload, vlan=vlan)])
                arrived = wires[wire].until(payload)
                assert {packet.payload for packet in arrived} == {payload}
                assert all(packet.vlan is None and packet.checksum_good for packet in arrived)
            if {(f["vlan"], f["engine"]) for f in relay.flows()} >= {(None, "ebpf"), (20, "ebpf")} and turn > 3:
                break
        stats = relay.stats()
        assert {(f["vlan"], f["engine"], f["why"]) for f in relay.flows()} == {
            (None, "ebpf", ""),
            (20, "ebpf", ""),
        }
        assert stats["matched"] == 2 * (turn + 1)
        assert stats["drops"]["no_rule"] == turn + 1, "VLAN 30's"


def test_nobody_else_says_which_vlan(lab: Lab) -> None:
    """An untagged frame that is addressed as only the fast path does it is nobody's."""
    star = lab.star()
    config = rule("twenty", f"in0:{GROUP}:5000,vlan=20", f"out0:{OUT}:6000")
    spoofed = VLAN_MARK.to_bytes(4, "little") + (20).to_bytes(2, "little")
    with Relay(star.relay, config) as relay, Capture(star.sink, "k0") as wire:
        frame = udp_frame(SOURCE, GROUP, 5000, b"spoofed")
        send_frames(star.source, "s0", [spoofed + frame[6:]])
        send_frames(star.source, "s0", [udp_frame(SOURCE, GROUP, 5000, b"true", vlan=20)])
        assert [packet.payload for packet in wire.until(b"true")] == [b"true"]
        assert relay.stats()["received"] == 1


# ---- by the way there ----


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_a_neighbour_that_is_not_known(lab: Lab, six: bool) -> None:
    """Datagrams are held or lost as the kernel's own would be; once it answers, the kernel carries them."""
    star = lab.star()
    host, sent_to = ("fd00:1:0::9", "ff3e::1") if six else ("10.1.0.9", GROUP)
    address = f"[{host}]" if six else host
    config = rule("a", f"in0:[{sent_to}]:5000" if six else f"in0:{GROUP}:5000", f"out0:{address}:6000")
    with Sender(star.source, SOURCE_6 if six else SOURCE) as sender, Relay(star.relay, config) as relay:
        carried(relay, sender, "uring", "an output's next hop is not known", sent_to)
        star.sink.ip(f"addr add {host}/{64 if six else 24} dev k0")
        with Capture(star.sink, "k0") as wire:
            carried(relay, sender, group=sent_to)
            sender.send(sent_to, 5000, [b"at last"])
            found = wire.until(b"at last")[-1]
            assert (found.destination, found.destination_mac) == (str_of(host), star.sink.mac("k0"))
            assert found.checksum_good


def str_of(address: str) -> str:
    """As a capture has it."""
    return address.replace(":0::", "::")


def test_an_output_interface_goes_down_and_up(lab: Lab) -> None:
    """The other output loses nothing; this one gets what is sent while it is up."""
    star = lab.star(outputs=2)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", f"out1:{OUT}:6000")
    sent = payloads(300)
    with ExitStack() as stack:
        calm, struck = (stack.enter_context(Capture(star.sink, f"k{i}")) for i in range(2))
        relay, sender = stack.enter_context(carrying(star, config))
        sender.send(GROUP, 5000, sent[:100])
        star.relay.ip("link set out1 down")
        sender.send(GROUP, 5000, sent[100:200])
        outputs(relay, sender, "out0")
        carried(relay, sender)
        star.relay.ip("link set out1 up")
        outputs(relay, sender, "out0", "out1")
        carried(relay, sender)
        sender.send(GROUP, 5000, sent[200:])
        got = [packet.payload for packet in calm.until(sent[-1]) if packet.payload != b"warm"]
        assert got == sent
        late = [packet.payload for packet in struck.until(sent[-1]) if packet.payload != b"warm"]
        assert late[:100] == sent[:100]
        assert late[-100:] == sent[200:]
        assert not set(late) & set(sent[100:200])


def outputs(relay: Relay, sender: Sender, *names: str) -> None:
    """Send until the flow goes to these interfaces."""

    def goes() -> bool:
        sender.send(GROUP, 5000, [b"warm"])
        return [f["outputs"] for f in relay.flows()] == [[f"{name}:{OUT}:6000" for name in names]]

    eventually(goes, f"it goes to {names}")


def test_the_only_output_interface_goes_down_and_up(lab: Lab) -> None:
    """The flow goes nowhere meanwhile, and is counted so."""
    star = lab.star()
    with carrying(star, CONFIG) as (relay, sender):
        star.relay.ip("link set out0 down")
        carried(relay, sender, "uring", "it goes nowhere")
        sender.send(GROUP, 5000, [b"warm"])  # those before may have met the interface on its way down
        relay.await_stats(lambda s: s["drops"]["no_output"] > 0, "it is counted")
        star.relay.ip("link set out0 up")
        with Capture(star.sink, "k0") as wire:
            carried(relay, sender)
            delivers(sender, wire)
