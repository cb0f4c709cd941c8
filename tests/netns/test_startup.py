"""Starting: bad files, missing interfaces, a taken socket, a host without io_uring."""

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netns.lab import Lab, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender, payloads

pytestmark = pytest.mark.netns
EX_CONFIG = 78  # sysexits.h
GROUP = "239.1.1.1"
OUT = "239.2.2.2"
CONFIG = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
REFUSE_IO_URING = (sys.executable, str(Path(__file__).with_name("refuse_io_uring.py")))


def test_all_errors_of_a_bad_file_at_once(lab: Lab) -> None:
    star = lab.star()
    config = '[relay]\nworkers = "some"\ncolour = "red"\n\n'
    config += rule("no-port", f"in0:{GROUP}", f"out0:{OUT}:6000")
    config += rule("bad-ttl", f"in0:{GROUP}:5001", f"out0:{OUT}:6000,ttl=900")
    config += rule("twice", f"in0:{GROUP}:5002", f"out0:{OUT}:6000") * 2
    relay = Relay(star.relay, config)
    assert relay.run() == EX_CONFIG, relay.stderr
    for word in ("workers", "colour", "no-port", "bad-ttl", "twice", "relay.toml"):
        assert word in relay.stderr, f"{word} is not among the errors:\n{relay.stderr}"
    assert "Traceback" not in relay.stderr


def test_a_file_that_is_not_toml(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, '[relay]\nworkers = "auto\n')
    assert relay.run() == EX_CONFIG, relay.stderr
    assert "line 2" in relay.stderr
    assert "Traceback" not in relay.stderr


def test_a_file_that_is_not_there(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, CONFIG)
    relay.config.unlink()
    assert relay.run() == EX_CONFIG, relay.stderr
    assert str(relay.config) in relay.stderr


def test_without_a_file(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        assert relay.rules() == {}
        assert relay.stats()["received"] == 0


def test_a_missing_interface_is_waited_for(lab: Lab) -> None:
    star = lab.star()
    config = CONFIG + rule("later", "in9:239.1.1.9:5000", f"out0:{OUT}:6009")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        assert relay.rules()["later"]["state"] == "waiting: no interface in9"
        sender.send(GROUP, 5000, [b"meanwhile"])
        assert wire.wait(1)[0].payload == b"meanwhile"
        for _ in range(2):  # it appears, goes, and appears again
            star.relay.ip("link add name in9 type veth peer name s9 netns " + star.source.name)
            star.relay.ip("addr add 192.168.59.1/24 dev in9", "link set in9 up")
            star.source.ip("addr add 10.98.9.1/24 dev s9", "link set s9 up")
            relay.await_rule("later", "up")
            with Sender(star.source, "10.98.9.1", interface="s9") as late:
                late.send("239.1.1.9", 5000, [b"at last"])
            assert wire.wait(1)[0].dport == 6009
            star.relay.ip("link del in9")
            relay.await_rule("later", "waiting")
        assert relay.rules()["a"]["state"] == "up"


def test_a_missing_output_interface_is_waited_for(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", f"out1:{OUT}:6001")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, [b"one"])
        assert wire.wait(1)[0].payload == b"one", "one output's absence must not stop the other"
        states = {output["to"]: output["state"] for output in relay.rules()["a"]["outputs"]}
        assert states[f"out0:{OUT}:6000"] == "up"
        assert states[f"out1:{OUT}:6001"] == "waiting: no interface out1"
        lab.egress_link(star, 1)
        with Capture(star.sink, "k1") as late:
            relay.await_rule("a", "up")
            sender.send(GROUP, 5000, [b"both"])
            assert late.wait(1)[0].payload == b"both"
            assert wire.wait(1)[0].payload == b"both"


def test_a_link_that_goes_down_and_comes_back(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        star.relay.ip("link set in0 down")
        star.relay.ip("link set in0 up")
        relay.await_rule("a", "up")
        sender.send(GROUP, 5000, [b"back"])
        assert wire.wait(1)[0].payload == b"back"
        assert GROUP in star.relay.groups("in0")


def test_a_new_address_becomes_the_source(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG):
        sender.send(GROUP, 5000, [b"before"])
        assert wire.wait(1)[0].source == "10.1.0.1"
        star.relay.ip("addr del 10.1.0.1/24 dev out0", "addr add 10.1.0.9/24 dev out0")

        def from_the_new_address() -> bool:
            sender.send(GROUP, 5000, [b"after"])
            return any(packet.source == "10.1.0.9" for packet in wire.arrived())

        eventually(from_the_new_address, "packets come from the new address")


def test_a_taken_socket(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as first:
        second = Relay(star.relay, CONFIG, socket_path=first.socket)
        assert second.run() == 1, second.stderr
        assert str(first.socket) in second.stderr, "the message names the path"
        assert "Traceback" not in second.stderr
        assert first.rules()["a"]["state"] == "up"


def test_a_socket_left_by_a_dead_relay_is_replaced(lab: Lab, folder: Path) -> None:
    star = lab.star()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "control.sock"))
    with Relay(star.relay, CONFIG, folder=folder) as relay:
        assert relay.rules()["a"]["state"] == "up"


def test_a_host_without_io_uring(lab: Lab) -> None:
    star = lab.star(outputs=2)
    sent = payloads(50)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", "out1:10.1.1.2:6000,ttl=9")
    with (
        Capture(star.sink, "k0") as group,
        Capture(star.sink, "k1") as host,
        Sender(star.source) as sender,
        Relay(star.relay, config, launcher=REFUSE_IO_URING) as relay,
    ):
        sender.send(GROUP, 5000, sent)
        for wire in (group, host):
            got = wire.wait(len(sent))
            assert [packet.payload for packet in got] == sent
            assert {packet.checksum_good for packet in got} == {True}
        assert {worker["egress"] for worker in relay.workers()} == {"sendmmsg"}
        assert relay.get("/v1/health")["egress"] == "sendmmsg"
        relay.await_received(len(sent))


def test_uring_is_used_where_there_is_one(lab: Lab) -> None:
    star = lab.star()
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    if setting.exists() and setting.read_text().strip() != "0":
        pytest.skip("io_uring is disabled (kernel.io_uring_disabled)")
    with Relay(star.relay, CONFIG, arguments=["--engine", "uring"]) as relay:
        assert {worker["egress"] for worker in relay.workers()} == {"io_uring"}


def test_more_signals_while_it_stops_change_nothing(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")).start()
    try:
        relay.wait_ready()
        assert relay.process is not None
        signals = itertools.cycle((signal.SIGTERM, signal.SIGINT))
        deadline = time.monotonic() + 10
        while relay.process.poll() is None and time.monotonic() < deadline:  # to its very last millisecond
            relay.signal(next(signals))
            with contextlib.suppress(subprocess.TimeoutExpired):
                relay.process.wait(0.001)
        assert relay.process.wait(1) == 0
        assert "Traceback" not in relay.stderr
        assert "ignored" not in relay.stderr
    finally:
        relay.close()
