"""Two hundred blows to the links of a forwarding relay; and what its outputs then say of themselves.

The links flap, lose and change addresses, are renamed, deleted, made anew, moved to another namespace and
back, and change their MTU, in random order (the seed is printed, MRELAY_SEED repeats it), while another
stream on links that nobody touches must lose nothing.
"""

import contextlib
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netns.lab import SOURCE_2, End, Lab, Namespace, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Receiver, Sender, number, payloads

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]
BLOWS = 200
GROUP, STRUCK_GROUP, OUT, CALM_OUT = "239.1.1.1", "239.1.1.5", "239.2.2.2", "239.2.2.3"
NAMES = ("in1", "out1")  # what is struck; in0 and out0 are left in peace


class Links:
    """The two struck links of a relay: `blow` does one thing to one of them, `mend` makes all as it was."""

    def __init__(self, lab: Lab, star: Star, rng: random.Random) -> None:
        self.lab, self.star, self.rng = lab, star, rng
        self.elsewhere = lab.namespace("elsewhere")
        self.done: dict[str, int] = {}
        for name in NAMES:
            self.make(name)

    def address(self, name: str) -> str:
        return "192.168.60.1/24" if name == "in1" else "10.7.7.1/24"

    def make(self, name: str) -> None:
        far = End(self.star.source, "s1", (f"{SOURCE_2.replace('.9.2', '.8.2')}/24",))
        if name == "out1":
            far = End(self.star.sink, "k1", ("10.7.7.2/24",))
        self.lab.link(far, End(self.star.relay, name, (self.address(name),)))

    def there(self, name: str) -> bool:
        return name in self.star.relay.links()

    def blow(self) -> None:
        name = self.rng.choice(NAMES)
        kind = self.rng.choice(["flap", "rename", "readdress", "remove", "move", "mtu"])
        self.done[kind] = self.done.get(kind, 0) + 1
        getattr(self, kind)(name)

    def flap(self, name: str) -> None:
        self.star.relay.ip(f"link set {name} down", f"link set {name} up")

    def rename(self, name: str) -> None:
        self.star.relay.ip(f"link set {name} name odd")  # up, as the kernel allows since 6.2
        self.star.relay.ip(f"link set odd name {name}")

    def readdress(self, name: str) -> None:
        net = 100 + self.rng.randrange(100)
        self.star.relay.ip(f"addr flush dev {name}", f"addr add 10.6.{net}.1/24 dev {name}")
        if self.rng.random() < 0.7:
            self.star.relay.ip(f"addr flush dev {name}", f"addr add {self.address(name)} dev {name}")

    def remove(self, name: str) -> None:
        self.star.relay.ip(f"link del {name}")
        self.make(name)

    def move(self, name: str) -> None:
        self.star.relay.ip(f"link set {name} netns {self.elsewhere.name}")
        self.elsewhere.ip(f"link set {name} netns {self.star.relay.name}")
        self.star.relay.ip(f"addr add {self.address(name)} dev {name}", f"link set {name} up")

    def mtu(self, name: str) -> None:
        self.star.relay.ip(f"link set {name} mtu {self.rng.choice([1280, 1500, 9000])}")

    def mend(self) -> None:
        for name in NAMES:
            self.star.relay.ip(
                f"addr flush dev {name}",
                f"addr add {self.address(name)} dev {name}",
                f"link set {name} up mtu 1500",
            )


