"""Rules that come, go and change while streams run; reload, restart and the state file."""

import signal
import threading
import time
from pathlib import Path

import pytest

from netns.lab import Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, number, payloads
from promtool import promtool

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
OUT = "239.2.2.2"
RATE = 20_000  # datagrams a second
SECONDS = 3


class Stream(threading.Thread):
    """Sends numbered datagrams at RATE for SECONDS, a few at a time."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(daemon=True)
        self._sender = sender
        self.sent = payloads(RATE * SECONDS, 200)

    def run(self) -> None:
        start = time.monotonic()
        for first in range(0, len(self.sent), 20):
            self._sender.send(GROUP, 5000, self.sent[first : first + 20])
            time.sleep(max(0.0, start + (first + 20) / RATE - time.monotonic()))


def lost_in_the_lab(star: Star) -> int:
    """Frames that a veth pair of the laboratory, not the relay, has lost."""
    source, relay, sink = star.source.links(), star.relay.links(), star.sink.links()
    ends = [source["s0"], relay["in0"], relay["out0"], sink["k0"]]
    return sum(end["stats64"][way]["dropped"] for end in ends for way in ("rx", "tx"))


def test_a_rule_with_thousands_of_outputs(lab: Lab) -> None:
    """It is longer than any message between processes: workers get it in pieces, and live on."""
    star = lab.star()
    groups = [f"239.2.{n // 250}.{n % 250 + 1}" for n in range(3000)]
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, "") as relay:
        pids = [worker["pid"] for worker in relay.workers()]
        relay.add_rule("many", f"in0:{GROUP}:5000", *(f"out0:{group}:6000" for group in groups))
        sender.send(GROUP, 5000, [b"to all"])
        assert sorted(packet.destination for packet in wire.wait(len(groups))) == sorted(groups)
        assert [worker["pid"] for worker in relay.workers()] == pids, "no worker has died"


def test_other_rules_change_under_a_running_stream(lab: Lab) -> None:
    """Neither rules for other groups nor a second rule for the same one may cost it a datagram."""
    star = lab.star(outputs=2)
    # With GRO a veth has one queue; without, one a processor, where what tc and a worker send may swap places.
    star.sink.run("ethtool", "-K", "k0", "gro", "on")
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as application,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        stream = Stream(sender)
        stream.start()
        changes = 0
        while stream.is_alive():
            relay.add_rule("other", f"in0:239.9.9.{changes % 250 + 1}:5000", "out0:239.3.3.3:6001")
            relay.add_rule("same", f"in0:{GROUP}:5000", "out1:239.3.3.3:6002")
            relay.remove_rule("other")
            relay.remove_rule("same")
            changes += 1
        expected = len(stream.sent) - lost_in_the_lab(star)
        got = [number(payload) for payload in application.receive(expected)]
        assert changes >= 3, "the rules should have changed while the stream ran"
        assert len(set(got)) == expected, "none twice, none lost"
        assert got == sorted(got), "in order"
        relay.await_received(expected)


def test_a_rule_added_to_a_running_flow_takes_effect(lab: Lab) -> None:
    star = lab.star(outputs=2)
    with (
        Capture(star.sink, "k0") as wire0,
        Capture(star.sink, "k1") as wire1,
        Sender(star.source) as sender,
        Relay(star.relay, rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")) as relay,
    ):
        sender.send(GROUP, 5000, [b"1"])
        wire0.until(b"1")
        assert relay.add_rule("b", f"in0:{GROUP}:5000", f"out1:{OUT}:6000")["state"] == "up"
        sender.send(GROUP, 5000, [b"2"])
        assert [packet.payload for packet in wire1.until(b"2")] == [b"2"]
        relay.remove_rule("a")
        sender.send(GROUP, 5000, [b"3"])
        assert [packet.payload for packet in wire1.until(b"3")] == [b"3"]
        relay.add_rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
        sender.send(GROUP, 5000, [b"4"])
        assert [packet.payload for packet in wire0.until(b"4")] == [b"2", b"4"]
        relay.await_received(4)


def test_traffic_before_the_rule_does_not_spoil_the_flow(lab: Lab) -> None:
    """A flow that no rule takes is remembered as such, and must be forgotten when a rule comes."""
    star = lab.star()
    config = rule("other", f"in0:{GROUP}:5001", f"out0:{OUT}:6001")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, payloads(5))
        relay.add_rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
        sender.send(GROUP, 5000, [b"now"])
        assert [packet.payload for packet in wire.until(b"now")] == [b"now"]


def test_duplicate_and_unknown_names(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        body = {"name": "a", "from": f"in0:{GROUP}:5000", "to": [f"out0:{OUT}:6000"]}
        assert relay.request("POST", "/v1/rules", body)[0] == 201
        status, answer = relay.request("POST", "/v1/rules", body)
        assert status == 409
        assert answer["errors"][0]["rule"] == "a"
        assert relay.request("DELETE", "/v1/rules/nobody")[0] == 404
        assert list(relay.rules()) == ["a"]


def test_put_applies_the_difference(lab: Lab) -> None:
    star = lab.star()
    keep, change, remove, add = (
        {"name": name, "from": f"in0:239.1.1.{i}:5000", "to": [f"out0:239.2.2.{i}:6000"]}
        for i, name in enumerate(("keep", "change", "remove", "add"), 1)
    )
    changed = {**change, "to": ["out0:239.2.2.2:6001"]}
    wanted = {"added": ["add"], "removed": ["remove"], "changed": ["change"], "unchanged": ["keep"]}
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay) as relay:
        assert relay.request("PUT", "/v1/rules", {"rules": [keep, change, remove]})[0] == 200
        sender.send("239.1.1.1", 5000, [b"1"])
        wire.until(b"1")
        body = {"rules": [keep, changed, add]}
        assert relay.request("PUT", "/v1/rules?dry_run=true", body) == (200, wanted)
        assert set(relay.rules()) == {"keep", "change", "remove"}, "a dry run changes nothing"
        assert relay.request("PUT", "/v1/rules", body) == (200, wanted)
        assert set(relay.rules()) == {"keep", "change", "add"}
        sender.send("239.1.1.2", 5000, [b"2"])
        assert wire.until(b"2")[-1].dport == 6001
        relay.await_stats(lambda s: {r["name"]: r["packets"] for r in s["rules"]}["keep"] == 1, "keep's counter")


def test_sighup_applies_the_difference(lab: Lab) -> None:
    star = lab.star()
    kept = rule("kept", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    gone = rule("gone", "in0:239.1.1.2:5000", "out0:239.2.2.2:6001")
    new = rule("new", "in0:239.1.1.3:5000", "out0:239.2.2.2:6002")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, kept + gone) as relay,
    ):
        sender.send(GROUP, 5000, [b"1"])
        wire.until(b"1")
        relay.config.write_text(kept + new)
        relay.signal(signal.SIGHUP)
        eventually(lambda: set(relay.rules()) == {"kept", "new"}, "reloaded")
        relay.await_rule("new", "up")
        sender.send("239.1.1.3", 5000, [b"2"])
        assert wire.until(b"2")[-1].dport == 6002
        counted = {entry["name"]: entry["packets"] for entry in relay.stats()["rules"]}
        assert counted["kept"] == 1, "a rule that stays keeps its counters"


def test_sighup_with_a_bad_file_keeps_the_rules(lab: Lab) -> None:
    star = lab.star()
    good = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, good) as relay:
        relay.config.write_text(rule("broken", "in0:nonsense", f"out0:{OUT}:6000"))
        relay.signal(signal.SIGHUP)
        eventually(lambda: "broken" in relay.stderr, "the log names the bad rule")
        assert list(relay.rules()) == ["a"]
        sender.send(GROUP, 5000, [b"still"])
        assert wire.wait(1)[0].payload == b"still"


def test_rules_added_by_api_survive_a_restart(lab: Lab, folder: Path) -> None:
    star = lab.star()
    with Relay(star.relay, folder=folder) as relay:
        relay.add_rule("by-api", f"in0:{GROUP}:5000", f"out0:{OUT}:6000,ttl=8")
        relay.add_rule("removed", "in0:239.1.1.2:5000", f"out0:{OUT}:6000")
        relay.remove_rule("removed")
        before = relay.rules()
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, folder=folder) as relay,
    ):
        assert relay.rules() == before
        sender.send(GROUP, 5000, [b"after the restart"])
        assert wire.wait(1)[0].ttl == 8


def test_a_corrupt_state_file_is_set_aside(lab: Lab, folder: Path) -> None:
    star = lab.star()
    with Relay(star.relay, folder=folder) as relay:
        relay.add_rule("by-api", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    files = [path for path in relay.state_dir.iterdir() if b"by-api" in path.read_bytes()]
    assert len(files) == 1, "one state file holds the rule"
    garbage = files[0].read_bytes()[:-20] + b"\xff{{{"
    files[0].write_bytes(garbage)
    with Relay(star.relay, folder=folder) as relay:
        assert relay.rules() == {}
        relay.add_rule("new", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
        kept = [path for path in relay.state_dir.iterdir() if path.read_bytes() == garbage]
        assert len(kept) == 1, "what could not be read is kept for the operator"
        assert kept[0].name in relay.stderr, "and the log says where"


def test_api_documents_and_metrics(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, payloads(7))
        relay.await_received(7)
        paths = relay.get("/openapi.json")["paths"]
        assert {
            "/v1/health",
            "/v1/rules",
            "/v1/rules/{name}",
            "/v1/flows",
            "/v1/stats",
            "/v1/workers",
        } <= set(paths)
        text = relay.get("/metrics")
        assert any(line.startswith("mrelay_") and line.endswith(" 7") for line in text.splitlines())
        health = relay.get("/v1/health")
        assert (health["ready"], health["engine"]) == (True, "ebpf")
        assert health["egress"] in ("io_uring", "sendmmsg")
        for process in ("supervisor", "control", "worker-0"):
            assert f'mrelay_process_resident_memory_bytes{{process="{process}"}}' in text
        checked = promtool("check", "metrics", text=text.encode())
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
