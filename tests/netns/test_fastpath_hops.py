"""Next hops under a flow that the kernel carries: neighbours, routes, addresses, MTUs and links that change.

Nothing may go where it should not, and in the end the kernel carries the flow again.
"""

import struct
from collections.abc import Callable

import pytest

from netns import fast
from netns.frames import Packet
from netns.lab import Lab, Namespace, Star, eventually
from netns.relay import Relay, rule
from netns.test_fastpath_why import GROUP, OUT, can_load, carried, carrying, delivers
from netns.traffic import Capture, Receiver, Sender, payloads, send_frames

__all__ = ["can_load"]  # a fixture
pytestmark = pytest.mark.netns
HOST = "10.1.0.2"
TO_HOST = rule("a", f"in0:{GROUP}:5000", f"out0:{HOST}:6000")
BEYOND = rule("a", f"in0:{GROUP}:5000", "out0:10.50.0.9:6000")
TO_GROUP = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
MAC = "02:00:00:00:77:01"


def becomes(sender: Sender, wire: Capture, question: Callable[[Packet], bool], what: str) -> None:
    """Send until a datagram leaves as it should; from then on all do."""

    def sent() -> bool:
        sender.send(GROUP, 5000, [b"warm"])
        return any(question(packet) for packet in wire.arrived())

    eventually(sent, what)
    delivers(sender, wire, question)


def ready(relay: Relay, sender: Sender, wire: Capture, question: Callable[[Packet], bool], what: str) -> None:
    """It leaves as it should, and by the kernel."""
    becomes(sender, wire, question, what)
    carried(relay, sender)
    with fast.kernel_of(relay) as kernel:
        accepted = kernel.accepted()
        delivers(sender, wire, question)
        assert kernel.accepted() == accepted


def mac(text: str) -> bytes:
    """From its usual form."""
    return bytes.fromhex(text.replace(":", ""))


def test_a_neighbours_entry_is_replaced(lab: Lab) -> None:
    """By hand."""
    star = lab.star()
    with Capture(star.sink, "k0") as wire, carrying(star, TO_HOST) as (relay, sender):
        star.relay.ip(f"neigh replace {HOST} lladdr {MAC} dev out0 nud permanent")
        ready(relay, sender, wire, lambda p: p.destination_mac == mac(MAC), "the new address")


def test_a_receiver_is_replaced_by_another_machine(lab: Lab) -> None:
    """It says so by a gratuitous ARP, as a standby does that takes over."""
    star = lab.star()
    with Capture(star.sink, "k0") as wire, carrying(star, TO_HOST) as (relay, sender):
        star.sink.ip(f"link set k0 address {MAC}")

        def heard() -> bool:
            gratuitous_arp(star.sink, "k0", HOST)  # again: one right behind an answer is ignored
            sender.send(GROUP, 5000, [b"warm"])
            return any(packet.destination_mac == mac(MAC) for packet in wire.arrived())

        eventually(heard, "the other machine is heard")
        ready(relay, sender, wire, lambda p: p.destination_mac == mac(MAC), "the new address")
        with Receiver(star.sink, "k0", 6000) as application:
            sender.send(GROUP, 5000, [b"received"])
            while application.receive(1) != [b"received"]:
                continue


def gratuitous_arp(namespace: Namespace, interface: str, address: str) -> None:
    """A reply to everyone that nobody asked for (RFC 5227 §3)."""
    own = namespace.mac(interface)
    packed = bytes(map(int, address.split(".")))
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + own + packed + b"\xff" * 6 + packed
    send_frames(namespace, interface, [b"\xff" * 6 + own + b"\x08\x06" + arp])


def test_a_neighbour_fails(lab: Lab) -> None:
    """The kernel's send then asks for it again; when it answers, all is as before."""
    star = lab.star()
    with Capture(star.sink, "k0") as wire, carrying(star, TO_HOST) as (relay, sender):
        star.sink.ip(f"addr del {HOST}/24 dev k0")
        star.relay.ip(f"neigh del {HOST} dev out0")
        carried(relay, sender, "uring", "an output's next hop is not known")
        star.sink.ip(f"addr add {HOST}/24 dev k0")
        ready(relay, sender, wire, lambda p: p.destination_mac == star.sink.mac("k0"), "it answers again")


def test_a_route_moves_to_another_gateway(lab: Lab) -> None:
    """On the same link."""
    star = lab.star()
    star.relay.ip(
        "route add 10.50.0.0/24 via 10.1.0.2",
        f"neigh replace 10.1.0.3 lladdr {MAC} dev out0 nud permanent",
    )
    with Capture(star.sink, "k0") as wire, carrying(star, BEYOND) as (relay, sender):
        delivers(sender, wire, lambda p: p.destination_mac == star.sink.mac("k0"))
        star.relay.ip("route replace 10.50.0.0/24 via 10.1.0.3")
        ready(relay, sender, wire, lambda p: p.destination_mac == mac(MAC), "the other gateway")
        star.relay.ip("route del 10.50.0.0/24")
        star.relay.ip("route add 10.50.0.0/16 via 10.1.0.2")
        ready(relay, sender, wire, lambda p: p.destination_mac == star.sink.mac("k0"), "the first one again")