class Calm(threading.Thread):
    """A stream over links that nobody touches, until told to stop."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(daemon=True)
        self.sender, self.sent, self.stopped = sender, 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.sender.send(GROUP, 5000, payloads(5, first=self.sent))
            self.sent += 5


def descriptors(relay: Relay) -> dict[str, int]:
    """How many each process that serves has open: the least of some looks, for what was asked ends later."""
    pids = {role: relay.role(role)[0] for role in ("supervisor", "control")}
    pids |= {f"worker {worker['worker']}": worker["pid"] for worker in relay.workers()}
    least: dict[str, int] = {}
    for _ in range(6):
        for name, pid in pids.items():
            least[name] = min(least.get(name, 1 << 20), len(list(Path(f"/proc/{pid}/fd").iterdir())))
        time.sleep(0.05)
    return least


def await_forwarding(sender: Sender, sink: Namespace) -> None:
    """Return when the struck stream gets through: a rule that was "up" may not know of the last blow yet."""
    with Receiver(sink, "k1", 6000, OUT) as receiver:

        def came(seconds: float) -> bool:
            return bool(select.select([receiver.sock], [], [], seconds)[0])

        def try_one() -> bool:
            sender.send(STRUCK_GROUP, 5000, [b"probe"])
            return came(0.3)

        eventually(try_one, "the struck stream gets through")
        while came(0.3):
            receiver.receive(1)


def forwards(sender: Sender, sink: Namespace, tag: bytes) -> None:
    """The struck stream gets through whole."""
    sent = [tag + payload for payload in payloads(200)]
    with Receiver(sink, "k1", 6000, OUT) as receiver:
        sender.send(STRUCK_GROUP, 5000, sent)
        assert receiver.receive(len(sent)) == sent


def test_two_hundred_blows(lab: Lab, figures: Callable[[str], None]) -> None:
    seed = int(os.environ.get("MRELAY_SEED") or random.randrange(2**32))
    star = lab.star()
    links = Links(lab, star, random.Random(seed))
    config = rule("calm", f"in0:{GROUP}:5000", f"out0:{CALM_OUT}:6000")
    config += rule("struck", f"in1:{STRUCK_GROUP}:5000", f"out1:{OUT}:6000", "out1:10.7.7.2:6001")
    source = SOURCE_2.replace(".9.2", ".8.2")
    with (
        Receiver(star.sink, "k0", 6000, CALM_OUT) as receiver,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        with Sender(star.source, source, interface="s1") as struck:
            forwards(struck, star.sink, b"before")
        eventually(lambda: len(relay.role("worker")) == 2, "a worker and a spare one")
        eventually(lambda: relay.taps() == 8, "control listens to memberships: four interfaces, two families")
        before = descriptors(relay)
        calm = Calm(sender)
        calm.start()
        start = time.monotonic()
        for _ in range(BLOWS):
            links.blow()
        links.mend()
        took = time.monotonic() - start
        relay.await_rule("struck", "up")
        calm.stopped.set()
        calm.join()
        with Sender(star.source, source, interface="s1") as struck:
            await_forwarding(struck, star.sink)
            forwards(struck, star.sink, b"after")
        got = [number(payload) for payload in receiver.receive(calm.sent)]
        assert got == list(range(calm.sent)), "the untouched stream lost nothing, and kept its order"
        with contextlib.suppress(AssertionError):  # control listens to memberships again after 5 s
            eventually(lambda: descriptors(relay) == before, "descriptors as before", 20.0)
        assert descriptors(relay) == before
        assert all(worker["restarts"] == 0 for worker in relay.workers())
    figures(f"{BLOWS} blows (seed {seed}) in {took:.1f} s: {links.done}")
    figures(f"untouched: {calm.sent} of {calm.sent}")


def test_a_unicast_output_says_what_it_lacks(lab: Lab) -> None:
    """An unknown neighbour, then no route, then both there; the other output is fine all along."""
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:10.1.0.77:6000", f"out0:{OUT}:6000", "out0:10.55.0.1:6000")

    def state(number: int) -> str:
        state: str = relay.stats()["rules"][0]["outputs"][number]["state"]
        return state

    with (
        Receiver(star.sink, "k0", 6000, OUT) as receiver,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        eventually(lambda: state(2).startswith("no route to 10.55.0.1"), "no route yet")
        star.relay.ip("neigh replace 10.1.0.77 dev out0 nud failed")
        sender.send(GROUP, 5000, [b"one"])
        assert receiver.receive(1) == [b"one"]
        eventually(lambda: "10.1.0.77 does not answer" in state(0), "nobody is there")
        assert state(1) == "up"
        star.sink.ip("addr add 10.1.0.77/24 dev k0", "addr add 10.55.0.1/32 dev k0")
        star.relay.ip("route add 10.55.0.0/16 via 10.1.0.77 dev out0")
        sender.send(GROUP, 5000, [b"two"])
        eventually(lambda: [state(n) for n in range(3)] == ["up"] * 3, "all there")
        relay.await_rule("a", "up")


def test_a_storm_of_routes_does_not_occupy_control(lab: Lab) -> None:
    """Ten thousand changes, more than the socket's buffer holds; then the state is still right."""
    star = lab.star()
    with Relay(star.relay, rule("a", f"in0:{GROUP}:5000", "out0:10.55.0.1:6000")) as relay:
        relay.await_rule("a", "no route")
        lines = [f"route add 10.60.{n // 250}.{n % 250}/32 dev out0" for n in range(5000)]
        star.relay.ip(*lines)
        star.relay.ip(*(line.replace("add", "del") for line in lines))
        star.relay.ip(
            "route add 10.55.0.0/16 dev out0", "neigh replace 10.55.0.1 lladdr 02:00:00:00:00:09 dev out0"
        )
        relay.await_rule("a", "up")


def test_an_interface_replaced_by_another_with_its_number(lab: Lab) -> None:
    """Faster than control looks: the new one has the same name and number, and nothing open."""
    star = lab.star()
    config = rule("a", f"in1:{GROUP}:5000", f"out0:{OUT}:6000")
    near, far = "192.168.60.1/24", f"{SOURCE_2.replace('.9.2', '.8.2')}/24"
    lab.link(End(star.source, "s1", (far,)), End(star.relay, "in1", (near,)))
    index = star.relay.links()["in1"]["ifindex"]
    with Receiver(star.sink, "k0", 6000, OUT) as receiver, Relay(star.relay, config) as relay:
        (control,) = relay.role("control")
        os.kill(control, signal.SIGSTOP)  # for less than its pulse is waited for
        star.relay.ip(
            "link del in1",
            f"link add name in1 index {index} type veth peer name s1 netns {star.source.name}",
            f"addr add {near} dev in1",
            "link set in1 up",
        )
        star.source.ip(f"addr add {far} dev s1", "link set s1 up")
        os.kill(control, signal.SIGCONT)
        eventually(lambda: GROUP in star.relay.groups("in1"), "joined on the new one")
        relay.await_rule("a", "up")
        with Sender(star.source, far.partition("/")[0], interface="s1") as sender:
            sender.send(GROUP, 5000, [b"here again"])
            assert receiver.receive(1) == [b"here again"]
        assert relay.role("control") == [control]
