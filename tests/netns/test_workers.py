"""Several workers on one interface, and workers that die."""

import os
import signal
from collections import defaultdict

import pytest

from netns.lab import Lab, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, number, payloads

pytestmark = pytest.mark.netns
FLOWS = 64
EACH = 50


def core_list() -> str:
    """Two cores this process may use; skips on a machine with one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two processor cores")
    return f"{cores[0]},{cores[1]}"


def test_two_workers_share_an_interface(lab: Lab) -> None:
    """64 flows over two workers: nothing lost, doubled or out of order within a flow."""
    star = lab.star()
    star.sink.sysctl("ipv4/igmp_max_memberships", 100)
    groups = [f"239.1.1.{flow + 1}" for flow in range(FLOWS)]
    config = rule("all", "in0:239.1.1.0/24:5000", "out0:*:6000")
    got: dict[int, list[int]] = defaultdict(list)
    with (
        Receiver(star.sink, "k0", 6000, *groups) as application,
        Sender(star.source) as sender,
        Relay(star.relay, config, arguments=["--workers", core_list()]) as relay,
    ):
        for i in range(EACH):
            for flow, group in enumerate(groups):
                sender.send(group, 5000, payloads(1, 100 + flow, first=i))
            for payload in application.receive(FLOWS):
                got[len(payload) - 100].append(number(payload))
        assert got == {flow: list(range(EACH)) for flow in range(FLOWS)}
        stats = relay.await_received(FLOWS * EACH)
        assert (stats["matched"], stats["flows"]) == (FLOWS * EACH, FLOWS)
        workers = relay.workers()
        assert [worker["received"] > 0 for worker in workers] == [True, True], "both took part"
        assert sum(worker["received"] for worker in workers) == FLOWS * EACH
        assert {flow["worker"] for flow in relay.flows()} == {worker["worker"] for worker in workers}


def test_fragments_reach_one_worker_whole(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(10, 8000)
    config = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
    with (
        Receiver(star.sink, "k0", 6000, "239.2.2.2") as application,
        Sender(star.source) as sender,
        Relay(star.relay, config, arguments=["--workers", core_list()]) as relay,
    ):
        sender.send("239.1.1.1", 5000, sent)
        assert application.receive(10) == sent
        relay.await_received(10)


def test_workers_are_pinned_to_their_cores(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
    with Relay(star.relay, config, arguments=["--workers", core_list()]) as relay:
        for worker in relay.workers():
            assert os.sched_getaffinity(worker["pid"]) == {worker["core"]}
        assert [str(worker["core"]) for worker in relay.workers()] == core_list().split(",")


@pytest.mark.parametrize("workers", ["1", "two"])
def test_a_killed_worker_is_restarted(lab: Lab, workers: str) -> None:
    star = lab.star()
    chosen = core_list() if workers == "two" else workers
    config = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, config, arguments=["--workers", chosen]) as relay,
    ):
        sender.send("239.1.1.1", 5000, payloads(20))
        wire.wait(20)
        relay.await_received(20)
        killed = {worker["pid"] for worker in relay.workers()}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: all_new(relay, killed), "every worker has been restarted")
        assert "239.1.1.1" in star.relay.groups("in0"), "memberships outlive a worker"
        relay.await_rule("a", "up")
        forwards_again(wire, sender)
        relay.await_stats(lambda stats: stats["received"] >= 21, "counters go on from where they were")
        assert relay.stats()["rules"][0]["packets"] >= 21


def all_new(relay: Relay, killed: set[int]) -> bool:
    """Every worker runs again, as another process."""
    workers = relay.workers()
    return all(
        worker["state"] == "running" and worker["pid"] not in killed and worker["restarts"] >= 1
        for worker in workers
    )


def forwards_again(wire: Capture, sender: Sender) -> None:
    """Send until one comes out."""
    sender.send("239.1.1.1", 5000, [b"again"])
    assert wire.wait(1)[0].payload == b"again"


def test_a_killed_control_does_not_stop_the_stream(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        relay.add_rule("by-api", "in0:239.1.1.2:5000", "out0:239.2.2.2:6001")
        sender.send("239.1.1.1", 5000, payloads(5))
        relay.await_received(5)
        control = relay.role("control")
        assert len(control) == 1
        os.kill(control[0], signal.SIGKILL)
        sender.send("239.1.1.1", 5000, payloads(20, first=5))
        assert [packet.payload for packet in wire.wait(25)] == payloads(25)
        eventually(lambda: relay.role("control") not in ([], control), "control has been restarted")
        eventually(lambda: answers(relay), "the API answers again")
        assert set(relay.rules()) == {"a", "by-api"}
        relay.await_rule("by-api", "up")
        sender.send("239.1.1.2", 5000, [b"still there"])
        assert wire.wait(1)[0].payload == b"still there"


def answers(relay: Relay) -> bool:
    """The API answers and says that it is ready."""
    try:
        return bool(relay.get("/v1/health")["ready"])
    except (OSError, AssertionError):
        return False
