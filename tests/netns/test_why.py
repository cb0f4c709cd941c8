"""`why` on a table of set-ups, broken each in one way, or healthy: the right stage and remedy, no false alarm.

One relay serves most of the table, all streams run at once, and several questions are asked at a time.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from netns.frames import IP_MF, ethernet, ipv4, ipv6, multicast_mac, udp, udp_frame
from netns.lab import SOURCE, SOURCE_6, End, Lab, Namespace, Star, eventually
from netns.relay import Relay, rule
from netns.test_failures import kill_until
from netns.traffic import ETH_P_ALL, PACKET_IGNORE_OUTGOING, SOL_PACKET

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]
OUT = "out0:239.200.0.1:7000"
SECONDS = 1.0
Frames = Callable[[], Sequence[bytes]]


@dataclass(frozen=True)
class Case:
    """A rule, what is sent while `why` looks (on `at`), and what the answer must hold. `stage` None: healthy."""

    name: str
    from_: str
    to: tuple[str, ...] = (OUT,)
    frames: tuple[bytes, ...] = ()
    stage: str | None = None
    says: tuple[str, ...] = ()
    remedy: str = ""
    at: str = "s0"
    every: float = 0.02
    rate: str | None = None

    def text(self) -> str:
        """The rule in TOML."""
        return rule(self.name, self.from_, *self.to, **({"rate": self.rate} if self.rate else {}))


def group(number: int) -> str:
    """A group that no slip of the pen makes of another's."""
    return f"239.{number}.{number}.{number}"


def stream(number: int, port: int = 5000, size: int = 100, **options: Any) -> tuple[bytes, ...]:
    return (udp_frame(SOURCE, group(number), port, bytes(size), **options),)


def damaged(number: int, at: int) -> tuple[bytes, ...]:
    """One whose byte at `at`, from the IP header on, is wrong."""
    frame = bytearray(stream(number)[0])
    frame[14 + at] ^= 0x55
    return (bytes(frame),)


def to_group(number: int, payload: bytes, **options: Any) -> tuple[bytes, ...]:
    return (ethernet(multicast_mac(group(number)), ipv4(SOURCE, group(number), payload, **options)),)


def six(port: int, to: str = "ff3e::42") -> tuple[bytes, ...]:
    return (udp_frame(SOURCE_6, to, port, bytes(100)),)


UDP = udp(SOURCE, group(23), 4000, 5000, bytes(100))
FRAGMENT_6 = struct.pack("!BBHI", 17, 0, 1, 7)  # RFC 8200 §4.5: first of several
FROM = {number: f"in0:{group(number)}:5000" for number in range(1, 100)}

