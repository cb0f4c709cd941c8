"""Flows pass from the slow path to the kernel, and from one route to another, at 100,000 datagrams a second.

Every datagram is numbered: none may be lost, doubled, or overtake another of its flow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from netns import fast
from netns.lab import Lab, Star, eventually
from netns.numbered import FIRST_PORT, PORT, Numbers, Outcome
from netns.relay import Relay, rule
from netns.traffic import Capture

pytestmark = [
    pytest.mark.netns,
    pytest.mark.alone,
]  # loads of 100,000 datagrams a second, of which none may be lost
GROUP, OUT = "239.1.1.1", "239.2.2.2"
RATE: Final = 100_000
FROM: Final = f"in0:{GROUP}:{PORT}"
TO: Final = f"out0:{OUT}:{FIRST_PORT}"
SECOND: Final = f"out1:{OUT}:{FIRST_PORT + 1}"


@pytest.fixture
def star(lab: Lab) -> Star:
    """Two outputs, as a veth is: merged frames stay whole."""
    return lab.star(outputs=2, offload=True)


@contextmanager
def numbered(elf: bytes, star: Star, config: str, *arguments: str) -> Iterator[tuple[Numbers, Relay, fast.Kernel]]:
    """A relay with these rules, and the load and the sink beside it."""
    with (
        Numbers(elf, star, outputs=2) as numbers,
        Relay(star.relay, config, arguments=arguments) as relay,
        fast.kernel_of(relay) as kernel,
    ):
        yield numbers, relay, kernel


def await_carried(kernel: fast.Kernel, more: int) -> None:
    """Return when the kernel has carried so many more."""
    start = kernel.carried()
    eventually(lambda: kernel.carried() >= start + more, f"{more} carried by the kernel; {kernel.passed()}", 20)


def report(what: str, outcome: Outcome, kernel: fast.Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures, for whoever watches."""
    with capsys.disabled():
        print(f"\n{what}: {outcome}, {kernel.accepted()} frames by the slow path, passed {kernel.passed()}")


def settle(relay: Relay, sent: int) -> None:
    """The relay's counters have all of it."""
    relay.await_received(sent)
    assert relay.stats()["matched"] == sent


