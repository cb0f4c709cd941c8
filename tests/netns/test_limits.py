"""Rates and loops on real streams: what passes, what does not, and that nobody else pays for it."""

import threading
import time

import pytest

from netns import fast
from netns.lab import End, Lab
from netns.relay import Relay, rule
from netns.traffic import Receiver, Sender, number, payloads

pytestmark = pytest.mark.netns
GROUP, OUT = "239.1.1.1", "239.2.2.2"
PPS = 2000


@pytest.mark.parametrize("segmented", [False, True], ids=["single", "merged"])
def test_a_rate_is_kept_and_costs_no_other_rule(lab: Lab, segmented: bool) -> None:
    """Ten times the rate comes; a second rule for the same stream is not limited.

    No more than 250 merged frames a second: a ring holds 120, and another test may hold the worker up.
    """
    pps = 500
    star = lab.star(outputs=2)
    config = rule("slow", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", rate=f"{pps}pps")
    config += rule("all", f"in0:{GROUP}:5000", f"out1:{OUT}:6000")
    sent = payloads(5_000, 200)
    with (
        Receiver(star.sink, "k0", 6000, OUT) as slow,
        Receiver(star.sink, "k1", 6000, OUT) as whole,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.extend(whole.receive(len(sent), 30)))
        reader.start()
        start = time.monotonic()
        for first in range(0, len(sent), 20):
            (sender.send_segmented if segmented else sender.send)(GROUP, 5000, sent[first : first + 20])
            time.sleep(max(0.0, start + (first + 20) / (10 * pps) - time.monotonic()))
        reader.join()
        elapsed = time.monotonic() - start
        assert got == sent, "each byte, in order"
        stats = relay.await_received(len(sent))
        passed = {counted["name"]: counted["packets"] for counted in stats["rules"]}
        assert passed["all"] == stats["matched"] == len(sent)
        assert pps * elapsed / 3 < passed["slow"] < pps / 10 + pps * elapsed + 64, "64: a bucket may end in debt"
        numbers = [number(payload) for payload in slow.receive(passed["slow"])]
        assert numbers == sorted(set(numbers)), "what passes is in order, and none twice"


def test_the_kernel_keeps_a_rate_too(lab: Lab) -> None:
    """What a flow's only rule allows; the rest is counted. A new rate is in force at once."""
    fast.require()
    star = lab.star()
    config = rule("slow", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", rate=f"{PPS}pps")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as sink,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        sender.send(GROUP, 5000, payloads(1))
        offered = relay.await_received(1)["received"]
        for pps in (PPS, 4 * PPS):
            slow = {"name": "slow", "from": f"in0:{GROUP}:5000", "to": [f"out0:{OUT}:6000"], "rate": f"{pps}pps"}
            assert relay.request("PUT", "/v1/rules", {"rules": [slow]})[0] == 200
            start, before, sent = time.monotonic(), relay.stats()["matched"], payloads(20_000, 100, first=offered)
            for first in range(0, len(sent), 50):
                sender.send_segmented(GROUP, 5000, sent[first : first + 50])
                time.sleep(max(0.0, start + (first + 50) / (10 * PPS) - time.monotonic()))
            elapsed, offered = time.monotonic() - start, offered + len(sent)
            stats = relay.await_received(offered)
            passed = stats["matched"] - before
            assert pps * elapsed / 3 < passed <= pps * (elapsed + 0.1) + 2 * 64, "64: a bucket may end in debt"
        assert stats["matched"] + stats["drops"]["rate_limited"] == offered
        assert stats["drops"]["rate_limited"] > 0
        assert stats["rules"][0]["drops"] == {"rate_limited": stats["drops"]["rate_limited"]}
        fast.await_engine(relay, "ebpf", group=GROUP)
        numbers = [number(payload) for payload in sink.receive(stats["matched"])]
        assert numbers == sorted(set(numbers)), "what passes is in order, and none twice"


def test_what_no_rule_passes_is_counted_as_rate_limited(lab: Lab) -> None:
    star = lab.star()
    config = rule("slow", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", rate="80kbit/s")
    with Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, payloads(500, 1000))
        stats = relay.await_received(500)
        assert stats["matched"] + stats["drops"]["rate_limited"] == 500
        assert stats["rules"][0]["drops"] == {"rate_limited": stats["drops"]["rate_limited"]}
        assert 66 <= stats["matched"] < 200, "the least burst is 65,536 bytes"
        assert relay.rules()["slow"]["rate"] == "80kbit/s"


@pytest.mark.parametrize("allowed", [False, True])
def test_our_own_stream_come_back_is_a_loop_unless_that_is_meant(lab: Lab, allowed: bool) -> None:
    """A cable from one of the relay's interfaces to another."""
    star = lab.star()
    lab.link(End(star.relay, "there", ("10.7.0.1/24",)), End(star.relay, "back", ("10.8.0.1/24",)))
    config = rule("out", f"in0:{GROUP}:5000", "there:*:*")
    config += rule("again", f"back:{GROUP}:5000", f"out0:{OUT}:6000", allow_loop=allowed)
    sent = payloads(50)
    with (
        Receiver(star.sink, "k0", 6000, OUT) as sink,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        sender.send(GROUP, 5000, sent)
        if allowed:
            assert sink.receive(50) == sent
        stats = relay.await_received(100)  # out, and back again
        assert stats["drops"]["loop"] == (0 if allowed else 50)
        assert ("allow_loop = true" in relay.stderr) is not allowed