HEALTHY = [
    Case("plain", FROM[1], (OUT, "out1:239.200.0.2:7000"), stream(1)),
    Case("six", "in0:[ff3e::42]:5000", ("out0:[ff3e::43]:7000",), six(5000)),
    Case("ssm", f"in0:{SOURCE}@232.1.1.1:5000", frames=(udp_frame(SOURCE, "232.1.1.1", 5000, bytes(99)),)),
    Case("prefix", "in0:239.2.2.0/24:5000-5999", ("out0:*:*",), stream(2, port=5555)),
    Case("unicast", FROM[3], ("out0:10.1.0.2:7000",), stream(3)),
    Case("slow", FROM[4], frames=stream(4), every=1.0),
    Case("vlan", f"in1:{group(5)}:5000,vlan=20", frames=stream(5, vlan=20), at="s1"),
    Case("ttl", FROM[6], ("out0:239.200.0.6:7000,ttl=4",), stream(6, ttl=1)),
    Case("rated", FROM[7], frames=stream(7), rate="10kpps"),
]
BROKEN = [
    Case("port", FROM[10], frames=stream(10, port=5001), stage="frames", says=("port 5001, not 5000",),
         remedy=f"--from in0:{group(10)}:5001"),
    Case("source", f"in0:10.99.9.9@{group(11)}:5000", frames=stream(11), stage="frames",
         says=(f"from {SOURCE}, the rule wants 10.99.9.9",), remedy=f"--from in0:{SOURCE}@{group(11)}:5000"),
    Case("group", FROM[12], frames=(udp_frame(SOURCE, "239.12.12.13", 5000, bytes(100)),), stage="frames",
         says=("packets for 239.12.12.13 arrive, not for 239.12.12.12",), remedy="--from in0:239.12.12.13:5000"),
    Case("tag", FROM[13], frames=stream(13, vlan=20), stage="frames", says=("tagged with VLAN 20", "untagged"),
         remedy=f"--from in0:{group(13)}:5000,vlan=20"),
    Case("no-tag", f"in1:{group(14)}:5000,vlan=30", frames=stream(14), at="s1", stage="frames",
         says=("untagged", "VLAN 30"), remedy=f"--from in1:{group(14)}:5000 "),
    Case("two", FROM[15], frames=stream(15, port=6001, vlan=20), stage="frames",
         says=("port 6001", "tagged with VLAN 20"), remedy=f"in0:{group(15)}:6001,vlan=20"),
    Case("ttl-1", FROM[16], frames=stream(16, ttl=1), stage="headers", says=("TTL 1",), remedy=f"{OUT},ttl=8"),
    Case("down", f"dn0:{group(17)}:5000", stage="interface", says=("dn0 is down",), remedy="ip link set dn0 up"),
    Case("missing", f"in9:{group(18)}:5000", stage="interface", says=("no interface in9",),
         remedy="did you mean in"),
    Case("no-carrier", f"nc0:{group(19)}:5000", stage="interface", says=("no carrier",), remedy="cable"),
    Case("silent", FROM[20], stage="frames", says=("nothing for", "arrives on in0"), remedy="look at the sender"),
    Case("tcp", FROM[21], frames=to_group(21, bytes(20), protocol=6), stage="frames", says=("TCP", "not UDP"),
         remedy="have the sender send UDP"),
    Case("udp-header", FROM[22], frames=to_group(22, bytes(4)), stage="frames", says=("damaged UDP headers",),
         remedy="cuts it short"),
    Case("fragment", FROM[23], frames=to_group(23, UDP[:64], fragment=IP_MF, ident=9), stage="frames",
         says=("only fragments",), remedy="fit the path's MTU"),
    Case("fragment-6", "in0:[ff3e::99]:5000", ("out0:[ff3e::43]:7000",), (
        ethernet(multicast_mac("ff3e::99"), ipv6(SOURCE_6, "ff3e::99", FRAGMENT_6 + bytes(64), next_header=44)),),
        stage="frames", says=("IPv6 fragments are not put together",), remedy="fit the path's MTU"),
    Case("header", FROM[24], frames=damaged(24, 10), stage="headers", says=("IPv4 header checksum",),
         remedy="find what damages it"),
    Case("checksum", FROM[25], frames=damaged(25, 60), stage="headers", says=("UDP checksum",), remedy="tx off"),
    Case("elsewhere", FROM[26], frames=stream(26), at="s1", stage="frames", says=("arrives on in1, not on in0",),
         remedy=f"in1:{group(26)}:5000"),
    Case("no-route", FROM[27], ("out0:10.77.0.9:7000",), stream(27), stage="outputs",
         says=("no route to 10.77.0.9",), remedy="ip route add 10.77.0.9 dev out0"),
    Case("no-neighbour", FROM[28], ("out0:10.1.0.77:7000",), stream(28), stage="outputs",
         says=("10.1.0.77 does not answer",), remedy="ip neigh show dev out0"),
    Case("out-down", FROM[29], ("dn0:239.200.0.9:7000",), stream(29), stage="outputs", says=("dn0 is down",),
         remedy="ip link set dn0 up"),
    Case("out-missing", FROM[30], ("out9:239.200.0.9:7000",), stream(30), stage="outputs",
         says=("no interface out9",), remedy="did you mean out"),
    Case("mtu", FROM[31], ("small:239.200.0.9:7000",), stream(31, size=1000), stage="outputs",
         says=("1,028 bytes", "MTU of 600", "fragments"), remedy="ip link set small mtu 1028"),
    Case("loop", FROM[32], frames=(udp_frame("10.1.0.1", group(32), 5000, bytes(100)),), stage="loop",
         says=("10.1.0.1",), remedy="allow_loop = true"),
    Case("rate", FROM[33], frames=stream(33) * 4, rate="10pps", stage="limits", says=("over its rate (10pps)",),
         remedy="raise the rule's rate"),
    Case("one-of-two", FROM[34], (OUT, "dn0:239.200.0.9:7000"), stream(34), stage="outputs", says=("dn0 is down",),
         remedy="ip link set dn0 up"),
    Case("snooping", f"in2:{group(35)}:5000", frames=stream(35), at="s2", stage="querier",
         says=("stopped sending", "nobody asks"), remedy="querier"),
    Case("bridge", f"br0:{group(36)}:5000", stage="querier", says=("bridge br0 snoops",),
         remedy="ip link set br0 type bridge mcast_querier 1"),
    Case("six-port", "in0:[ff3e::77]:6666", ("out0:[ff3e::43]:7000",), six(5000, "ff3e::77"), stage="frames",
         says=("port 5000, not 6666",)),
]  # fmt: skip