@pytest.mark.parametrize("flows", [1, 200])
def test_flows_start_at_full_rate(
    star: Star, numbers_elf: bytes, flows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flow, which comes merged, and 200 that start together, which don't."""
    with numbered(numbers_elf, star, rule("a", FROM, TO)) as (numbers, relay, kernel):
        with numbers.load(GROUP, RATE, flows=flows) as load:
            await_carried(kernel, RATE)
            sent = load.stop()
        outcome = numbers.outcome(sent)
        report(f"{flows} flows start", outcome, kernel, capsys)
        assert outcome.perfect, outcome
        assert RATE <= kernel.carried() < sent, "both paths had a part in it"
        settle(relay, sent)
        assert {each["engine"] for each in relay.flows()} == {"ebpf"}
        assert len(relay.flows()) == flows


@pytest.mark.parametrize("flows", [1, 50])
def test_outputs_come_and_go_under_load(
    star: Star, numbers_elf: bytes, flows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rule for the same group: what the first one sends is not disturbed, what it sends has no gap."""
    with numbered(numbers_elf, star, rule("a", FROM, TO)) as (numbers, relay, kernel):
        spans = []
        with numbers.load(GROUP, RATE, flows=flows) as load:
            await_carried(kernel, RATE // 10)
            accepted = kernel.accepted()
            for i in range(4):
                before = load.sent
                relay.add_rule(f"other-{i}", FROM, SECOND)
                came = numbers.came(1)
                eventually(lambda came=came: numbers.came(1) > came + 5000, "the second output has its share")  # type: ignore[misc]
                first = load.sent
                relay.remove_rule(f"other-{i}")
                spans.append((before, first))
            assert kernel.accepted() == accepted, "what the kernel has does not go back to the slow path"
            sent = load.stop()
        outcome, other = numbers.outcome(sent), numbers.tallies(1)["copies"][:sent]
        report(f"{flows} flows, outputs changed", outcome, kernel, capsys)
        assert outcome.perfect, outcome
        assert int(other.max()) == 1, "nothing twice on the second output either"
        assert int(numbers.arrays["came"]["late"][1]) == 0
        runs = int((other[1:] > other[:-1]).sum())
        assert runs == len(spans) if flows == 1 else runs >= len(spans), "each time without a gap"
        settle(relay, sent)
        assert {each["engine"] for each in relay.flows()} == {"ebpf"}


def test_outputs_change_places_under_load(
    star: Star, numbers_elf: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one's copies go round by lo while frames are merged; nothing overtakes them at the change."""
    one, other = rule("a", FROM, TO, SECOND), rule("a", FROM, SECOND, TO)
    with numbered(numbers_elf, star, one) as (numbers, relay, kernel), Capture(star.relay, "lo") as round_trips:
        with numbers.load(GROUP, RATE) as load:
            await_carried(kernel, RATE // 10)
            for config in (other, one) * 8:
                apply(relay, star, folder, config)
                await_carried(kernel, RATE // 20)
            sent = load.stop()
        for output in range(2):
            outcome = numbers.outcome(sent, output)
            report(f"places changed, output {output}", outcome, kernel, capsys)
            assert outcome.perfect, outcome
        went = [packet.dport for packet in round_trips.arrived()]
        assert {FIRST_PORT, FIRST_PORT + 1} <= set(went), "either output was the last"
        settle(relay, sent)


def test_order_at_full_speed(lab: Lab, numbers_elf: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """As fast as the source can, several frames a poll: those behind a copy that went round do not overtake it."""
    star, config = lab.star(outputs=2, mtu=9000, offload=True), rule("a", FROM, TO, SECOND)
    with numbered(numbers_elf, star, config) as (numbers, _, kernel), Capture(star.relay, "lo") as round_trips:
        with numbers.load(GROUP, RATE) as load:
            await_carried(kernel, RATE // 10)
            numbers.outcome(load.stop())
        with numbers.load(GROUP, 30 * RATE, size=2000) as load:
            await_carried(kernel, 5 * RATE)
            sent = load.stop()
        for output in range(2):
            outcome = numbers.outcome(sent, output)
            report(f"full speed, output {output}", outcome, kernel, capsys)
            assert (outcome.doubled, outcome.late) == (0, 0), outcome
        assert round_trips.arrived(), "copies went round"


def test_the_only_rule_is_replaced_under_load(
    star: Star, numbers_elf: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `apply`, with another TTL: each datagram leaves once, with the one or the other."""
    with numbered(numbers_elf, star, rule("a", FROM, f"{TO},ttl=40")) as (numbers, relay, kernel):
        with numbers.load(GROUP, RATE, flows=10) as load:
            await_carried(kernel, RATE // 10)
            accepted = kernel.accepted()
            for ttl in (41, 42, 43):
                apply(relay, star, folder, rule("a", FROM, f"{TO},ttl={ttl}"))
                eventually(
                    lambda ttl=ttl: int(numbers.tallies()["ttl"][max(0, load.sent - 500)]) == ttl,  # type: ignore[misc]
                    f"TTL {ttl} leaves",
                )
            await_carried(kernel, RATE // 10)
            assert kernel.accepted() == accepted, "what the kernel has does not go back to the slow path"
            sent = load.stop()
        outcome = numbers.outcome(sent)
        report("TTL replaced", outcome, kernel, capsys)
        assert outcome.perfect, outcome
        assert set(numbers.tallies()["ttl"][:sent].tolist()) == {40, 41, 42, 43}
        settle(relay, sent)


def apply(relay: Relay, star: Star, folder: Path, config: str) -> None:
    """`mrelay apply`."""
    path = folder / "new.toml"
    path.write_text(config)
    star.relay.run(relay.process.args[4], "-m", "mrelay", "apply", str(path), "--socket", str(relay.socket))  # type: ignore[union-attr, index, arg-type]
