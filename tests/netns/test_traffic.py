"""The test stream over real links: what is sent arrives, and what is lost or foreign is told."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from mrelay.model.endpoint import Input, Output
from mrelay.traffic.receiver import Receiver
from mrelay.traffic.sender import Sender, SendPlan, SendResult
from mrelay.traffic.sockets import TrafficError
from mrelay.traffic.stop import Stop
from netns.lab import End, Lab, Namespace, eventually

pytestmark = pytest.mark.netns

A, B = "10.98.0.1", "10.98.0.2"
A6, B6 = "fd98::1", "fd98::2"


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    """Two namespaces with a link, a0 to b0."""
    one, other = lab.namespace("a"), lab.namespace("b")
    lab.link(End(one, "a0", (f"{A}/24", f"{A6}/64")), End(other, "b0", (f"{B}/24", f"{B6}/64")))
    for end in (one, other):
        eventually(partial(_hears_ipv6_groups, end), "the kernel adds the route that lets IPv6 groups in")
    return one, other


def _hears_ipv6_groups(namespace: Namespace) -> bool:
    return "multicast ff00::/8" in namespace.run("ip", "-6", "route", "show", "table", "local")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def send(namespace: Namespace, plan: SendPlan) -> SendResult:
    """Send all of `plan` from the namespace."""
    with namespace.inside(), Sender(plan) as sender:
        return sender.run(Stop(), 60.0, lambda _: None)


def receiver_in(opened: ExitStack, namespace: Namespace, endpoint: str) -> Receiver:
    with namespace.inside():
        return opened.enter_context(Receiver(Input.parse(endpoint)))


def receive(receiver: Receiver, count: int) -> None:
    """Receive `count` datagrams, for at most 10 s."""
    receiver.run(Stop(), 10.0, count, 60.0, lambda _: None)


@pytest.mark.parametrize(
    ("to", "wanted"),
    [
        ("a0:239.1.1.1:5000", "b0:239.1.1.1:5000"),
        ("a0:232.1.1.1:5000", f"b0:{A}@232.1.1.1:5000"),
        ("a0:[ff3e::1]:5000", "b0:[ff3e::1]:5000"),
        ("a0:[ff12::1]:5000", "b0:[ff12::1]:5000"),
        ("a0:[ff3e::2]:5000", f"b0:[{A6}]@[ff3e::2]:5000"),
        (f"a0:{B}:5000", f"b0:{B}:5000"),
        (f"a0:[{B6}]:5000", f"b0:[{A6}]@[{B6}]:5000"),
    ],
)
@pytest.mark.parametrize("gso", [False, True])
def test_everything_arrives(
    pair: tuple[Namespace, Namespace], opened: ExitStack, to: str, wanted: str, gso: bool
) -> None:
    receiver = receiver_in(opened, pair[1], wanted)
    result = send(pair[0], SendPlan(Output.parse(to), rate=100_000, size=300, count=2000, gso=gso))
    receive(receiver, 2000)
    assert result.sent == receiver.received == 2000
    assert list(receiver.streams) == [result.stream]
    account = receiver.streams[result.stream]
    assert (account.bytes, account.lost, account.reordered, account.duplicates) == (600_000, 0, 0, 0)
    assert account.latency.count == 2000
    assert account.latency.lowest > 0
    assert (receiver.foreign, receiver.socket_drops()) == (0, 0)


def test_a_source_that_was_not_asked_for_is_not_received(
    pair: tuple[Namespace, Namespace], opened: ExitStack
) -> None:
    other = receiver_in(opened, pair[1], "b0:10.98.0.77@232.1.1.1:5000")
    right = receiver_in(opened, pair[1], f"b0:{A}@232.1.1.1:5000")
    send(pair[0], SendPlan(Output.parse("a0:232.1.1.1:5000"), rate=10_000, count=100))
    receive(right, 100)
    assert right.received == 100
    assert other.drain() == 0


def test_a_full_socket_is_told_from_loss_on_the_way(
    pair: tuple[Namespace, Namespace], opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrelay.traffic.sockets.RECEIVE_BUFFER", 20_000)
    receiver = receiver_in(opened, pair[1], "b0:239.1.1.1:5000")
    plan = SendPlan(Output.parse("a0:239.1.1.1:5000"), rate=100_000, count=200)
    stream = send(pair[0], plan).stream
    receiver.drain()
    held = receiver.received
    assert 0 < held < 200
    assert receiver.socket_drops() == 200 - held
    assert receiver.streams[stream].lost == 0  # nothing came after the gap yet
    second = send(pair[0], SendPlan(plan.output, rate=1000, count=1)).stream
    receiver.drain()
    assert receiver.streams[second].received == 1


def test_foreign_datagrams_are_counted_apart(pair: tuple[Namespace, Namespace], opened: ExitStack) -> None:
    receiver = receiver_in(opened, pair[1], "b0:239.1.1.1:5000")
    with pair[0].inside(), Sender(SendPlan(Output.parse("a0:239.1.1.1:5000"), count=10)) as sender:
        sender._socket.send(b"not ours")
        sender._socket.send(bytes(100))
        sender._socket.send(b"")
        sender.run(Stop(), 60.0, lambda _: None)
    receive(receiver, 10)
    assert (receiver.received, receiver.foreign) == (10, 3)


def test_two_streams_to_one_group_are_accounted_apart(
    pair: tuple[Namespace, Namespace], opened: ExitStack
) -> None:
    receiver = receiver_in(opened, pair[1], "b0:239.1.1.1:5000")
    plan = SendPlan(Output.parse("a0:239.1.1.1:5000"), rate=20_000, count=500)
    with pair[0].inside():
        senders = [opened.enter_context(Sender(plan)) for _ in range(2)]
    threads = [threading.Thread(target=sender.run, args=(Stop(), 60.0, lambda _: None)) for sender in senders]
    for thread in threads:
        thread.start()
    receive(receiver, 1000)
    for thread in threads:
        thread.join()
    assert sorted(receiver.streams) == sorted(sender.result.stream for sender in senders)
    assert [account.received for account in receiver.streams.values()] == [500, 500]
    assert receiver.lost == 0


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("b9:239.1.1.1:5000", "no such interface"),
        ("b0:239.1.0.0/16:5000", "one address and one port"),
        ("b0:239.1.1.1:5000-5001", "one address and one port"),
        ("b0:239.1.1.1:5000,vlan=4", "VLAN's own interface"),
        ("b0:10.98.0.0/24@232.1.1.1:5000", "one source"),
        ("b0:10.98.0.9:5000", "not this host's"),
    ],
)
def test_what_cannot_be_received_says_why(pair: tuple[Namespace, Namespace], endpoint: str, why: str) -> None:
    with pair[1].inside(), pytest.raises(TrafficError, match=why):
        Receiver(Input.parse(endpoint))


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("a9:239.1.1.1:5000", "no such interface"),
        ("a0:*:5000", "name an address and a port"),
        ("a0:239.1.1.1:*", "name an address and a port"),
        ("a0:239.1.1.1:5000,source=keep", "no source to keep"),
        ("a0:239.1.1.1:5000,source=10.98.0.9", "not this host's"),
    ],
)
def test_what_cannot_be_sent_says_why(pair: tuple[Namespace, Namespace], endpoint: str, why: str) -> None:
    with pair[0].inside(), pytest.raises(TrafficError, match=why):
        Sender(SendPlan(Output.parse(endpoint)))


def mrelay(namespace: Namespace, *arguments: str) -> "subprocess.Popen[str]":
    with namespace.inside():
        return subprocess.Popen(
            [sys.executable, "-m", "mrelay", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def test_the_commands(pair: tuple[Namespace, Namespace]) -> None:
    options = ("--json", "--fail-on-loss", "--interval", "0.05", "--count", "3000", "--duration", "20")
    receiving = mrelay(pair[1], "receive", "b0:239.1.1.1:5000", *options)
    assert receiving.stderr is not None
    assert "received 0" in receiving.stderr.readline()  # joined by now
    sending = mrelay(
        pair[0], "send", "a0:239.1.1.1:5000", "--rate", "20000", "--count", "3000", "--size", "1200", "--json"
    )
    sent, received = (json.loads(process.communicate(timeout=30)[0]) for process in (sending, receiving))
    assert (sending.returncode, receiving.returncode) == (0, 0)
    assert (sent["sent"], sent["bytes"], sent["errors"]) == (3000, 3_600_000, 0)
    assert (received["received"], received["lost"], received["duplicates"]) == (3000, 0, 0)
    assert received["streams"][0]["stream"] == sent["stream"]
    assert 0 < received["streams"][0]["latency_us"]["p50"] <= received["streams"][0]["latency_us"]["max"]


@pytest.mark.parametrize("command", ["send", "receive"])
def test_a_signal_ends_with_the_summary(pair: tuple[Namespace, Namespace], command: str) -> None:
    options = ("--rate", "2000") if command == "send" else ("--interval", "0.05")
    process = mrelay(pair[0], command, "a0:239.1.1.1:5000", "--json", *options)
    assert process.stderr is not None
    process.stderr.readline()  # the first progress line: it runs
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(output)["endpoint"] == "a0:239.1.1.1:5000"