@dataclass(frozen=True)
class Set:
    """The star, a second source link (s1, in1), one through a snooping switch (s2, in2); `at`: who sends where."""

    star: Star
    switch: Namespace
    at: dict[str, Namespace]


def build(lab: Lab) -> Set:
    star = lab.star(outputs=2)
    relay, source = star.relay, star.source
    lab.link(End(source, "s1"), End(relay, "in1"))
    switch = lab.namespace("switch")
    for here, there, port in ((source, "s2", "p0"), (relay, "in2", "p1")):
        lab.link(End(here, there), End(switch, port))
    relay.ip(
        "link add br0 type bridge mcast_snooping 1 mcast_querier 0",
        "link add dn0 type veth peer name dn1",
        "link add nc0 type veth peer name nc1",
        "link set nc0 up",
        "link add small mtu 600 type veth peer name small1 mtu 600",
        *(f"link set {name} up" for name in ("br0", "small", "small1", "in1", "in2")),
        "link add v0 type veth peer name v1",
        "link set v0 master br0 up",
        "link set v1 up",
        "addr add 10.1.9.1/24 dev small",
    )
    return Set(star, switch, {"s0": source, "s1": source, "s2": source})


@contextlib.contextmanager
def sending(network: Set, cases: Sequence[Case]) -> Iterator[None]:
    """All streams of the cases, all the time."""
    stop = threading.Event()
    socks = {at: opened(namespace, at) for at, namespace in network.at.items()}

    def pump() -> None:
        due = dict.fromkeys(range(len(cases)), 0.0)
        while not stop.wait(0.01):
            now = time.monotonic()
            for number, case in enumerate(cases):
                if case.frames and due[number] <= now:
                    due[number] = now + case.every
                    for frame in case.frames:
                        socks[case.at].send(frame)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for sock in socks.values():
            sock.close()


@contextlib.contextmanager
def snooping(switch: Namespace) -> Iterator[None]:
    """A switch that passes p0's frames on to p1 for a second after each report there; nobody asks for any."""
    stop = threading.Event()

    def run() -> None:
        until = 0.0
        while not stop.is_set():
            for sock in select.select([source, port], [], [], 0.05)[0]:
                frame = sock.recv(2000)
                if sock is port and frame[:6] == multicast_mac("224.0.0.22"):
                    until = time.monotonic() + 1.0
                elif sock is source and time.monotonic() < until:
                    port.send(frame)

    with opened(switch, "p0", ETH_P_ALL) as source, opened(switch, "p1", ETH_P_ALL) as port:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def opened(namespace: Namespace, interface: str, protocol: int = 0) -> socket.socket:
    """What puts frames on the wire, and hears those that come of this protocol."""
    with namespace.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.bind((interface, protocol))
    return sock


def ask(relay: Relay, name: str, seconds: float = SECONDS) -> dict[str, Any]:
    return dict(relay.get(f"/v1/rules/{name}/why?seconds={seconds}"))


def wrong(case: Case, answer: dict[str, Any]) -> str:
    """In what the answer is not the right one."""
    failing = next((stage for stage in answer["stages"] if stage["status"] == "failed"), None)
    if answer["stage"] != case.stage:
        return f"stage {answer['stage']}: {answer['summary']}"
    if case.stage is None:
        return "" if answer["verdict"] == "forwarding" else answer["verdict"]
    assert failing is not None
    missing = [word for word in case.says if word not in failing["text"]]
    if missing or case.remedy not in failing["remedy"] or not failing["remedy"]:
        return f"{failing['text']} / {failing['remedy']}"
    return (
        "" if answer["verdict"] == ("partly" if case.name in PARTLY else "not forwarding") else answer["verdict"]
    )