@pytest.mark.parametrize("config", [TO_GROUP, TO_HOST], ids=["group", "host"])
def test_the_egress_interface_has_another_address(lab: Lab, config: str) -> None:
    """It is the source address from then on, in both engines."""
    star = lab.star()
    star.sink.ip("addr add 10.7.0.2/24 dev k0")
    with Capture(star.sink, "k0") as wire, carrying(star, config) as (relay, sender):
        delivers(sender, wire, lambda p: p.source == "10.1.0.1")
        star.relay.ip("addr del 10.1.0.1/24 dev out0")
        star.relay.ip("addr add 10.7.0.1/24 dev out0", "route add 10.1.0.0/24 dev out0")
        ready(relay, sender, wire, lambda p: p.source == "10.7.0.1", "the new source address")


def test_the_egress_interface_has_another_mac(lab: Lab) -> None:
    """It is the frames' source from then on."""
    star = lab.star()
    with Capture(star.sink, "k0") as wire, carrying(star, TO_GROUP) as (relay, sender):
        star.relay.ip(f"link set out0 address {MAC}")
        ready(relay, sender, wire, lambda p: p.source_mac == mac(MAC), "the new source address")


@pytest.mark.parametrize("config", [TO_GROUP, TO_HOST], ids=["group", "host"])
def test_the_mtu_shrinks(lab: Lab, config: str) -> None:
    """What does not fit any more leaves as fragments, and all of it arrives."""
    star = lab.star()
    with Receiver(star.sink, "k0", 6000, OUT) as application, carrying(star, config) as (relay, sender):
        star.relay.ip("link set out0 mtu 700")
        with fast.kernel_of(relay) as kernel:
            eventually(lambda: 700 in kernel.maps.hops["mtu"], "control knows")
        sent = payloads(20, 1000)
        sender.send(GROUP, 5000, sent)
        while (got := application.receive(1)) == [b"warm"]:
            continue
        assert got + application.receive(len(sent) - 1) == sent
        fast.await_engine(relay, "uring", "longer than an output's MTU", group=GROUP)
        star.relay.ip("link set out0 mtu 1500")
        carried(relay, sender)


def test_a_route_with_an_mtu(lab: Lab) -> None:
    """Smaller than the link's."""
    star = lab.star()
    star.relay.ip("route add 10.50.0.0/24 via 10.1.0.2 mtu 700")
    with (
        Capture(star.sink, "k0") as wire,
        carrying(star, BEYOND) as (relay, sender),
        fast.kernel_of(relay) as kernel,
    ):
        before = kernel.passed()["too_big"]
        sender.send(GROUP, 5000, payloads(1, 672))
        wire.until(payloads(1, 672)[0])
        assert kernel.passed()["too_big"] == before
        sender.send(GROUP, 5000, payloads(1, 673))
        eventually(lambda: kernel.passed()["too_big"] == before + 1, "one more is too much")


def test_the_egress_interface_is_made_anew(lab: Lab) -> None:
    """Deleted, and another one of that name: with another number, and then under the same one."""
    star = lab.star(outputs=2)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", f"out1:{HOST.replace('.0.', '.1.')}:6000")
    with Capture(star.sink, "k0") as calm, carrying(star, config) as (relay, sender):
        for _ in range(2):
            star.relay.ip("link del out1")
            delivers(sender, calm)
            lab.egress_link(star, 1)
            with Capture(star.sink, "k1") as wire:
                new = star.sink.mac("k1")
                ready(relay, sender, wire, lambda p, new=new: p.destination_mac == new, "the new one")  # type: ignore[misc]
                delivers(sender, calm, lambda p: p.destination == OUT)


def test_the_ingress_interface_is_made_anew(lab: Lab) -> None:
    """The program is at the new one's ingress."""
    star = lab.star()
    with carrying(star, TO_GROUP) as (relay, _), Capture(star.sink, "k0") as wire:
        star.relay.ip("link del in0")
        relay.await_rule("a", "waiting")
        lab.source_link(star.source, star.relay)
        relay.await_rule("a", "up")
        with Sender(star.source) as sender:
            ready(relay, sender, wire, lambda p: p.destination == OUT, "forwarding goes on")


def test_a_number_that_another_interface_has_now(lab: Lab) -> None:
    """out1 goes, and its index comes back as another link: once that is known, nothing leaves by it."""
    star = lab.star(outputs=2)
    other = lab.namespace("other")
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", f"out1:{OUT}:6000")
    index = int(star.relay.links()["out1"]["ifindex"])
    with Capture(star.sink, "k0") as calm, carrying(star, config) as (relay, sender):
        star.relay.ip("link del out1")
        stranger(star, other, index)
        eventually(lambda: "out1" in relay.rules()["a"]["outputs"][1]["state"], "out1 is missed")
        with Capture(other, "x0") as wire:
            delivers(sender, calm)
            relay.await_received(relay.stats()["received"])
            delivers(sender, calm)
            assert [packet for packet in wire.arrived() if packet.destination == OUT] == []


def stranger(star: Star, other: Namespace, index: int) -> None:
    """A link of the relay's that no rule names, under this interface number."""
    star.relay.ip(f"link add name odd index {index} type veth peer name x0 netns {other.name}")
    star.relay.ip("addr add 10.77.0.1/24 dev odd", "link set odd up")
    other.ip("link set x0 up")
