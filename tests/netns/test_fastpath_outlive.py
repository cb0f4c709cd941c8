"""What the kernel carries goes on when processes end: one, all, by a stop; and the next relay takes it over.

Numbered datagrams at 100,000 a second all the while: none may be lost, doubled or out of order.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from manager import Manager
from netns import fast
from netns.driver import await_engine
from netns.lab import SOURCE, SOURCE_2, SOURCE_6, Lab, Star, eventually
from netns.numbered import FIRST_PORT, PORT, Load, Numbers, Outcome
from netns.relay import Relay, rule
from netns.test_fdstore import Listener, kill, start_again
from netns.traffic import Capture, Receiver, Sender, payloads

pytestmark = [
    pytest.mark.netns,
    pytest.mark.alone,
]  # loads of 100,000 datagrams a second, of which none may be lost
GROUP, OUT = "239.1.1.1", "239.2.2.2"
RATE: Final = 100_000
CONFIG: Final = rule("a", f"in0:{GROUP}:{PORT}", f"out0:{OUT}:{FIRST_PORT}")
FLOWS: Final = 20


@pytest.fixture
def star(lab: Lab) -> Star:
    """One output, as a veth is."""
    return lab.star(offload=True)


@pytest.fixture
def numbers(numbers_elf: bytes, star: Star) -> Iterator[Numbers]:
    """Load and sink."""
    with Numbers(numbers_elf, star) as made:
        yield made


def pinning(star: Star, folder: Path, pins: Path, config: str = CONFIG) -> Relay:
    """A relay that pins, in a folder that the next one finds again."""
    return Relay(star.relay, config, folder=folder, arguments=["--pin-dir", str(pins)])


def links(pins: Path) -> list[Path]:
    """Of all relays that have pinned something here."""
    return sorted(pins.glob("*/link-*"))


def establish(load: Load, relay: Relay, kernel: fast.Kernel) -> int:
    """Return when the kernel carries the load: how many frames the slow path had."""
    eventually(lambda: kernel.carried() > RATE // 10, "the kernel carries the load", 20)
    eventually(lambda: {each["engine"] for each in relay.flows()} == {"ebpf"}, "every flow of it", 20)
    load.await_sent(RATE // 100)
    return kernel.accepted()


def say(what: str, outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures, for whoever watches."""
    with capsys.disabled():
        print(f"\n{what}: {outcome}")


# ---- one process ----