PARTLY = {"one-of-two", "mtu", "rate", "checksum", "full", "hung", "snooping"}


def test_the_table(lab: Lab) -> None:
    network = build(lab)
    cases = [*HEALTHY, *BROKEN]
    with Relay(network.star.relay, "".join(case.text() for case in cases)) as relay:
        with sending(network, cases), ThreadPoolExecutor(4) as pool:
            eventually(lambda: relay.stats()["matched"] > 500, "streams")
            eventually(lambda: "does not answer" in relay.rules()["no-neighbour"]["state"], "no neighbour", 30)
            with snooping(network.switch):  # which has not heard the first reports
                answers = dict(zip(cases, pool.map(lambda case: ask(relay, case.name), cases), strict=True))
        found = {case.name: said for case, answer in answers.items() if (said := wrong(case, answer))}
        assert found == {}
        assert len(BROKEN) >= 20


RELAY = '[relay]\nengine = "uring"\nworkers = 1\nring_slots = 256\n'
AFTER = (  # one after the other on a second relay, in user space: its one worker is what is broken
    Case("full", FROM[1], frames=stream(1), stage="limits", says=("receive ring was full",), remedy="ring_slots"),
    Case("hung", FROM[1], frames=stream(1), stage="workers", says=("worker 0 ended or hung",), remedy="log"),
    Case("unjoined", FROM[2], stage="membership", says=("can't be joined",), remedy="igmp_max_memberships"),
    Case("dead", FROM[1], frames=stream(1), stage="workers", says=("crash loop",), remedy="log"),
)


def test_workers_and_joins(lab: Lab) -> None:
    star = lab.star()
    network = Set(star, star.source, {"s0": star.source})
    full, hung, unjoined, dead = AFTER
    with Relay(star.relay, RELAY + Case("a", FROM[1]).text()) as relay, sending(network, [full]):
        eventually(lambda: relay.stats()["matched"] > 20, "a stream")
        assert wrong(Case("a", FROM[1]), ask(relay, "a")) == ""
        answer = asked_meanwhile(relay, "a", lambda: overrun(relay, star.source))
        assert wrong(full, answer) == ""
        os.kill(relay.workers()[0]["pid"], signal.SIGSTOP)
        assert wrong(hung, ask(relay, "a", 4.0)) == ""
        assert everything(relay) == {"a": ("forwarding", None)}
        star.relay.sysctl("ipv4/igmp_max_memberships", 0)
        relay.add_rule("b", FROM[2], OUT)
        assert wrong(unjoined, ask(relay, "b")) == ""
        assert everything(relay) == {"a": ("forwarding", None), "b": ("not forwarding", "membership")}
        kill_until(relay, r"crash loop .* next try in ([3-9]|\d\d) s")  # not before we have our answer
        assert wrong(dead, ask(relay, "a")) == ""
        relay.check_counters()


def everything(relay: Relay) -> dict[str, tuple[str, str | None]]:
    """Verdict and stage of all rules."""
    lines = relay.get("/v1/why?seconds=0.5")["rules"]
    return {line["rule"]: (line["verdict"], line["stage"]) for line in lines}


def overrun(relay: Relay, source: Namespace) -> None:
    """More frames than its ring has slots, while the worker stands still."""
    pid = relay.workers()[0]["pid"]
    with opened(source, "s0") as sock:
        os.kill(pid, signal.SIGSTOP)
        for _ in range(400):
            sock.send(stream(1)[0])
        os.kill(pid, signal.SIGCONT)  # soon, or it is taken for one that hangs


def asked_meanwhile(relay: Relay, name: str, act: Callable[[], object]) -> dict[str, Any]:
    """The answer to a question; something is done again and again until it is there."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, relay, name)
        while not future.done():
            act()
            time.sleep(0.05)  # for the worker to go on: nothing tells when it has
        return future.result()