@pytest.mark.parametrize("role", ["control", "worker"])
def test_a_process_is_killed(star: Star, numbers: Numbers, role: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And comes back: no datagram takes the slow path for it."""
    with Relay(star.relay, CONFIG) as relay, fast.kernel_of(relay) as kernel:
        with numbers.load(GROUP, RATE, flows=FLOWS, seconds=8) as load:
            accepted = establish(load, relay, kernel)
            for pid in in_service(relay, role):
                os.kill(pid, signal.SIGKILL)
                eventually(lambda pid=pid: pid not in in_service(relay, role), f"another {role}", 30)  # type: ignore[misc]
            load.await_sent(RATE // 10)
            assert kernel.accepted() == accepted, "no frame went through the slow path"
            sent = load.stop()
        outcome = numbers.outcome(sent)
        say(f"{role} killed", outcome, capsys)
        assert outcome.perfect, outcome
        assert relay.await_received(sent)["matched"] == sent
        relay.await_stats(lambda s: s["rules"][0]["outputs"][0]["packets"] == sent, "its output counts them all")


def in_service(relay: Relay, role: str) -> list[int]:
    """The processes of this role that serve, none while there is no control to ask."""
    try:
        workers = relay.workers()
    except (OSError, AssertionError):
        return []
    if any(worker["state"] != "running" or not worker["pid"] for worker in workers):
        return []
    return relay.role("control") if role == "control" else [worker["pid"] for worker in workers]


# ---- all of them ----


def killed_at_work(load: Load, relay: Relay) -> int:
    """Start it, and kill all of it once it carries the load: how much had been sent by then."""
    relay.start()
    relay.wait_ready()
    with fast.kernel_of(relay) as kernel:
        establish(load, relay, kernel)
    settled = load.sent
    kill(relay)
    relay.close()
    return settled


def outlives(load: Load, numbers: Numbers) -> None:
    """It arrives though no process of the relay is there."""
    came = numbers.came()
    load.await_sent(RATE // 10)
    eventually(lambda: numbers.came() >= came + RATE // 10, "the kernel goes on by itself")


@pytest.mark.parametrize("limit", ["", "[relay]\nflow_limit = 5000\n\n"], ids=["adopted", "of-another-size"])
def test_all_processes_are_killed(
    star: Star,
    numbers: Numbers,
    folder: Path,
    pins: Path,
    limit: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next start takes the maps over, or replaces them by others; each datagram is counted once since then."""
    with numbers.load(GROUP, RATE, flows=FLOWS) as load:
        settled = killed_at_work(load, pinning(star, folder, pins))
        outlives(load, numbers)
        before = load.sent
        with pinning(star, folder, pins, limit + CONFIG) as second, fast.kernel_of(second) as kernel:
            after = load.sent
            eventually(lambda: {each["engine"] for each in second.flows()} == {"ebpf"}, "all carried again", 20)
            assert len(second.flows()) == FLOWS
            load.await_sent(RATE // 10)
            sent = load.stop()
            outcome = numbers.outcome(sent, first=settled)
            say(f"all killed{limit and ', other maps'}", outcome, capsys)
            assert outcome.perfect, outcome
            if not limit:
                assert kernel.accepted() == kernel.maps.progress[:, 8].sum(), "nothing is on its way"
            stats = second.await_stats(lambda s: s["matched"] >= sent - after, "what came since is counted")
            assert sent - after <= stats["received"] <= sent - before
            assert stats["rules"][0]["outputs"][0]["packets"] == stats["matched"] == stats["received"]
            assert len(links(pins)) == 1
            assert len(list(pins.glob("*/maps-*"))) == 1, "what it replaced is gone"
    assert not links(pins)


@pytest.mark.parametrize("limit", ["", "[relay]\nflow_limit = 5000\n\n"], ids=["adopted", "of-another-size"])
def test_what_goes_round_outlives_it_too(
    lab: Lab, numbers_elf: bytes, folder: Path, pins: Path, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merged flow to two outputs: copies go by lo to the last one, before, meanwhile and after."""
    star = lab.star(outputs=2, offload=True)
    config = rule("a", f"in0:{GROUP}:{PORT}", f"out0:{OUT}:{FIRST_PORT}", f"out1:{OUT}:{FIRST_PORT + 1}")
    with Numbers(numbers_elf, star, 2) as numbers, numbers.load(GROUP, RATE) as load:
        settled = killed_at_work(load, pinning(star, folder, pins, config))
        await_round_trip(star)
        outlives(load, numbers)
        assert len(list(pins.glob("*/maps-*/land-1"))) == 1
        with pinning(star, folder, pins, limit + config) as second:
            eventually(lambda: {each["engine"] for each in second.flows()} == {"ebpf"}, "carried again", 20)
            await_round_trip(star)
            load.await_sent(RATE // 10)
            sent = load.stop()
            for output in range(2):
                outcome = numbers.outcome(sent, output, first=settled)
                say(f"merged, all killed{limit and ', other maps'}, output {output}", outcome, capsys)
                assert outcome.perfect, outcome
            assert len(list(pins.glob("*/maps-*/land-1"))) == 1, "the other one is gone"
    assert not list(pins.glob("mrelay/*"))


def await_round_trip(star: Star) -> None:
    """Return when a copy to the last output has gone by lo."""
    with Capture(star.relay, "lo") as round_trips:
        assert round_trips.wait(1)[0].dport == FIRST_PORT + 1


def test_two_relays_send_round(lab: Lab) -> None:
    """In one namespace: what goes round is taken by the relay that sent it."""
    fast.require()
    star = lab.star(outputs=2, offload=True)
    configs = [
        rule("a", f"in0:239.1.1.{i}:5000", f"out0:{OUT}:{6000 + i}", f"out1:{OUT}:{7000 + i}") for i in (1, 2)
    ]
    with ExitStack() as stack:
        relays = [stack.enter_context(Relay(star.relay, config)) for config in configs]
        sender = stack.enter_context(Sender(star.source))
        for i, relay in enumerate(relays, start=1):
            group = f"239.1.1.{i}"
            await_engine(relay, sender, group, "ebpf")
            with Receiver(star.sink, "k1", 7000 + i, OUT) as receiver, Capture(star.relay, "lo") as round_trips:
                sender.send_segmented(group, 5000, payloads(40))
                assert receiver.receive(40) == payloads(40)
                assert round_trips.wait(1)[0].dport == 7000 + i


def test_rules_that_went_meanwhile_end_when_the_next_relay_is_up(
    star: Star, numbers: Numbers, folder: Path, pins: Path
) -> None:
    """The kernel forwards by the old rules until then, and no longer."""
    other = rule("b", "in0:239.1.1.2:5000", f"out0:{OUT}:{FIRST_PORT}")
    with numbers.load(GROUP, RATE, flows=FLOWS) as load:
        first = pinning(star, folder, pins).start()
        first.wait_ready()
        with fast.kernel_of(first) as kernel:
            establish(load, first, kernel)
        kill(first)
        first.close()
        shutil.rmtree(folder / "state")
        outlives(load, numbers)
        with pinning(star, folder, pins, other) as second, fast.kernel_of(second) as kernel:
            eventually(lambda: not len(kernel.maps.all_flows(4)[0]), "its flows are taken out")
            came, matched = numbers.came(), second.stats()["matched"]
            load.await_sent(RATE // 10)
            assert numbers.came() == came
            assert second.stats()["received"] == matched, "what no rule names is not counted"
        load.stop()


def test_flows_of_both_families_are_adopted(star: Star, folder: Path, pins: Path) -> None:
    """A flow that sends nothing meanwhile stays, and its next datagram is the kernel's."""
    fast.require()
    config = CONFIG + rule("six", "in0:[ff3e::1]:5000", "out0:[ff3e::2]:6000", "out0:[fd00:1:0::2]:6001")
    flows = {(GROUP, SOURCE), (GROUP, SOURCE_2), ("ff3e::1", SOURCE_6)}
    with ExitStack() as stack:
        senders = {flow: stack.enter_context(Sender(star.source, flow[1])) for flow in flows}

        def carries(relay: Relay) -> bool:
            for (group, _), sender in senders.items():
                sender.send(group, PORT, [b"warm"])
            return {(f["group"], f["source"]) for f in relay.flows() if f["engine"] == "ebpf"} == flows

        first = pinning(star, folder, pins, config).start()
        first.wait_ready()
        eventually(lambda: carries(first), "the kernel has them")
        kill(first)
        first.close()
        wire = stack.enter_context(Capture(star.sink, "k0"))
        with pinning(star, folder, pins, config) as second, fast.kernel_of(second) as kernel:
            assert sum(len(kernel.maps.all_flows(family)[0]) for family in (4, 6)) == len(flows)
            eventually(lambda: kernel.maps.hops["flags"].sum() >= 6, "beside the old hops there are new ones")
            accepted = kernel.accepted()
            for (group, source), sender in senders.items():
                sender.send(group, PORT, [source.encode()])
            assert sorted(packet.payload for packet in wire.wait(4)) == sorted(
                [SOURCE.encode(), SOURCE_2.encode(), SOURCE_6.encode(), SOURCE_6.encode()]
            )
            assert kernel.accepted() == accepted
            assert second.await_received(3)["matched"] == 3
            listed = {(f["group"], f["source"], f["packets"], f["engine"]) for f in second.flows()}
            assert listed == {(*flow, 1, "ebpf") for flow in flows}


def test_no_leave_when_all_are_killed(
    star: Star, numbers: Numbers, folder: Path, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service manager's descriptor store has the memberships meanwhile."""
    manager = Manager(folder)
    for name, value in manager.environment.items():
        monkeypatch.setenv(name, value)
    wire = Listener(star)
    with manager, numbers.load(GROUP, RATE, flows=FLOWS) as load:
        first = pinning(star, folder, pins).start()
        first.wait_ready()
        with fast.kernel_of(first) as kernel:
            establish(load, first, kernel)
        manager.take_all()
        settled = load.sent
        wire.leaves()
        kill(first)
        manager.take_all()
        first.close()
        outlives(load, numbers)
        assert GROUP in star.relay.groups("in0")
        again = start_again(manager, star, folder, CONFIG)
        again._arguments += ["--pin-dir", str(pins)]
        with again as second:
            eventually(lambda: {each["engine"] for each in second.flows()} == {"ebpf"}, "all carried again", 20)
            sent = load.stop()
            outcome = numbers.outcome(sent, first=settled)
            assert outcome.perfect, outcome
            assert wire.leaves() == []
    wire.close()


# ---- stopping ----


def mrelay(star: Star, relay: Relay, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the client's, in the relay's namespace."""
    command = (sys.executable, "-m", "mrelay")
    return subprocess.run(
        ["ip", "netns", "exec", star.relay.name, *command, *arguments, "--socket", str(relay.socket)],
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )


def carried(relay: Relay, sender: Sender, application: Receiver) -> None:
    """Return when the kernel has the flow."""

    def sent() -> bool:
        sender.send(GROUP, PORT, [b"warm"])
        application.receive(1)
        return bool(relay.flows()) and relay.flows()[0]["engine"] == "ebpf"

    eventually(sent, "the kernel has the flow")


def passes(sender: Sender, application: Receiver, text: bytes) -> bool:
    """Whether a datagram comes through; one that does not is waited for only as long as another way is slow."""
    sender.send(GROUP, PORT, [text])
    try:
        return application.receive(1, 0.5) == [text]
    except AssertionError:
        return False


@pytest.fixture
def flow(star: Star) -> Iterator[tuple[Sender, Receiver]]:
    """A sender and an application."""
    with Receiver(star.sink, "k0", FIRST_PORT, OUT) as application, Sender(star.source) as sender:
        yield sender, application


def test_sigterm_removes_everything(star: Star, folder: Path, pins: Path, flow: tuple[Sender, Receiver]) -> None:
    """The flow ends, and no pin is left."""
    fast.require()
    with pinning(star, folder, pins) as relay:
        carried(relay, *flow)
        assert len(links(pins)) == 1
    assert not passes(*flow, b"gone")
    assert not list(pins.glob("mrelay/*"))


def test_without_pins_a_kill_ends_it(star: Star, flow: tuple[Sender, Receiver]) -> None:
    """Where there is no BPF file system."""
    fast.require()
    relay = Relay(star.relay, CONFIG).start()
    relay.wait_ready()
    carried(relay, *flow)
    kill(relay)
    relay.close()
    eventually(lambda: not passes(*flow, b"gone"), "the link goes with its last descriptor")


def test_stop_leaves_the_kernel_at_work(
    star: Star, folder: Path, pins: Path, flow: tuple[Sender, Receiver]
) -> None:
    """`mrelay stop` ends the processes, `mrelay stop --flush` what is left; a second one has nothing to do."""
    fast.require()
    relay = pinning(star, folder, pins).start()
    relay.wait_ready()
    carried(relay, *flow)
    here = ("--pin-dir", str(pins))
    done = mrelay(star, relay, "stop", *here)
    assert (done.returncode, done.stderr) == (0, "")
    said = "stopped; the kernel goes on to forward 1 flow, until the next start or 'mrelay stop --flush'\n"
    assert done.stdout == said
    assert relay.process is not None
    assert relay.process.wait(20) == 0
    assert all(passes(*flow, b"still %d" % i) for i in range(5))
    done = mrelay(star, relay, "stop", "--flush", *here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no relay runs; the kernel forwards no more at 1 interface\n"
    assert not passes(*flow, b"gone")
    assert not list(pins.glob("mrelay/*"))
    done = mrelay(star, relay, "stop", "--flush", *here)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.search("no relay|not running|cannot reach|can't reach", done.stderr), done.stderr


def test_stop_with_flush_ends_everything(
    star: Star, folder: Path, pins: Path, flow: tuple[Sender, Receiver]
) -> None:
    """Of a relay that runs."""
    fast.require()
    relay = pinning(star, folder, pins).start()
    relay.wait_ready()
    carried(relay, *flow)
    done = mrelay(star, relay, "stop", "--flush", "--pin-dir", str(pins))
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
    assert relay.process is not None
    assert relay.process.wait(20) == 0
    assert not passes(*flow, b"gone")
    assert not list(pins.glob("mrelay/*"))


def test_flush_after_a_kill(star: Star, folder: Path, pins: Path, flow: tuple[Sender, Receiver]) -> None:
    """What a relay left that was killed."""
    fast.require()
    relay = pinning(star, folder, pins).start()
    relay.wait_ready()
    carried(relay, *flow)
    kill(relay)
    assert all(passes(*flow, b"still %d" % i) for i in range(5))
    done = mrelay(star, relay, "stop", "--flush", "--pin-dir", str(pins))
    assert done.stdout == "no relay runs; the kernel forwards no more at 1 interface\n", done.stderr
    assert not passes(*flow, b"gone")
    assert not list(pins.glob("mrelay/*"))
